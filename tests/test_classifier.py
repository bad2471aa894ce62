"""data/classifier.py: scores of texts, and files of models. Run: pytest tests/test_classifier.py"""

import base64
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from corpora import distinct_words
from test_clean_runs import read_rows, write_rows

from data import classifier, clean

WORDS = np.array(distinct_words(400))


def texts(count, tilt, seed, n_words=40):
    """Texts whose words of the second half are e^tilt times as frequent as the others."""
    rng = np.random.default_rng(seed)
    odds = np.where(np.arange(len(WORDS)) < len(WORDS) / 2, 1, np.exp(tilt))
    return [' '.join(rng.choice(WORDS, n_words, p=odds / odds.sum())) for _ in range(count)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Good and bad texts, and a model of them."""
    path = tmp_path_factory.mktemp('classifier')
    write_rows(path / 'good.jsonl', texts(1500, 0.4, 1))
    write_rows(path / 'bad.jsonl', texts(500, -0.4, 2))
    done = train(path, '--good=good.jsonl', '--bad=bad.jsonl', '--out=model.json')
    assert done.returncode == 0, done.stderr
    (path / 'out.txt').write_text(done.stdout)
    return path


def train(folder, *arguments):
    return subprocess.run([sys.executable, '-m', 'data.clean', 'train-quality', *arguments], cwd=folder,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)


def test_accuracy_and_calibration_on_new_texts(folder):
    model = classifier.load_model(folder / 'model.json')
    new = [*texts(1000, 0.4, 3), *texts(1000, -0.4, 4)]
    scores, labels = np.array([model.score(text) for text in new]), np.repeat([True, False], 1000)
    measures = classifier.measure(scores, labels)
    # the best accuracy: the share of texts with more words of the second half decides
    second = np.array([sum(word >= WORDS[200] for word in text.split()) for text in new])
    best = np.mean((second >= 20) == labels)
    assert 0.85 < best and measures['accuracy'] > best - 0.08
    assert measures['calibration error'] < 0.1
    held_out = model.training['held out']
    assert held_out['texts'] == 200 and abs(held_out['accuracy'] - measures['accuracy']) < 0.1
    assert held_out['calibration error'] < 0.15
    assert re.search(r'held out +200 of them: accuracy \d\d\.\d\d%, calibration error 0\.\d', (folder / 'out.txt').read_text())


def test_measures_by_hand():
    scores, labels = np.array([0.95, 0.9, 0.1, 0.6]), np.array([True, True, False, False])
    got = classifier.measure(scores, labels)
    assert got['accuracy'] == 0.75
    # bins: 0.9 to 1 (half of the texts, score 0.925, all good), 0.1, and 0.6, none good
    assert got['calibration error'] == pytest.approx(0.5 * 0.075 + 0.25 * 0.1 + 0.25 * 0.6)


def test_training_depends_on_the_texts_alone(folder, tmp_path):
    rows = read_rows(folder / 'good.jsonl')
    write_rows(tmp_path / 'good.jsonl', [*rows[::-1], *rows[:50]])
    again = classifier.train([tmp_path / 'good.jsonl'], [folder / 'bad.jsonl'])
    model = classifier.load_model(folder / 'model.json')
    assert np.array_equal(again.weights, model.weights) and again.bias == model.bias


def test_a_sample_is_bounded_and_fair(folder, monkeypatch):
    monkeypatch.setattr(classifier, 'MOST_TEXTS', 100)
    rows = classifier.sample([folder / 'good.jsonl', folder / 'bad.jsonl'], 'text')
    hashes = sorted(map(classifier.text_hash, read_rows(folder / 'good.jsonl') + read_rows(folder / 'bad.jsonl')))
    chosen = [text for text in read_rows(folder / 'good.jsonl') + read_rows(folder / 'bad.jsonl')
              if classifier.text_hash(text) < hashes[100]]
    assert len(rows) == 100
    assert {row.tobytes() for row in rows} == {classifier.features(text).tobytes() for text in chosen}


def test_features_are_words_and_pairs():
    assert len(classifier.features('One two, three')) == 5
    assert len(classifier.features('')) == len(classifier.features('?!')) == 0
    assert set(classifier.features('ONE two')) < set(classifier.features('so: one TWO!'))
    assert not set(classifier.features('one two')) >= set(classifier.features('two one'))
    assert len(classifier.features(' '.join(distinct_words(5000)))) < 2 * classifier.MOST_WORDS


@pytest.mark.parametrize('num_proc', [1, 2])
def test_a_run_drops_by_score_and_reports_quantiles(num_proc, folder, tmp_path):
    rows = [*texts(300, 0.4, 5), *texts(300, -0.4, 6), '?!']
    write_rows(tmp_path / 'in.jsonl', rows)
    model = classifier.load_model(folder / 'model.json')
    steps = clean.Steps(quality=str(folder / 'model.json'), quality_min=0.3,
                        toxic=str(folder / 'model.json'), toxic_max=0.2)
    report = clean.clean_to(tmp_path / 'out.jsonl', tmp_path / 'in.jsonl', steps, num_proc=num_proc)
    scores = np.array([model.score(text) for text in rows])
    kept = [text for text, score in zip(rows, scores, strict=True) if score >= 0.8]
    assert read_rows(tmp_path / 'out.jsonl') == kept and 100 < len(kept) < 400
    quality, toxic = report['scores']['quality'], report['scores']['toxic']
    assert quality['documents'] == 601 and quality['removed'] == sum(scores < 0.3)
    assert toxic['documents'] == sum(scores >= 0.3) == len(kept) + toxic['removed']
    for name, value in quality['quantiles'].items():
        assert value == pytest.approx(np.percentile(scores, float(name[:-1]), method='inverted_cdf'), abs=0.001)
    assert 'expected 0.3 or more' in report['removed']['quality']['examples'][0]['why']


DAMAGE = {
    'not JSON': lambda content: 'no model',
    'not JSON ': lambda content: '[' * 100_000,
    'not a model of version 1': lambda content: '[]',
    'not a model of version 1 ': lambda content: json.dumps({**content, 'version': 2}),
    'not a model of version 1  ': lambda content: json.dumps({**content, 'more': 2}),
    'as bits; expected 1 to 20': lambda content: json.dumps({**content, 'bits': 10**9}),
    'as bits; expected 1 to 20 ': lambda content: json.dumps({**content, 'bits': '18'}),
    'weights; expected 131,072': lambda content: json.dumps({**content, 'bits': 17}),
    'damaged weights': lambda content: json.dumps({**content, 'weights': '###'}),
    'damaged weights ': lambda content: json.dumps({**content, 'weights': [1.0]}),
    'damaged weights  ': lambda content: json.dumps({**content, 'weights': 'AAAA'}),
    'not finite': lambda content: json.dumps({**content, 'bias': float('nan')}),
    'not finite ': lambda content: json.dumps({**content, 'bias': '1'}),
    'not finite  ': lambda content: json.dumps({**content, 'weights': base64.b64encode(
        np.full(2**18, np.inf, '<f4').tobytes()).decode()}),
    'more than': lambda content: ' ' * (classifier.MODEL_BYTES + 1)}


@pytest.mark.parametrize('said', DAMAGE)
def test_hostile_model_files(said, folder, tmp_path):
    content = json.loads((folder / 'model.json').read_text())
    (tmp_path / 'm.json').write_text(DAMAGE[said](content))
    with pytest.raises(ValueError, match=said.strip()):
        classifier.load_model(tmp_path / 'm.json')


@pytest.mark.parametrize('arguments, said', [
    (['--bad=none.jsonl', '--out=m.json'], 'none.jsonl does not exist'),
    (['--bad=few.jsonl', '--out=m.json'], 'has 1 different texts with words; expected 20'),
    (['--bad=bad.jsonl', '--out=m.pt'], 'expected a name that ends in .json')])
def test_refused_training(arguments, said, folder):
    write_rows(folder / 'few.jsonl', ['one text'] * 30)
    done = train(folder, '--good=good.jsonl', *arguments)
    assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr
    assert not (folder / 'm.json').exists()


@pytest.mark.parametrize('steps, said', [
    ({'quality_min': 0.7, 'exact': True}, '--quality_min=0.7 needs --quality=MODEL'),
    ({'quality': 'm.json', 'quality_min': 2.0}, 'expected a score from 0 to 1'),
    ({'toxic': 'm.json', 'toxic_max': float('nan')}, 'expected a score from 0 to 1')])
def test_refused_steps(steps, said):
    with pytest.raises(ValueError, match=said):
        clean.check_steps(clean.Steps(**steps))
