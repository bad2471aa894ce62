"""Samples, tasks and numbered checkpoints of train.py while it trains. Run: pytest tests/test_train_samples.py"""

import json
import os
import re
import signal

import pytest
import torch
from conftest import CHARS, make_text, same_state, same_tensors

from configurator import UserError, printable
from flatgpt import outdir
from posttrain.evaluation import parse

WATCH = {'sample_every': 3, 'sample_tokens': 40, 'sample_prompt': 'the', 'keep_every': 4, 'eval_tasks': 'next:2',
         'eval_examples': 30}
# a task in the characters of the tiny dataset: which letter follows?
TASK = '''
import random
from posttrain.tasks.common import split_of

def examples(split, n, seed=0, input='', kinds=()):
    if input:
        words = open(input).read().split()
    else:
        words = random.Random(f'{split} {seed}').choices(['th', 'ca', 'ma', 'de', 'wh'], k=n)
    after = {'th': 'e', 'ca': 't', 'ma': 't', 'de': 'n', 'wh': 'o'}
    return [{'messages': [], 'context': word, 'solution': after[word], 'answer': after[word], 'kind': 'letter'}
            for word in words[:n]]

def extract(text):
    return text[:1] or None

def evaluate(example, text):
    return example['answer'] in text[:3]

def reward(example, text):
    return float(evaluate(example, text))
'''


@pytest.fixture
def asked(folder):
    """The folder of a run that can be asked the task."""
    (folder.path / 'tasks').mkdir()
    (folder.path / 'tasks' / 'next.py').write_text(TASK)
    return folder


def samples(folder, out_dir='out'):
    return [json.loads(line) for line in (folder.path / out_dir / 'samples.jsonl').read_text().splitlines()]


def logged(folder, out_dir):
    """The log without times and accuracies."""
    return [{key: value for key, value in line.items() if key in ('step', 'loss', 'grad_norm', 'train_loss', 'val_loss')}
            for line in folder.log(out_dir)]


def test_watching_changes_no_bit(asked):
    """Losses and checkpoints are those of a run without samples, tasks and numbered checkpoints, with dropout too."""
    asked.train(dropout=0.2, out_dir='plain').ok()
    asked.train(**WATCH, dropout=0.2, out_dir='watched').ok()
    same_state(asked.checkpoint('plain'), asked.checkpoint('watched'))
    assert logged(asked, 'plain') == logged(asked, 'watched')
    # and of one that was stopped and resumed
    asked.train(**WATCH, dropout=0.2, out_dir='resumed', max_iters=7).ok()
    asked.train(**WATCH, dropout=0.2, out_dir='resumed', init_from='resume').ok()
    same_state(asked.checkpoint('plain'), asked.checkpoint('resumed'))
    assert [line['step'] for line in samples(asked, 'resumed')] == [0, 3, 6, 7, 9, 12, 15, 18, 20]
    by_step = {line['step']: line for line in samples(asked, 'resumed')}
    assert all(by_step[line['step']] == line for line in samples(asked, 'watched'))


@pytest.mark.parametrize('changes', [{'dataset': 'stories', 'documents': 'mask', 'preset': 'modern'}, {'init_from': 'base', 'lora_rank': 2},
                                     {'recompute': 'block', 'optimizer': 'muon'}])
def test_watching_other_models_changes_no_bit(asked, changes):
    if 'lora_rank' in changes:
        asked.train(out_dir='base', preset='llama', max_iters=3).ok()
    if 'documents' in changes:
        (asked.path / 'stories').mkdir()
        for seed in range(60):
            (asked.path / f'stories/{seed}.txt').write_text(make_text(80, seed))
        asked.start('data/text/prepare.py', input='stories', out_dir='data/stories', tokenizer='byte',
                    val_fraction=0.3).ok()
    asked.train(**changes, dropout=0.1, max_iters=8, out_dir='plain').ok()
    asked.train(**{**WATCH, **changes}, dropout=0.1, max_iters=8, out_dir='watched').ok()
    same_state(asked.checkpoint('plain'), asked.checkpoint('watched'))
    assert len(samples(asked, 'watched')) == 4


@pytest.mark.slow
def test_watching_a_compiled_step_changes_no_bit(asked):
    asked.train(dropout=0.2, compile=True, out_dir='plain').wait(240).ok()
    asked.train(**WATCH, dropout=0.2, compile=True, out_dir='watched').wait(240).ok()
    same_state(asked.checkpoint('plain'), asked.checkpoint('watched'))


