"""lab/course.py: models are made once, with what they build on, and shared."""

import json

import pytest

from configurator import UserError
from flatgpt import files
from lab import course

TALKS = [{'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]}]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A course whose stages only note their names, and these names."""
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(course, 'run', lambda name, command, can_resume: ran.append(name))
    return course.Course(), ran


def test_makes_what_a_model_builds_on(made):
    lab, ran = made
    assert lab.make('grpo') == {'grpo': 'out-lab/state_of_gpt/grpo'}
    assert ran == ['data', 'texts', 'base', 'sft', 'grpo']
    lab.make('sft', 'grpo', 'ppo')
    assert ran[5:] == ['reward', 'ppo']


def test_finetune_runs_again_for_other_conversations(made):
    lab, ran = made
    assert lab.finetune('reader', 'base', TALKS, max_iters=100) == 'out-lab/state_of_gpt/reader'
    assert ran == ['data', 'texts', 'base', 'reader-data', 'reader']
    lab.finetune('reader', 'base', TALKS, max_iters=100)
    assert len(ran) == 5
    lab.finetune('reader', 'base', TALKS, max_iters=200)
    assert ran[5:] == ['reader']
    lab.finetune('reader', 'base', TALKS * 2, max_iters=200)
    assert ran[6:] == ['reader-data', 'reader']
    path = lab.home + '/stages.json'
    with open(path, encoding='utf-8') as file:
        stages = json.load(file)
    stages['texts']['recipe'] = []
    files.replace_file(path, json.dumps(stages).encode())
    lab.make('base')  # it is outdated, and so is what builds on it
    assert ran[8:] == ['texts', 'base']
    lab.finetune('reader', 'base', TALKS * 2, max_iters=200)
    assert ran[10:] == ['reader-data', 'reader']


def test_a_stage_runs_again_for_other_rows(made):
    lab, ran = made
    for label in ('a', 'a', 'b'):
        path = lab.write('rows.jsonl', [{'text': 'x', 'label': label}])
        lab.run_stages([('guard', lab.script('posttrain.classify', data=path, out_dir=lab.folder('guard')))])
    assert ran == ['guard', 'guard']


def test_share_scales_the_steps_given(made):
    lab = course.Course(share=0.5)
    command = lab.learn('train.py', 'sft_tiny_chat.py', 'base', max_iters=100)
    assert '--max_iters=50' in command


def test_two_do_not_make_models_at_once(made):
    lab, ran = made
    lab.make('data')
    lock = files.lock_folder(lab.home)
    with pytest.raises(UserError, match='another process is making models in'):
        lab.make('base')
    files.unlock(lock)
    assert ran == ['data']


def test_results_of_another_command_are_removed(tmp_path):
    """Those of a stage that was stopped remain."""
    out, part = tmp_path / 'a.jsonl', tmp_path / 'a.jsonl.part'
    for was_begun in (True, False):
        out.touch()
        part.touch()
        course.remove_results(['python', f'--out={out}'], was_begun)
        assert not out.exists() and part.exists() == was_begun
    course.remove_results(['python', f'--out={out}', '--seed=1'], False)  # there is nothing
