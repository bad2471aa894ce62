"""data/decontaminate.py: documents with parts of evaluation sets. Run: pytest tests/test_decontaminate.py"""

import json
import random

import numpy as np
import pytest
from corpora import distinct_words

from data import clean
from data.decontaminate import EvaluationIndex
from data.minhash import hash_runs, hash_words

WORDS = distinct_words(3000, 6)


def write_rows(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return path


def test_planted_documents_are_found_and_no_others(tmp_path, monkeypatch):
    """100 of 10,000 documents; the others share up to 12 words in a row with a task."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    tasks = [{'question': ' '.join(rng.choices(WORDS, k=30)), 'choices': [' '.join(rng.choices(WORDS, k=4))] * 4,
              'answer': 2} for _ in range(300)]
    exam = [' '.join(rng.choices(WORDS, k=20)) for _ in range(50)]
    write_rows(tmp_path / 'tasks.jsonl', tasks)
    (tmp_path / 'exam.txt').write_text('\n'.join(exam))
    (tmp_path / 'other.json').write_text(json.dumps([{'prompt': ' '.join(WORDS[:14])}, {'prompt': 'short'}]))
    planted = set(rng.sample(range(10_000), 100))
    texts, expected = [], []
    for number in range(10_000):
        text = rng.choices(WORDS, k=rng.randrange(30, 60))
        source = exam if number % 4 == 0 else [task['question'] for task in tasks]
        words = rng.choice(source).split()
        place, n_words = rng.randrange(len(words) - 13), 13 if number in planted else 12
        middle = rng.randrange(len(text))
        text[middle:middle] = ['zzz', *words[place:place + n_words], 'zzz']
        text = ' '.join(text)
        texts.append(text.title().replace(' ', ', ') if number % 3 else text)
        if number not in planted:
            expected.append(texts[-1])
    write_rows(tmp_path / 'in.jsonl', [{'text': text} for text in texts])
    steps = clean.Steps(decontaminate=('tasks.jsonl', 'exam.txt', 'other.json'))
    report = clean.clean_to(tmp_path / 'out.jsonl', 'in.jsonl', steps)
    got = [json.loads(line)['text'] for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
    assert got == expected
    counts = {name: entry['documents'] for name, entry in report['decontaminate'].items()}
    from_exam = sum(number % 4 == 0 for number in planted)
    assert counts == {'tasks.jsonl': 100 - from_exam, 'exam.txt': from_exam, 'other.json': 0}
    assert report['decontaminate']['other.json'] == {'texts': 2, 'texts of fewer than 13 words': 1, 'documents': 0}
    example = report['removed']['decontaminate: tasks.jsonl']['examples'][0]
    assert any(example['why'] in task['question'] for task in tasks) and example['why'].count(' ') == 12


def test_a_row_is_one_text_of_all_its_strings(tmp_path):
    row = {'id': 7, 'passage': {'title': ' '.join(WORDS[:5])}, 'choices': [' '.join(WORDS[5:9]), ' '.join(WORDS[9:13])]}
    write_rows(tmp_path / 'a.jsonl', [row])
    index = EvaluationIndex([tmp_path / 'a.jsonl'])
    assert index.find('so ' + ' '.join(WORDS[:13])) == (str(tmp_path / 'a.jsonl'), ' '.join(WORDS[:13]))
    assert index.find(' '.join(WORDS[1:14])) is None and index.find('') is None


def test_a_text_is_one_text_across_its_pieces(tmp_path):
    words = distinct_words(100_000)
    (tmp_path / 'a.txt').write_text('\n'.join(words))
    index = EvaluationIndex([tmp_path / 'a.txt'])
    for place in range(0, len(words) - 13, 997):
        assert index.find(' '.join(words[place:place + 13]))
        assert not index.find(' '.join(words[place:place + 12]))
    assert len(index.hashes[str(tmp_path / 'a.txt')]) == len(words) - 12


def test_runs_are_told_apart():
    """All runs of 13 of three words: none of 3^9 that end alike share a hash."""
    rng = np.random.default_rng(0)
    runs = np.unique(rng.choice(hash_words('one two three'), (200_000, 13)), axis=0)
    hashes = {int(hash_runs(run, 13)[0]) for run in runs[:20_000]}
    assert len(hashes) == 20_000


@pytest.mark.parametrize('name, content, said', [
    ('a.jsonl', '{"q": "too short"}', 'none of its 1 texts has 13 words'),
    ('a.jsonl', '', 'a.jsonl is empty'),
    ('b.jsonl', '{}', 'a.jsonl does not exist'),
    ('a.jsonl/b.bin', 'x', 'expected the names of the files')])
def test_refusals(name, content, said, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    if '/' in name:
        (tmp_path / 'a.jsonl' / 'c.txt').write_text('text')
    with pytest.raises(ValueError, match=said):
        EvaluationIndex([tmp_path / 'a.jsonl'])