@pytest.mark.slow
def test_two_processes_watch(asked):
    """The main process samples, both answer questions, and nothing changes."""
    asked.train_two(dropout=0.2, out_dir='plain')
    run = asked.train_two(**WATCH, dropout=0.2, out_dir='watched')
    same_state(asked.checkpoint('plain'), asked.checkpoint('watched'))
    assert run.out.count('a sample at step') == len(samples(asked, 'watched')) == 8
    asked.train(**WATCH, out_dir='alone', max_iters=1).ok()
    assert samples(asked, 'alone')[0] == samples(asked, 'watched')[0]
    assert asked.log('alone')[0]['next:2'] == asked.log('watched')[0]['next:2']


def test_samples(folder):
    """One at each multiple and at the end; the last is what sample.py draws first, and each is printed."""
    run = folder.train(sample_every=6, sample_tokens=30, sample_prompt='the').ok()
    lines = samples(folder)
    assert [line['step'] for line in lines] == [0, 6, 12, 18, 20]
    assert all(list(line) == ['step', 'prompt', 'text'] and line['prompt'] == 'the' and len(line['text']) == 30
               for line in lines)
    assert len({line['text'] for line in lines}) > 3
    drawn = folder.sample(which='last', start='the', max_new_tokens=30, num_samples=1, slide=2).ok().out
    assert drawn.endswith(f'\nthe{lines[-1]["text"]}\n---------------\n')
    shown = re.findall(r'a sample at step (\d+):\n-{15}\nthe(.{30})\n-{15}\n', run.out, re.S)
    assert shown == [(str(line['step']), line['text']) for line in lines]
    folder.train(out_dir='default', sample_every=10, max_iters=1).ok()
    assert [len(line['text']) for line in samples(folder, 'default')] == [200, 200]


def test_samples_of_a_killed_run(folder):
    """Lines after the checkpoint, and half a line, go; the file is that of a run without the kill."""
    changes = {'sample_every': 5, 'sample_tokens': 10, 'max_iters': 30, 'lr_decay_iters': 30}
    folder.train(**changes, out_dir='whole').ok()
    folder.train(**changes).ok()
    path = folder.path / 'out' / 'samples.jsonl'
    whole = path.read_bytes()
    folder.train(**{**changes, 'max_iters': 10}).ok()  # the checkpoint that a kill after step 30 would leave
    path.write_bytes(whole + b'{"step": 35, "prompt": "\\n", "te')
    folder.train(**changes, init_from='resume').ok()
    assert path.read_bytes() == whole == (folder.path / 'whole' / 'samples.jsonl').read_bytes()


@pytest.mark.slow
def test_samples_of_runs_killed_anywhere(folder):
    """A reader finds whole lines at any time, and in the end each sample once."""
    changes = {'sample_every': 1, 'sample_tokens': 5, 'max_iters': 60, 'eval_interval': 7, 'init_from': 'auto'}
    folder.train(**changes, out_dir='whole').ok()
    for step in (3, 9, 20, 33, 47):
        run = folder.start_train(**changes)
        run.wait_for(rf'a sample at step {step}:')
        run.kill(signal.SIGKILL).wait()
        assert all(line['text'] for line in samples(folder))
    folder.train(**changes).ok()
    assert samples(folder) == samples(folder, 'whole')


def test_sample_of_conversations(folder):
    """The prompt is a user's message, and the sample its answer."""
    talks = [{'messages': [{'role': 'user', 'content': f'Say {word}'}, {'role': 'assistant', 'content': word}]}
             for word in make_text(400).split()]
    (folder.path / 'talks.jsonl').write_text(''.join(json.dumps(talk) + '\n' for talk in talks))
    (folder.path / 'plain.jinja').write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    folder.start('data/chat/prepare.py', input='talks.jsonl', tokenizer='byte', block_size=64, val_fraction=0.2,
                 out_dir='data/talks', template='plain.jinja').ok()
    changes = {'dataset': 'talks', 'block_size': 64, 'sample_every': 20, 'sample_tokens': 20,
               'sample_prompt': 'Say cat'}
    run = folder.train(**changes).ok()
    last = samples(folder)[-1]
    assert last['prompt'] == 'Say cat' and printable(f'User: Say cat\nAssistant: {last["text"]}\n---') in run.out
    drawn = folder.sample(which='last', start='user: Say cat\nassistant: ', num_samples=1, max_new_tokens=20,
                          slide=8).ok().out
    assert drawn.endswith(f'\nassistant: {last["text"]}\n---------------\n')
    # a run that samples once, at its end
    run = folder.train(**{**changes, 'sample_every': 0}, init_from='resume').ok()
    assert printable(f'User: Say cat\nAssistant: {last["text"]}\n---') in run.out


