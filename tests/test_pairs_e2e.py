"""python -m posttrain.pairs: own data from own samples. Run: pytest tests/test_pairs_e2e.py"""

import json
import signal
import time
from collections import Counter

import pytest
from chat_models import make_chats, save_chat_model
from conftest import environments

from tokenizer import chat

SMALL = {'init_from': 'chat', 'task': 'vowels', 'out': 'out.jsonl', 'n': 30, 'max_new_tokens': 12, 'device': 'cpu'}
END_LIKELY = {'words': ['<|im_end|>']}  # so that most answers are whole


@pytest.fixture
def chats(tmp_path):
    folder = make_chats(tmp_path)
    save_chat_model(tmp_path, 'brief', **END_LIKELY)
    return folder


def start(folder, **changes):
    settings = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    return folder.start('posttrain.pairs', typed=settings.pop('typed', None), **settings)


def lines_of(folder, name='out.jsonl'):
    return [json.loads(line) for line in (folder.path / name).read_text().splitlines()]


def share(text):
    return sum(char in 'aeiou' for char in text) / len(text)


def test_pairs_of_the_verifier(chats):
    """Right before wrong, at most two of a prompt, and those of each answer alone, whatever the batch or n."""
    run = start(chats, num_samples=16, per_prompt=2, temperature=0.9).ok()
    pairs = lines_of(chats)
    assert f'out.jsonl: {len(pairs)} pairs' in run.out and 'posttrain.dpo --init_from=chat --pairs=out.jsonl' in run.out
    assert all(share(pair['chosen']) > 0.5 >= share(pair['rejected']) for pair in pairs)
    of_prompts = Counter(pair['messages'][0]['content'] for pair in pairs)
    assert 3 < len(of_prompts) < 30 and max(of_prompts.values()) <= 2
    assert all(content.startswith('t ') for content in of_prompts)  # questions of train
    assert all(len(pair['chosen']) < 12 and len(pair['rejected']) < 12 for pair in pairs)  # none is cut off
    start(chats, num_samples=16, per_prompt=2, temperature=0.9, batch_size=1, n=12, out='fewer.jsonl').ok()
    fewer = [pair for pair in pairs if int(pair['messages'][0]['content'][2:]) < 12]
    assert fewer and lines_of(chats, 'fewer.jsonl') == fewer
    start(chats, num_samples=16).refused('out.jsonl exists already')
    start(chats, num_samples=16, seed=2, out='other.jsonl').ok()
    assert lines_of(chats, 'other.jsonl') != pairs
    kw = {'init_from': 'chat', 'max_iters': 1, 'device': 'cpu', 'val_fraction': 0.5}
    chats.start('posttrain.reward', **kw, data='out.jsonl', out_dir='judge', batch_size=2).ok()
    chats.start('posttrain.dpo', **kw, pairs='out.jsonl', out_dir='dpo', prompts_per_step=2).ok()


def test_two_processes_write_what_one_writes(chats):
    start(chats).ok()
    runs = [chats.start('posttrain.pairs', **{**SMALL, 'out': 'two.jsonl'}, env=env) for env in environments(2)]
    assert [run.wait().code for run in runs] == [0, 0], [run.out for run in runs]
    assert lines_of(chats, 'two.jsonl') == lines_of(chats)


def test_killed_and_resumed(chats):
    kw = {'n': 60, 'batch_size': 8, 'temperature': 0.95}
    start(chats, **kw, out='whole.jsonl').ok()
    run, part = start(chats, **kw), chats.path / 'out.jsonl.part'
    while not part.exists() or part.read_bytes().count(b'\n') < 9:
        assert run.process.is_alive(), run.out
        time.sleep(0.005)
    run.kill(signal.SIGKILL).wait()
    assert not (chats.path / 'out.jsonl').exists()
    start(chats, **{**kw, 'temperature': 1.0}).refused('has results of other prompts, settings or another model')
    start(chats, **{**kw, 'init_from': 'brief'}).refused('another model')
    start(chats, **{**kw, 'batch_size': 16}).ok()
    assert lines_of(chats) == lines_of(chats, 'whole.jsonl') and not part.exists()


def test_conversations_to_finetune_on(chats):
    """The right answers, without duplicates; data/chat/prepare.py reads them."""
    start(chats, init_from='brief', write='sft', num_samples=24, per_prompt=3).ok()
    talks = lines_of(chats)
    answers = Counter((talk['messages'][0]['content'], talk['messages'][1]['content']) for talk in talks)
    assert set(answers.values()) == {1} and all(share(text) > 0.5 for _, text in answers)
    of_prompts = Counter(content for content, _ in answers)
    assert max(of_prompts.values()) == 3
    assert all(list(talk) == ['messages'] and talk['messages'][1]['role'] == 'assistant' for talk in talks)
    start(chats, init_from='brief', write='sft', num_samples=24, per_prompt=3, skip_equal=True, out='hard.jsonl').ok()
    assert lines_of(chats, 'hard.jsonl') == talks  # each prompt has a wrong answer
    start(chats, init_from='brief', write='sft', num_samples=1, n=60, out='one.jsonl').ok()
    assert lines_of(chats, 'one.jsonl')
    start(chats, init_from='brief', write='sft', num_samples=1, n=60, skip_equal=True, out='none.jsonl').refused(
        'the answers make no conversations')
    chats.start('data/chat/prepare.py', input='out.jsonl', tokenizer='brief', out_dir='talks', val_fraction=0.2).ok()


