"""python -m posttrain.classify: learning, resuming, predicting, refusing. Run: pytest tests/test_classify.py"""

import json
import random
import re
import signal

import numpy as np
import pytest
import torch
from chat_models import TOKENIZER, save_chat_model
from conftest import Folder, environments, same_tensors
from test_clean_runs import read_rows, write_rows

from configurator import UserError
from data import classifier, clean
from flatgpt import classify, pretrained
from posttrain import labels
from posttrain.policy import resume

SMALL = {'init_from': 'base', 'data': 'texts.jsonl', 'device': 'cpu', 'dtype': 'float32', 'max_iters': 20,
         'batch_size': 8, 'eval_interval': 10, 'log_interval': 5, 'learning_rate': 3e-3, 'warmup_iters': 2,
         'dropout': 0.0}
VOWELS, OTHERS = 'aeiou', 'bcdfg'


def make_rows(n, seed=0):
    """Texts of letters, six of seven of the kind that the label names; a third has the label "other"."""
    rng = random.Random(seed)
    weights = {label: [6 if (char in VOWELS) == (label == 'vowel') else 1 for char in VOWELS + OTHERS]
               for label in ('vowel', 'other')}
    return [{'text': ''.join(rng.choices(VOWELS + OTHERS, weights[label], k=rng.randint(4, 12))), 'label': label}
            for label in (['other', 'vowel', 'vowel'][i % 3] for i in range(n))]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A folder with the model base and the labelled texts texts.jsonl."""
    save_chat_model(tmp_path, 'base')
    write(tmp_path / 'texts.jsonl', make_rows(200))
    return Folder(tmp_path)


def start(folder, **changes):
    return folder.start('posttrain.classify', **{**SMALL, 'out_dir': 'out', **changes})


def predict(folder, **changes):
    settings = {'predict': 'in.jsonl', 'out': 'done.jsonl', 'device': 'cpu', 'dtype': 'float32', **changes}
    return folder.start('posttrain.classify', **{'out_dir': 'out', **settings})


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# learning -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def learnt(tmp_path_factory):
    """A folder with a trained classifier, out, and the run. Tests must not change it."""
    path = tmp_path_factory.mktemp('classify')
    save_chat_model(path, 'base')
    write(path / 'texts.jsonl', make_rows(400))
    folder = Folder(path)
    return folder, start(folder, max_iters=120, learning_rate=1e-2, eval_interval=40).ok()


def test_learns_and_reports(learnt):
    """From ln 2 to most of the held-out texts, better than the majority; the last line is best.pt's report."""
    folder, run = learnt
    first, *_, last = [record for record in folder.log() if 'val_loss' in record]
    assert abs(first['val_loss'] - np.log(2)) < 1e-4
    assert last['accuracy'] > 0.85 > last['majority'] > 0.5 and last['balanced_accuracy'] > 0.8
    report = json.loads(run.out.splitlines()[-1])
    best = min((record for record in folder.log() if 'val_loss' in record), key=lambda record: record['val_loss'])
    assert report['step'] == best['step'] and report['accuracy'] == best['accuracy']
    assert 0 <= report['low'] < report['accuracy'] <= report['high'] <= 1 and report['ece_low'] <= report['ece_high']
    assert folder.checkpoint(name='best.pt')['report'] == report
    lm_losses = [record['lm_loss'] for record in folder.log() if 'lm_loss' in record]
    assert lm_losses[-1] < 0.9 * lm_losses[0]  # the auxiliary loss is learned too
    assert max(map(len, run.out[run.out.index('steps, '):].splitlines()[:-1])) <= 80


def test_probabilities_of_texts_do_not_depend_on_the_others(learnt):
    model = classify.load(str(learnt[0].path / 'out'))
    texts = ['aeio', 'bcdfgbb', 'e', '']
    together = model.probabilities(texts)
    for text, row in zip(texts, together, strict=True):
        assert list(row) == ['other', 'vowel'] and sum(row.values()) == pytest.approx(1)
        assert model.probabilities([text])[0] == pytest.approx(row, abs=1e-6)
    assert together[0]['vowel'] > 0.5 > together[1]['vowel'] and model.probabilities([]) == []