def test_tasks(asked):
    """The accuracy is that of eval.py on the same questions and shots, in the log and in the line."""
    (asked.path / 'words.txt').write_text('th ca de ' * 8)
    run = asked.train(max_iters=100, lr_decay_iters=100, eval_interval=50, n_embd=32, eval_examples=40,
                      eval_tasks='next:2, next:0, next:1=words.txt').ok()
    evaluations = [line for line in asked.log() if 'val_loss' in line]
    assert [line['step'] for line in evaluations] == [0, 50, 100]
    last = evaluations[-1]
    for key, more in (('next:2', {'split': 'val'}), ('next:0', {'split': 'val'}), ('next:1', {'input': 'words.txt'})):
        evaluated = asked.start('eval.py', which='last', task='next', shots=key[-1], n=40, max_new_tokens=8, device='cpu',
                                **more).ok().out
        assert json.loads(evaluated.splitlines()[-1])['accuracy'] == last[key]
    assert re.search(rf'step 100: .*, next:2 {last["next:2"]:.1%}, next:0 .*%, next:1 .*%\n', run.out)
    assert 0.2 < last['next:2'] and evaluations[0]['next:2'] < last['next:2']
    asked.train(init_from='resume', max_iters=100, lr_decay_iters=100, n_embd=32, eval_only=True, eval_examples=40,
                eval_tasks='next:2').ok()


def test_parse_tasks():
    assert parse('') == {}
    assert parse('tiny_chat:4') == {'tiny_chat:4': ('tiny_chat', 4, '')}
    assert parse('a, b:0=x:y=z.jsonl,b:1') == {'a': ('a', None, ''), 'b:0': ('b', 0, 'x:y=z.jsonl'), 'b:1': ('b', 1, '')}
    for wrong in ('a:', ':4', 'a:b', 'a,', 'a b', 'a:-1'):
        with pytest.raises(UserError, match='expected NAME, NAME:SHOTS or NAME:SHOTS=FILE'):
            parse(wrong)
    with pytest.raises(UserError, match='names a:4 twice'):
        parse('a:4,a:4')


def test_numbered_checkpoints(folder):
    """Each is the state of a run of so many steps, and --which opens it."""
    run = folder.train(keep_every=5, eval_interval=10, sample_prompt='the').ok()
    out = folder.path / 'out'
    assert outdir.kept_steps(out) == [5, 10, 15, 20]
    assert re.findall(r'saved out/ckpt.pt at step (\d+)(?: \(best so far\))?, kept as ckpt-(\d+).pt', run.out) == [
        (step, step) for step in ('5', '10', '15', '20')]
    assert os.path.samefile(out / 'ckpt-20.pt', out / 'ckpt.pt')
    for step in (5, 15):
        folder.train(max_iters=step, out_dir='short', eval_interval=5).ok()
        same_tensors(folder.checkpoint('short')['model'], folder.checkpoint(name=f'ckpt-{step}.pt')['model'])
        short = folder.sample(out_dir='short', which='last', num_samples=1, max_new_tokens=9).ok().out
        kept = folder.sample(which=step, num_samples=1, max_new_tokens=9).ok().out
        assert f'out/ckpt-{step}.pt: step {step}' in kept and kept.splitlines()[-3:] == short.splitlines()[-3:]
    folder.sample(which=7).refused('which=7: out has no checkpoint of this step', 'one of its steps: 5, 10, 15, 20')
    folder.sample(which=7, out_dir='short').refused('one of its steps: none, train with --keep_every=N')
    assert 'out/ckpt-5.pt: step 5' in folder.start('eval.py', which=5, device='cpu').ok().out
    folder.start('flatgpt.export', which=5, out='exported').ok()


def test_numbered_checkpoints_between_saves(folder):
    """They are written where no evaluation is and val loss rises, and the run resumes from the last."""
    run = folder.train(keep_every=6, eval_interval=20, eval_first=False, always_save_checkpoint=False, max_iters=13,
                       learning_rate=0.0, min_lr=0.0).ok()
    assert outdir.kept_steps(folder.path / 'out') == [6, 12] and 'ckpt.pt at step 13' in run.out
    changes = {'keep_every': 6, 'max_iters': 20}
    folder.train(out_dir='whole', max_iters=20).ok()
    run = folder.start_train(**changes, out_dir='killed')
    run.wait_for('saved killed/ckpt.pt at step 12')
    run.kill(signal.SIGKILL).wait()
    folder.train(**changes, out_dir='killed', init_from='resume').ok()
    same_state(folder.checkpoint('whole'), folder.checkpoint('killed'))
    assert outdir.kept_steps(folder.path / 'killed') == [6, 12, 18]
    assert [line['step'] for line in folder.log('killed') if 'loss' in line] == list(range(20))


