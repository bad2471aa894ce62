"""lab/state_of_gpt.py: every stage of it, in small; and that it goes on where it was."""

import json
import os
import signal

import pytest

from configurator import UserError
from flatgpt import checkpoint
from lab import course

TINY = {'share': 0.01, 'n': 14, 'num_samples': 2, 'n_layer': 1, 'n_embd': 16, 'out': 'out'}


@pytest.mark.slow
def test_all_stages(folder):
    """
    They end in a table, a picture and numbers; a second time nothing is left to do but these. Stopped on the way, it
    goes on.
    """
    stopped = folder.start('lab.state_of_gpt', **TINY)
    stopped.wait_for(r'== sft =[\s\S]*step 0: train loss', timeout=900)
    stopped.kill(signal.SIGTERM).refused('stopped; the same command goes on from there:', 'saved out/state_of_gpt/sft/')
    run = folder.start('lab.state_of_gpt', **TINY).wait(timeout=900)
    assert run.code == 0, run.out
    assert '== base' not in run.out
    home = folder.path / 'out' / 'state_of_gpt'
    stages = json.loads((home / 'stages.json').read_text())
    for name, record in stages.items():
        assert f'== {name} ' in stopped.out + run.out and record['seconds'] > 0
        assert (record['found'] is not None) == name.startswith('ask')
        assert record['found'] is None or record['found']['n'] == 14
    *_, table = run.out.partition('14 held-out questions')
    assert all(f'\n{title} ' in table for title in ('base', 'base, 4 examples', 'SFT', 'SFT, vote of 2', 'PPO', 'GRPO'))
    assert max(map(len, table.splitlines())) <= 80
    figures = json.loads((folder.path / 'out' / 'state_of_gpt.json').read_text())
    assert [right for _, right, n in figures['rows'] if not 0 <= right <= n == 14] == []
    assert (folder.path / 'out' / 'state_of_gpt.png').stat().st_size > 10_000

    # stopped while it learnt: that stage goes on, those before it are not run again
    stages['grpo']['seconds'] = None
    del stages['ask grpo']
    (home / 'stages.json').write_text(json.dumps(stages))
    again = folder.start('lab.state_of_gpt', **TINY).wait(timeout=900)
    assert again.code == 0, again.out
    assert 'What is 58 + 67?' in run.out  # in the chat
    assert '== grpo' in again.out and '== ask grpo' in again.out and '--init_from=resume' in again.out
    assert '== ppo' not in again.out and '== data' not in again.out
    assert json.loads((folder.path / 'out' / 'state_of_gpt.json').read_text())['rows'] == figures['rows']


@pytest.mark.parametrize('settings, said', [
    ({'n': 3}, 'n=3: expected 7 or more'), ({'num_samples': 1}, 'num_samples=1: expected 2 or more'),
    ({'share': 0.0}, 'share=0.0: expected above 0'), ({'seed': -1}, 'seed=-1: expected at least 0')])
def test_refused(folder, settings, said):
    folder.start('lab.state_of_gpt', out='out', **settings).refused(said)
    assert not os.path.exists(folder.path / 'out' / 'state_of_gpt' / 'stages.json')


def test_another_setting_runs_what_depends_on_it(tmp_path, monkeypatch):
    """A stage whose command or recipe is another one is run again, and so is what builds on it, and nothing else."""
    monkeypatch.chdir(tmp_path)
    ran, recipes, is_whole, changed = [], [], True, []

    def run_all(**settings):
        made = course.Course('.', **settings)
        monkeypatch.setattr(course, 'run', lambda name, command, can_resume: ran.append((name, can_resume)))
        monkeypatch.setattr(course, 'is_whole', lambda folder: is_whole)
        ran.clear()
        made.run_stages(made.stages())
        return [name for name, _ in ran]

    def recipe(path):
        recipes.append(os.path.basename(path))
        return recipes[-1] in changed

    monkeypatch.setattr('data.download.file_sha256', recipe)
    first = run_all()
    assert recipes == [*['prepare.py', 'tiny_chat.py'] * 2, 'tiny_web.py', 'sft_tiny_chat.py', 'reward_tiny_chat.py',
                       'ppo_tiny_chat.py', 'grpo_tiny_chat.py']
    assert first[0] == 'data' and first[-2:] == ['ask grpo', 'chat'] and len(first) == len(set(first))
    assert run_all() == []
    assert run_all(num_samples=4) == ['ask sft, samples']
    assert run_all(num_samples=4, n=70) == [name for name in first if name.startswith('ask')]
    changed.append('reward_tiny_chat.py')
    assert run_all(num_samples=4, n=70) == ['reward', 'ask sft, samples', 'ppo', 'ask ppo']
    (tmp_path / 'state_of_gpt' / 'sft').mkdir()
    (tmp_path / 'state_of_gpt' / 'sft' / 'ckpt.pt').touch()
    changed.append('sft_tiny_chat.py')  # the run before is put aside, and its checkpoint not gone on from
    assert run_all(num_samples=4, n=70) == first[first.index('sft') :]
    assert not any(can_resume for _, can_resume in ran)
    assert os.listdir(tmp_path / 'state_of_gpt' / 'sft' / 'previous-1') == ['ckpt.pt']
    assert run_all(num_samples=4, n=70, n_layer=2) == first[first.index('base') :]

    # a stage that was stopped ends without an error; it goes on where it saved, if it had
    stages = json.loads((tmp_path / 'state_of_gpt' / 'stages.json').read_text())
    stages['sft']['seconds'] = None
    for n_checkpoints in range(2):
        (tmp_path / 'state_of_gpt' / 'stages.json').write_text(json.dumps(stages))
        assert run_all(num_samples=4, n=70, n_layer=2) == first[first.index('sft') :]
        assert dict(ran)['sft'] == bool(n_checkpoints)
        (tmp_path / 'state_of_gpt' / 'sft' / 'ckpt.pt').touch()
    (tmp_path / 'state_of_gpt' / 'stages.json').write_text(json.dumps(stages))
    is_whole = False
    with pytest.raises(UserError, match="'sft' was stopped; the same command goes on"):
        run_all(num_samples=4, n=70, n_layer=2)
    assert [name for name, _ in ran] == ['sft']
    is_whole = True
    assert run_all(num_samples=4, n=70, n_layer=2) == first[first.index('sft') :]


def test_is_whole(tmp_path):
    checkpoint.save(str(tmp_path), {'model': {}, 'model_args': {}, 'iter_num': 3, 'best_val_loss': 1.0}, is_best=False)
    for max_iters, is_whole in ((3, True), (4, False)):
        (tmp_path / 'config.json').write_text(json.dumps({'max_iters': max_iters}))
        assert course.is_whole(tmp_path) == is_whole