def test_other_scripts_refuse_it(learnt):
    folder, _ = learnt
    out = str(folder.path / 'out')
    for script in ('sample.py', 'flatgpt.export'):
        settings = {'out': 'exported'} if script == 'flatgpt.export' else {'device': 'cpu'}
        folder.start(script, out_dir='out', **settings).refused(
            'out/best.pt is a classifier', 'posttrain.classify --predict=TEXTS.jsonl --out_dir=out', 'is in base')
    with pytest.raises(UserError, match='is a classifier, which scores texts'):
        pretrained.base_model(out)
    with pytest.raises(UserError, match='is a classifier of another script'):
        resume(f'{out}/ckpt.pt', {})
    with pytest.raises(UserError, match='is a language model; expected a classifier'):
        classify.load(str(folder.path / 'base'))
    with pytest.raises(UserError, match='there is no classifier in none'):
        classify.load('none')


@pytest.mark.parametrize('changes', [{}, {'optimizer': 'muon'}, {'lora_rank': 2, 'lora_targets': 'c_attn,c_fc'},
                                     {'lm_coef': 0.0}])
def test_resumes_bit_for_bit(folder, changes):
    """6 steps = 3 + resume 3, with dropout; the rates are constant, so max_iters does not move them."""
    changes = {'dropout': 0.1, 'min_lr': 3e-3, 'log_interval': 1, 'eval_interval': 3, **changes}
    start(folder, out_dir='whole', **changes, max_iters=6).ok()
    start(folder, out_dir='a b', **changes, max_iters=3).ok()
    again = start(folder, out_dir='a b', **changes, max_iters=6, init_from='resume').ok()
    state, expected = folder.checkpoint('a b'), folder.checkpoint('whole')
    same_tensors(state['model'], expected['model'])
    for i, moments in expected['optimizer']['state'].items():
        same_tensors(state['optimizer']['state'][i], moments)
    assert state['report'] == expected['report'] and state['best_val_loss'] == expected['best_val_loss']
    assert [record['step'] for record in folder.log('a b') if 'lm_loss' in record] == list(range(6))
    assert json.loads(again.out.splitlines()[-1]) == expected['report']


def test_lora_trains_adapters_and_head_alone(folder):
    """The checkpoint has nothing else, and needs the base model as it was."""
    start(folder, max_iters=40, learning_rate=1e-2, lora_rank=4).ok()
    names = folder.checkpoint()['model'].keys()
    assert {name.split('.')[-1] for name in names} == {'lora_a', 'lora_b', 'weight', 'bias'}
    assert {name for name in names if 'lora' not in name} == {'value_head.weight', 'value_head.bias'}
    model = classify.load(str(folder.path / 'out'))
    base = folder.checkpoint('base')['model']
    assert torch.equal(model.model.state_dict()['transformer.h.0.attn.c_attn.weight'],
                       base['transformer.h.0.attn.c_attn.weight'])
    state = folder.checkpoint('base')
    state['model']['transformer.ln_f.weight'] += 1
    torch.save(state, folder.path / 'base' / 'ckpt.pt')
    with pytest.raises(UserError, match='which has other weights now'):
        classify.load(str(folder.path / 'out'))
    start(folder, init_from='resume', lora_rank=8).refused('lora_rank')


def test_micro_batches_and_processes_are_the_same_step(folder):
    """In losses and gradients; an odd step, so the processes' shares differ."""
    changes = {'max_iters': 4, 'log_interval': 1, 'batch_size': 7}
    start(folder, out_dir='one', **changes).ok()
    start(folder, out_dir='parts', **changes, micro_batch_size=2).ok()
    runs = [start(folder, out_dir='two', **changes, env=env) for env in environments(2)]
    first, second = (run.ok() for run in runs)
    assert second.out == ''
    one, *others = ([[record[key] for key in ('loss', 'lm_loss', 'grad_norm')] for record in folder.log(out_dir)
                     if 'lm_loss' in record] for out_dir in ('one', 'parts', 'two'))
    assert len(one) == 4
    for other in others:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(one), atol=0, rtol=1e-3)
    assert json.loads(first.out.splitlines()[-1])['n'] == folder.checkpoint('one')['report']['n']