def test_a_reward_model_judges(chats):
    """It has learned that vowels are better; prompts come from a file."""
    chats.start('posttrain.reward', init_from='chat', data='pairs.jsonl', out_dir='judge', max_iters=60, batch_size=8,
                learning_rate=3e-3, warmup_iters=2, device='cpu', dtype='float32').ok()
    rows = [{'prompt': '7', 'group': 'a'}, {'messages': [{'role': 'user', 'content': '8'}]}, {'prompt': 'x' * 30}]
    (chats.path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    kw = {'task': None, 'input': 'in.jsonl', 'judge': 'reward', 'reward_model': 'judge', 'num_samples': 32}
    run = start(chats, **kw, per_prompt=2).ok()
    assert '1 of 3 prompts are longer than the 20 tokens that an answer leaves, left out' in run.out
    pairs = lines_of(chats)
    assert [pair.get('group') for pair in pairs] == ['a', 'a', None, None]
    assert [pair['messages'][0]['content'] for pair in pairs] == ['7', '7', '8', '8']
    assert all(share(pair['chosen']) > share(pair['rejected']) for pair in pairs)
    start(chats, **kw, write='sft', out='talks.jsonl').ok()
    assert [talk['messages'][1]['content'] for talk in lines_of(chats, 'talks.jsonl')] == [
        pairs[0]['chosen'], pairs[2]['chosen']]
    save_chat_model(chats.path, 'stranger', chat_template='{# other #}' + chat.TEMPLATE)
    start(chats, **{**kw, 'out': 'x.jsonl', 'init_from': 'stranger'}).refused(
        'judge has another chat template than the chat model')


def test_a_person_judges_and_goes_on(chats):
    """After q the pairs so far are there; the same command asks for the rest alone and ends in the same file."""
    kw = {'init_from': 'brief', 'judge': 'person', 'n': 12}
    run = start(chats, **kw, typed='1\n=\n2\nq\n').ok()
    assert 'prompts are left; the same command continues' in run.out and run.out.count('better: 1 or 2') == 4
    first = lines_of(chats)
    assert len(first) == 2
    run = start(chats, **kw, typed='1\n').ok()  # and the end of the input
    assert run.out.count('better: 1 or 2') == 2 and len(lines_of(chats)) == 3
    run = start(chats, **kw, typed='1\n' * 12).ok()
    pairs = lines_of(chats)
    assert pairs[:2] == first and not (chats.path / 'out.jsonl.part').exists() and 'are left' not in run.out
    start(chats, **kw, out='again.jsonl', typed='1\n=\n2\n' + '1\n' * 12).ok()
    assert lines_of(chats, 'again.jsonl') == pairs
    start(chats, **kw, out='talks.jsonl', write='sft', typed='1\n=\n2\n' + '1\n' * 12).ok()
    assert [talk['messages'][1]['content'] for talk in lines_of(chats, 'talks.jsonl')] == [
        pair['chosen'] for pair in pairs]


def test_a_file_that_came_meanwhile(chats):
    """What another program wrote is left alone."""
    kw = {'init_from': 'brief', 'judge': 'person', 'n': 12}
    start(chats, **kw, typed='1\nq\n').ok()
    (chats.path / 'out.jsonl').write_text('mine')
    start(chats, **kw, typed='1\nq\n').refused('out.jsonl exists by now; move it away')
    assert (chats.path / 'out.jsonl').read_text() == 'mine'


@pytest.mark.parametrize('changes, said', [
    ({'out': None}, "out='': expected a file to write"), ({'task': None}, "task='', input='': expected --task=NAME"),
    ({'task': None, 'input': 'pairs.jsonl'}, "judge='verifier' checks the answers to a task"),
    ({'judge': 'reward'}, 'expected both, --judge=reward --reward_model=FOLDER'),
    ({'reward_model': 'judge'}, "judge='verifier', reward_model='judge': expected both"),
    ({'judge': 'reward', 'reward_model': 'none'}, 'there is no reward model in none'),
    ({'judge': 'reward', 'reward_model': 'chat'}, 'chat/ckpt.pt is a language model; expected a reward model'),
    ({'num_samples': 1}, 'num_samples=1: expected 2 or more answers to compare'),
    ({'temperature': 0.0}, 'temperature=0: the answers would be equal'),
    ({'task': None, 'input': 'in.jsonl', 'judge': 'person', 'kinds': 'a'}, "kinds='a' is for tasks"),
    ({'task': None, 'input': 'in.jsonl', 'judge': 'person'}, 'in.jsonl, line 2: no conversation, only text; expected'),
    ({'task': None, 'input': 'answered.jsonl', 'judge': 'person'}, "line 1: the last message is the assistant's own"),
    ({'skip_equal': True}, 'skip_equal is for --write=sft and --judge=verifier'), ({'task': 'poems'}, "there is no task 'poems'"), ({'init_from': 'plain'}, 'the tokenizer of plain has no'),
    ({'max_new_tokens': 31}, 'no prompt has room in a context of 32 tokens with max_new_tokens=31'),
    ({'out': 'nowhere/out.jsonl'}, 'nowhere/out.jsonl cannot be written'),
    ({'n': 2, 'num_samples': 2, 'max_new_tokens': 2}, 'the answers make no pairs; expected other prompts')])
def test_refused(chats, changes, said):
    save_chat_model(chats.path, 'plain', tokenizer={'kind': 'byte'}, chat_template=None)
    (chats.path / 'in.jsonl').write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (chats.path / 'answered.jsonl').write_text(json.dumps({'messages': [
        {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}))
    start(chats, **changes).refused(said)
    assert not list(chats.path.glob('out.jsonl*'))