def test_all_files_of_an_earlier_run_are_moved(folder):
    folder.train(keep_every=5, sample_every=10, max_iters=10).ok()
    before = {path.name: path.read_bytes() for path in (folder.path / 'out').iterdir()}
    assert {'ckpt-5.pt', 'ckpt-10.pt', 'samples.jsonl'} < before.keys()
    folder.train(max_iters=2).ok()
    moved = folder.path / 'out' / 'previous-1'
    assert {path.name: path.read_bytes() for path in moved.iterdir()} == before
    assert sorted(os.listdir(folder.path / 'out')) == ['best.pt', 'ckpt.pt', 'config.json', 'log.jsonl', 'previous-1']


def test_damaged_numbered_checkpoint(folder):
    folder.train(keep_every=5, max_iters=5).ok()
    path = folder.path / 'out' / 'ckpt-5.pt'
    path.unlink()
    path.write_bytes(b'PK')
    folder.sample(which=5).refused('out/ckpt-5.pt is damaged', '--which=last')


@pytest.mark.parametrize('changes, said', [
    ({'sample_every': 5, 'sample_prompt': '@'}, "'@'"), ({'sample_every': 5, 'sample_prompt': ''}, 'the prompt is empty'),
    ({'sample_every': -1}, 'sample_every=-1: expected 0 or more'), ({'keep_every': 0.5}, 'keep_every=0.5'),
    ({'eval_tasks': 'nope:4'}, "there is no task 'nope'"), ({'eval_tasks': 'tiny_chat=x'}, 'leave it out'),
    ({'eval_tasks': 'hellaswag:0'}, 'name a file'), ({'eval_tasks': 'tiny_chat:4'}, 'tiny'),
])
def test_refused_before_the_first_step(folder, changes, said):
    run = folder.train(**changes).refused(said)
    assert 'iter 0' not in run.out and not (folder.path / 'out').exists()


def test_shards_are_not_sampled(folder):
    for run in folder.start_two(shard='full', sample_every=5):
        run.refused('sample_every: a process has a part of the model alone', '--keep_every=N')


@pytest.mark.slow
def test_numbered_shards_stay(folder):
    """A folder of shards that a numbered checkpoint names is not removed, and it opens."""
    folder.train_two(shard='full', keep_every=5, eval_interval=10)
    assert {path.name for path in (folder.path / 'out').glob('shards-*')} == {f'shards-{n}' for n in (5, 10, 15, 20)}
    folder.train(out_dir='short', max_iters=5).ok()
    sampling = {'num_samples': 1, 'max_new_tokens': 9, 'temperature': 0}
    kept = folder.sample(which=5, **sampling).ok().out
    assert kept.splitlines()[-3:] == folder.sample(out_dir='short', which='last', **sampling).ok().out.splitlines()[-3:]
    folder.train(max_iters=1).ok()
    assert len(list((folder.path / 'out' / 'previous-1').glob('shards-*'))) == 4


def test_put_aside_the_best_alone(tmp_path):
    """Numbered checkpoints stay."""
    for name in ('ckpt.pt', 'best.pt', 'ckpt-5.pt', 'samples.jsonl'):
        torch.save({'name': name}, tmp_path / name)
    moved = outdir.put_aside(str(tmp_path), best_alone=True)
    assert os.listdir(moved) == ['best.pt']
    moved = outdir.put_aside(str(tmp_path))
    assert sorted(os.listdir(moved)) == ['ckpt-5.pt', 'ckpt.pt', 'samples.jsonl']


@pytest.mark.parametrize('step, kept', [(0, []), (4, [0, 2]), (5, [0, 2, 5]), (7, [0, 2, 5])])
def test_keep_lines_of_samples(tmp_path, step, kept):
    """A sample at step n precedes the checkpoint of step n; a run from scratch samples at step 0 itself."""
    path = tmp_path / 'samples.jsonl'
    path.write_text(''.join(json.dumps({'step': n, 'prompt': '', 'text': CHARS[n]}) + '\n' for n in (0, 2, 5, 8)))
    outdir.keep_lines_until(str(path), step)
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == kept