def test_the_loss_by_hand():
    """Task loss at the last token alone, and the tokens' loss without padding and first tokens."""
    from chat_models import tiny
    model = classify.add_head(tiny(), 3)
    torch.nn.init.normal_(model.value_head.weight)
    rows, targets = [[1, 2, 3, 4], [5, 6]], torch.tensor([2, 0])
    logits, task_loss, lm_loss = classify.losses_of(model, *classify.to_rows(rows, 'cpu'), targets, True)
    expected_task = expected_lm = 0.0
    for row, target in zip(rows, targets, strict=True):
        idx = torch.tensor([row])
        log_p = model.logits(model.hidden(idx)).log_softmax(-1)[0]
        expected_lm -= sum(log_p[i, row[i + 1]] for i in range(len(row) - 1))
        hidden = model.hidden(idx)[0, -1]
        expected_task -= (hidden @ model.value_head.weight.T).log_softmax(-1)[target]
    torch.testing.assert_close(task_loss, expected_task)
    torch.testing.assert_close(lm_loss, expected_lm)
    assert classify.losses_of(model, *classify.to_rows(rows, 'cpu'), targets, False)[2] == 0


# predicting -----------------------------------------------------------------------------------------------------------

def test_predictions_of_transformers(tmp_path):
    """GPT2ForSequenceClassification with our tokens and its score head gives our probabilities."""
    transformers = pytest.importorskip('transformers')
    from hf_models import GPT2, sharpened

    from flatgpt import huggingface
    config = transformers.GPT2Config(**GPT2, num_labels=3, pad_token_id=299)
    torch.manual_seed(2)
    theirs = sharpened(transformers.GPT2ForSequenceClassification(config))
    causal = transformers.GPT2LMHeadModel(config)
    causal.transformer.load_state_dict(theirs.transformer.state_dict())
    causal.save_pretrained(tmp_path / 'hf')
    ours = classify.add_head(huggingface.load_model(str(tmp_path / 'hf')), 3)
    with torch.no_grad():
        ours.value_head.weight.copy_(theirs.score.weight)
    state = {'version': 1, 'model': ours.state_dict(), 'model_args': vars(ours.config), 'iter_num': 1,
             'best_val_loss': 1.0, 'classes': ['a', 'b', 'c'], 'tokenizer': TOKENIZER.to_dict()}
    (tmp_path / 'out').mkdir()
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    rows = [{'text': text, 'id': i} for i, text in enumerate(['a', 'some words', 'x' * 90, '', 'é'])]
    write(tmp_path / 'in.jsonl', rows)
    predict(Folder(tmp_path)).ok()
    ending = classify.extract_id(TOKENIZER)
    for row, result in zip(rows, read(tmp_path / 'done.jsonl'), strict=True):
        ids = TOKENIZER.encode(row['text'])[-31:] + [ending]  # of 90 letters the end
        expected = theirs(torch.tensor([ids])).logits[0].softmax(-1).tolist()
        assert list(result['probabilities'].values()) == pytest.approx(expected, abs=1e-5)
        assert result['predicted'] == 'abc'[int(np.argmax(expected))]
        assert result['text'] == row['text'] and result['id'] == row['id']


def test_predictions_survive_a_kill(learnt, tmp_path):
    """With other processes too, the lines are those of a run without; labelled lines are measured."""
    folder, _ = learnt
    rows = make_rows(600, seed=7)
    write(tmp_path / 'in.jsonl', rows)
    paths = {'out_dir': folder.path / 'out', 'predict': tmp_path / 'in.jsonl'}
    whole = predict(folder, **paths, out=tmp_path / 'whole.jsonl').ok()
    report, done = json.loads(whole.out.splitlines()[-1]), read(tmp_path / 'whole.jsonl')
    right = sum(row['predicted'] == row['label'] for row in done)
    assert report['n'] == 600 and report['accuracy'] == pytest.approx(right / 600, abs=1e-6) and right > 500
    part = tmp_path / 'killed.jsonl.part'
    run = predict(folder, **paths, out=tmp_path / 'killed.jsonl')
    while not part.exists() or part.read_bytes().count(b'\n') < 40:
        assert run.process.is_alive(), run.out
    run.kill(signal.SIGKILL).wait()
    lines = part.read_bytes()
    runs = [predict(folder, **paths, out=tmp_path / 'killed.jsonl', env=env) for env in environments(2)]
    first, second = (run.ok() for run in runs)
    assert second.out == '' and json.loads(first.out.splitlines()[-1]) == pytest.approx(report, abs=1e-4)
    assert lines.count(b'\n') < 601
    for line, other in zip(read(tmp_path / 'killed.jsonl'), done, strict=True):  # batches round differently
        assert line.pop('probabilities') == pytest.approx(other.pop('probabilities'), abs=1e-5) and line == other
    predict(folder, **paths, out=tmp_path / 'whole.jsonl').refused('whole.jsonl exists already')


@pytest.mark.parametrize('line, said', [
    ('{"label": "a"}', 'in.jsonl, line 2 has no text'), ('{"text": 3}', 'in.jsonl, line 2 has no text'),
    ('{"text": "a", "predicted": 1}', "in.jsonl, line 2: 'predicted' is a key of the results"),
    ('[1]', 'in.jsonl, line 2')])
def test_lines_that_cannot_be_labelled(learnt, tmp_path, line, said):
    (tmp_path / 'in.jsonl').write_text(f'{{"text": "a"}}\n{line}\n')
    predict(learnt[0], predict=tmp_path / 'in.jsonl', out=tmp_path / 'done.jsonl').refused(said)
    assert list(tmp_path.iterdir()) == [tmp_path / 'in.jsonl']
    # a label that is none is found before the first text is read
    (tmp_path / 'in.jsonl').write_text('{"text": "a", "label": "b"}\n{"text": "a", "label": null}\n')
    predict(learnt[0], predict=tmp_path / 'in.jsonl', out=tmp_path / 'done.jsonl').refused('line 2 has null as label')
    assert list(tmp_path.iterdir()) == [tmp_path / 'in.jsonl']


@pytest.mark.parametrize('num_proc', [1, 2])
def test_clean_filters_by_a_classifier(learnt, tmp_path, num_proc):
    """FOLDER:LABEL keeps by --quality what the label says, and drops it by --toxic."""
    folder, _ = learnt
    texts = [row['text'] for row in make_rows(60, seed=3)]
    write_rows(tmp_path / 'in.jsonl', texts)
    model = classify.load(str(folder.path / 'out'))
    scores = [row['vowel'] for row in model.probabilities(texts)]
    name = f'{folder.path / "out"}:vowel'
    for steps, kept in ((clean.Steps(quality=name, quality_min=0.7), [score >= 0.7 for score in scores]),
                        (clean.Steps(toxic=name, toxic_max=0.2), [score <= 0.2 for score in scores])):
        clean.clean_to(tmp_path / 'kept.jsonl', tmp_path / 'in.jsonl', steps, num_proc=num_proc)
        expected = [text for text, is_kept in zip(texts, kept, strict=True) if is_kept]
        assert read_rows(tmp_path / 'kept.jsonl') == expected and 5 < len(expected) < 55
    with pytest.raises(UserError, match="has no label 'good'; expected one of other, vowel"):
        classifier.open_scorer(f'{folder.path / "out"}:good')
    with pytest.raises(UserError, match='is a folder; expected .*out:LABEL'):
        classifier.open_scorer(str(folder.path / 'out'))


# labelled texts -------------------------------------------------------------------------------------------------------

GOOD = [{'text': f'text {i}', 'label': i % 2} for i in range(20)]


def test_a_split_by_hash_keeps_copies_together(tmp_path):
    write(tmp_path / 't.jsonl', GOOD * 2)
    texts = labels.read_labelled(tmp_path / 't.jsonl', '', 0.4)
    train, val = ({text for text, _ in texts.items[split]} for split in ('train', 'val'))
    assert texts.classes == ['0', '1'] and train and val and not train & val
    assert sum(map(len, texts.items.values())) == 40


@pytest.mark.parametrize('rows, val, said', [
    ([*GOOD, {'label': 'a'}], None, 't.jsonl, line 21 has no text, but label; expected {"text"'),
    ([*GOOD, {'text': ' ', 'label': 'a'}], None, 't.jsonl, line 21 has " " as text'),
    ([*GOOD, {'text': 'a', 'label': True}], None, 't.jsonl, line 21 has true as label; expected a text or a whole'),
    ([*GOOD, {'text': 'a', 'label': [1]}], None, 't.jsonl, line 21 has [1] as label'),
    (GOOD[::2], None, "t.jsonl: all texts to learn from have the label '0'; expected two"),
    (GOOD[:1], None, 't.jsonl: val has no text'),
    (GOOD, [GOOD[3]], "v.jsonl, line 1 has the text of"),
    (GOOD, [{'text': 'new', 'label': 'x'}], "v.jsonl, line 1 has the label 'x', which no text to learn from has; "
                                            'expected one of 0, 1'),
    (GOOD, [], 'val has no text')])
def test_refused_texts(tmp_path, rows, val, said):
    write(tmp_path / 't.jsonl', rows)
    write(tmp_path / 'v.jsonl', val or [])
    with pytest.raises(UserError, match=re.escape(said)):
        labels.read_labelled(tmp_path / 't.jsonl', tmp_path / 'v.jsonl' if val is not None else '', 0.1)


@pytest.mark.parametrize('changes, said', [
    ({'data': ''}, ["data='', predict='', out='': expected --data=FILE.jsonl to train"]),
    ({'predict': 'in.jsonl'}, ['expected --data=FILE.jsonl to train, or --predict=IN.jsonl']),
    ({'init_from': 'resume'}, ['no checkpoint at out/ckpt.pt']),
    ({'out_dir': 'base'}, ["out_dir='base': expected another folder"]),
    ({'lora_rank': 2, 'optimizer': 'muon'}, ['does not fit LoRA']),
    ({'lora_alpha': 2.0}, ['lora_alpha needs --lora_rank']),
    ({'min_lr': 1.0}, ['min_lr=1.0: expected at most learning_rate']),
    ({'learning_rate': 1e30, 'warmup_iters': 0, 'grad_clip': 0.0}, ['Stopped without saving'])])
def test_refused_settings(folder, changes, said):
    start(folder, **changes).refused(*said)
    assert not (folder.path / 'out' / 'ckpt.pt').exists()


def test_goes_on_with_the_same_texts(folder):
    start(folder, max_iters=1).ok()
    start(folder, init_from='resume', optimizer='muon').refused("out/ckpt.pt is that of 'adamw'")
    start(folder, init_from='resume', val_fraction=0.3).refused('are not those of out/ckpt.pt')
    start(folder, init_from='resume', out_dir='base', data='texts.jsonl').refused(
        'base/ckpt.pt is a language model; expected a classifier')


@pytest.mark.parametrize('change, said', [
    (lambda state: state.update(classes='ab'), 'classes'), (lambda state: state['classes'].append('x'), 'value_head.weight has shape'),
    (lambda state: state['model'].pop('value_head.bias'), 'value_head.bias has shape'),
    (lambda state: state['model']['value_head.weight'].fill_(np.nan), 'NaN or infinity')])
def test_damaged_classifiers(learnt, tmp_path, change, said):
    state = learnt[0].checkpoint()
    change(state)
    torch.save(state, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=said):
        classify.load(str(tmp_path))


# measures -------------------------------------------------------------------------------------------------------------

def test_measures_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.35, 0.65], [0.95, 0.05]])
    measures = labels.report(probabilities, np.array([0, 0, 1, 1]))
    assert measures['accuracy'] == 0.75 and measures['balanced_accuracy'] == 0.75 and measures['majority'] == 0.5
    # bins of 1/15: 0.9 in 13, 0.8 in 12 (right), 0.65 in 9 (right), 0.95 in 14 (wrong)
    assert measures['ece'] == pytest.approx((0.1 + 0.2 + 0.35 + 0.95) / 4)


@pytest.mark.parametrize('excess, least', [(0.0, 24), (0.05, 36), (0.1, 35)])
def test_the_interval_of_the_calibration_error_holds_the_true_one(excess, least):
    """In most of 40 samples; a calibrated model's error is that by chance, an overconfident one's is larger."""
    rng, n_inside, errors, chances = np.random.default_rng(0), 0, [], []
    for sample in range(40):
        confidences = rng.uniform(0.6, 1.0, 500)
        right = rng.random(500) < confidences - excess
        error, low, high, chance = labels.calibration_error(confidences, right, sample)
        n_inside += low <= excess <= high
        errors.append(error)
        chances.append(chance)
    assert n_inside >= least
    assert (np.mean(errors) == pytest.approx(np.mean(chances), rel=0.1)) == (excess == 0)
