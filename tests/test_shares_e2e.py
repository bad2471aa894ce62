"""posttrain, eval.py and flatgpt.batch in several processes do what one does. Run: pytest tests/test_shares_e2e.py"""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from chat_models import TASK, make_chats
from conftest import environments
from test_dpo_e2e import SMALL as DPO
from test_reward_e2e import SMALL as REWARD
from test_rl_e2e import SMALL as RL

# steps in which the processes' shares differ in size and length; gradients of rounding alone move little at this rate
RL_STEPS = {**RL, 'prompts_per_step': 5, 'group_size': 3, 'minibatch_size': 8, 'micro_batch_size': 4,
            'rollout_batch_size': 6, 'learning_rate': 1e-3, 'critic_lr': 1e-3}
SCRIPTS = {
    'reward': ('posttrain.reward', {**REWARD, 'batch_size': 7, 'micro_batch_size': 3, 'learning_rate': 1e-3,
                                    'min_lr': 1e-3, 'log_interval': 1}),
    'muon': ('posttrain.reward', {**REWARD, 'batch_size': 7, 'optimizer': 'muon', 'min_lr': 3e-3, 'log_interval': 1}),
    'dpo': ('posttrain.dpo', {**DPO, 'prompts_per_step': 7, 'minibatch_size': 4, 'learning_rate': 1e-3}),
    'grpo': ('posttrain.rl', {**RL_STEPS, 'epochs': 2}),
    'ppo': ('posttrain.rl', {**RL_STEPS, 'algorithm': 'ppo'}),
    'reinforce': ('posttrain.rl', {**RL_STEPS, 'algorithm': 'reinforce', 'lora_rank': 4}),
}


@pytest.fixture
def chats(tmp_path):
    folder = make_chats(tmp_path)
    easy = TASK.replace('> 0.5', '> 0.1')  # from the first step on some of the answers are right, but not all
    (folder.path / 'tasks' / 'vowels.py').write_text(easy)
    return folder


def start(folder, name, n=1, *files, **changes):
    """Start a script of SCRIPTS in n processes; -> all of them."""
    script, settings = SCRIPTS[name]
    settings = {**settings, 'max_iters': 4, 'eval_interval': 2, 'out_dir': 'out', **changes}
    return [folder.start(script, *files, env=env, **settings) for env in (environments(n) if n > 1 else [None])]


def run(folder, name, n=1, *files, **changes):
    """The same to its end: the first process alone prints."""
    first, *others = [process.ok() for process in start(folder, name, n, *files, **changes)]
    assert [other.out for other in others] == [''] * (n - 1)
    return first


def same_runs(folder, out_dir, expected, tolerance=1e-5):
    """Two runs have the same log, up to the rounding of sums."""
    logs = [[{key: value for key, value in record.items() if key not in ('ms', 'train_time')}
             for record in folder.log(path)] for path in (out_dir, expected)]
    assert len(logs[0]) == len(logs[1]) == 4 + 3
    for record, other in zip(*logs, strict=True):
        assert record == pytest.approx(other, abs=tolerance, rel=tolerance)
    for weights in ('model', 'value_model'):
        for key, weight in folder.checkpoint(expected).get(weights, {}).items():
            torch.testing.assert_close(folder.checkpoint(out_dir)[weights][key], weight, atol=2e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['grpo', 'reward', 'dpo', 'ppo', 'reinforce', 'muon'])
def test_two_processes_take_the_steps_of_one(chats, name):
    """Losses, rewards, held-out answers and statistics over a step; then three processes go on with the run of one."""
    said = run(chats, name, out_dir='one').out
    assert run(chats, name, 2, out_dir='two').out.count('\n') == said.count('\n')
    same_runs(chats, 'two', 'one')
    run(chats, name, max_iters=2, out_dir='grown')
    run(chats, name, 3, init_from='resume', out_dir='grown')
    same_runs(chats, 'grown', 'one')


@pytest.mark.slow
def test_torchrun(chats):
    """A real one, of the reward model's PPO, whose reward model was trained by two processes."""
    run(chats, 'reward', 2, out_dir='judge')
    changes = {'reward_model': 'judge', 'critic_warmup': 1}
    run(chats, 'ppo', **changes, out_dir='one')
    settings = {**SCRIPTS['ppo'][1], 'max_iters': 4, 'eval_interval': 2, 'out_dir': 'two', **changes}
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--monitor-interval=0.1',
         '-m', 'posttrain.rl', *(f'--{key}={value}' for key, value in settings.items())],
        cwd=chats.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and done.stdout.count('\niter 3: ') == 1, done.stdout
    same_runs(chats, 'two', 'one')


@pytest.mark.parametrize('name', ['reward', 'grpo'])
def test_signal_to_one_of_two_processes(chats, name):
    """Both stop after the same step, and the command goes on with two."""
    (chats.path / 'config.py').write_text(
        'import os, signal, threading, time\ndef _stop():\n'
        '    while not os.path.exists("out/log.jsonl"):\n        time.sleep(0.01)\n'
        '    time.sleep(0.3)\n    os.kill(os.getpid(), signal.SIGTERM)\n'
        'if os.environ["RANK"] == "1":\n    threading.Thread(target=_stop, daemon=True).start()\n')
    said = run(chats, name, 2, 'config.py', max_iters=100000, eval_interval=100000).out.splitlines()
    step = chats.checkpoint()['iter_num']
    assert said[-2] == f'stopped by SIGTERM after step {step}. To go on:' and 0 < step < 100000
    assert said[-1].startswith(f'  torchrun --standalone --nproc_per_node=2 -m {SCRIPTS[name][0]} config.py ')


def test_an_error_in_one_process_ends_both(chats):
    """While the other one waits for its answers: without a word, since the first has the reason."""
    (chats.path / 'tasks' / 'fails.py').write_text(TASK.replace(
        '    return sum', "    import os\n    assert os.environ['RANK'] == '0', 'this one'\n    return sum"))
    first, second = start(chats, 'grpo', 2, task='fails', eval_interval=5)
    assert second.wait().code == 1 and 'AssertionError: this one' in second.out
    assert first.wait().code == 1 and 'Error' not in first.out and 'Traceback' not in first.out


def test_a_reward_that_is_no_number_ends_both(chats):
    """One process alone has it; the state before is saved, and continues."""
    (chats.path / 'tasks' / 'broken.py').write_text(TASK.replace(
        '    return sum', "    import os\n    if os.path.exists('out/log.jsonl'):\n"
        "        if os.environ.get('RANK') == '1' and open('out/log.jsonl').read().count('entropy') > 1:\n"
        "            return float('nan')\n    return sum"))
    for process in start(chats, 'grpo', 2, task='broken', max_iters=50, eval_interval=50):
        process.refused('reward() of tasks/broken.py returned nan for an answer, expected a finite number')
    assert chats.checkpoint()['iter_num'] == 2
    assert start(chats, 'grpo', task='broken', init_from='resume', max_iters=3)[0].ok()


@pytest.mark.parametrize('name, changes, said', [
    ('grpo', {'learning_rate': 1e30}, 'Stopped without saving'), ('dpo', {'learning_rate': 1e30}, 'Stopped without'),
    ('reward', {'learning_rate': 1e30}, 'Stopped without saving'),
    ('grpo', {'prompts_per_step': 1, 'group_size': 2}, 'expected 3 answers or more in a step, one for each process')])
def test_all_refuse(chats, name, changes, said):
    for process in start(chats, name, 3, **changes):
        process.refused(said)
    assert not (chats.path / 'out' / 'ckpt.pt').exists()


@pytest.mark.parametrize('name', ['reward', 'dpo', 'ppo'])
def test_processes_that_differ_are_refused(chats, name):
    (chats.path / 'config.py').write_text('import os\nbeta2 = 0.9 + 0.01 * int(os.environ["RANK"])\n')
    for process in start(chats, name, 2, 'config.py'):
        process.refused('process 1 has beta2=0.91, expected 0.9 as in process 0: start all with one command')
    assert not (chats.path / 'out').exists()


def test_a_folder_in_use(chats):
    """The main process alone finds that out."""
    other = start(chats, 'dpo', max_iters=100000, eval_interval=100000)[0]
    other.wait_for('iter 1:')
    first, second = start(chats, 'dpo', 2)
    first.refused('another process is training in out right now')
    assert second.refused().out == ''
    other.stop()


def test_exchanges_of_several_tensors(chats):
    """Small ones together, large ones alone; a process without gradients has those of the other."""
    (chats.path / 'worker.py').write_text('''\
import torch
from flatgpt import parallel, shares
world, device = shares.join('cpu')
shares.AT_ONCE = 10
tensors = [torch.full(shape, 1.0 + world.rank) for shape in ((0,), (3, 2), (4,), (1,), (5, 5), (2, 1), ())]
transposed = torch.arange(12.0).view(3, 4).T
shares.add_up([*tensors, transposed], world)
assert all((tensor == 3.0).all() for tensor in tensors)
assert torch.equal(transposed, 2 * torch.arange(12.0).view(3, 4).T)
model = torch.nn.Linear(2, 3)
model.bias.requires_grad_(False)
if world.is_main:
    model.weight.grad = torch.ones(3, 2)
shares.add_gradients(model, world)
assert torch.equal(model.weight.grad, torch.ones(3, 2)) and model.bias.grad is None
assert shares.gather([10 * i for i in range(5)[world.rank :: 2]], world) == [0, 10, 20, 30, 40]
assert world.from_main(world.rank) == 0
parallel.disconnect()
print('done')
''')
    first, second = [chats.start(str(chats.path / 'worker.py'), env=env) for env in environments(2)]
    assert second.ok().out == '' and first.ok().out == 'done\n'


# evaluating ---------------------------------------------------------------------------------------


def evaluate(folder, size, **settings):
    """eval.py in `size` processes; -> the JSON line of the first, which alone prints, without its time."""
    processes = [folder.start('eval.py', device='cpu', out_dir='chat', **settings, env=env)
                 for env in (environments(size) if size > 1 else [None])]
    first, *others = [process.ok() for process in processes]
    assert [other.out for other in others] == [''] * (size - 1)
    return {**json.loads(first.out.splitlines()[-1]), 'seconds': 0}


@pytest.mark.slow
@pytest.mark.parametrize('settings', [{}, {'stride': 7, 'batch_size': 3}, {'quantize': 'int8'}])
def test_loss_of_a_text(chats, settings):
    """Also of fewer windows than processes."""
    for name, length in (('long.txt', 700), ('short.txt', 40)):
        (chats.path / name).write_text(('the cat sat on a mat, and ran; ' * 40)[:length])
        one, two, three = (evaluate(chats, size, input=name, **settings) for size in (1, 2, 3))
        assert one['windows'] >= (20 if name == 'long.txt' else 2)
        sums = 'loss', 'perplexity', 'bits_per_byte', 'perplexity_change'
        for result in (two, three):
            assert abs(result['loss'] - one['loss']) < 1e-6
            assert {**result, **dict.fromkeys(sums)} == {**one, **dict.fromkeys(sums)}


KEYS = "{'kind': 'odd' if i % 2 else 'even', 'context': f'Q: {i}', 'solution': 'a', 'answer': 'a', 'messages'"
LETTERS = TASK.replace("{'messages'", KEYS) + '''

def extract(text):
    return text[:1] or None


def evaluate(example, text):
    return text[:1] in 'abcdefghijklm'
'''


def test_accuracy_on_a_task(chats):
    """The same answers, of samples of their own: as many are right of each kind, alone, together and by reward."""
    (chats.path / 'tasks' / 'letters.py').write_text(LETTERS)
    run(chats, 'reward', out_dir='judge')
    settings = {'task': 'letters', 'n': 11, 'num_samples': 3, 'temperature': 1.0, 'max_new_tokens': 6,
                'reward_model': 'judge', 'batch_size': 6}
    one, two = (evaluate(chats, size, **settings) for size in (1, 2))
    assert two == one and 0 < one['right'] < one['n'] == 11 and len(one['kinds']) == 3
    assert len({one['accuracy_of_any'], one['accuracy_of_one'], one['accuracy_of_majority']}) == 3


def test_accuracy_of_choices(chats):
    rows = [{'question': f'{i} or {7 * i % 5}?', 'choices': [str(i), 'ab', 'c' * (i % 3 + 1)], 'answer': i % 3}
            for i in range(8)]
    (chats.path / 'choices.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    one, *others = (evaluate(chats, size, task='multiple_choice', input='choices.jsonl', shots=1) for size in (1, 2, 3))
    assert others == [one] * 2 and 0 < one['right'] < one['n'] == 8
    assert evaluate(chats, 2, task='multiple_choice', input='choices.jsonl', n=1, shots=1)['n'] == 1


# files of prompts ---------------------------------------------------------------------------------


def batch(folder, n, **settings):
    """flatgpt.batch in n processes; -> all of them."""
    settings = {'prompts': 'in.jsonl', 'out_dir': 'chat', 'device': 'cpu', 'max_new_tokens': 12, 'batch_size': 3,
                'num_samples': 1, 'temperature': 1.0, 'logprobs': True, **settings}
    return [folder.start('flatgpt.batch', **settings, env=env) for env in (environments(n) if n > 1 else [None])]


@pytest.mark.slow
def test_prompts_are_shared(chats):
    """The same bytes, log-probabilities included; also of a run that was killed and goes on with more processes."""
    lines = [{'id': i, 'messages': [{'role': 'user', 'content': 'q' * (i % 7 + 1)}]} for i in range(40)]
    (chats.path / 'in.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    part, outs = chats.path / 'killed.jsonl.part', {}
    for n in (1, 2, 3):
        first, *others = [process.ok() for process in batch(chats, n, out=f'{n}.jsonl')]
        assert [other.out for other in others] == [''] * (n - 1)
        outs[n] = (chats.path / f'{n}.jsonl').read_bytes(), re.search(r'40 prompts, \d+ tokens', first.out)[0]
    assert outs[1] == outs[2] == outs[3]
    first, second = batch(chats, 2, out='1.jsonl')
    first.refused('1.jsonl exists already; delete it, or name another --out')
    assert second.refused().out.count('\n') == 0
    killed = batch(chats, 2, out='killed.jsonl', batch_size=1)
    while not part.exists() or part.read_bytes().count(b'\n') < 4:
        time.sleep(0.002)
    for process in killed:
        process.kill(signal.SIGKILL).wait()
    kept = [json.loads(line) for line in part.read_bytes().splitlines()[1:-1]]
    assert 0 < len(kept) < 40
    for process in batch(chats, 3, out='killed.jsonl'):
        process.ok()
    texts = [[sample['text'] for line in (chats.path / name).read_text().splitlines()
              for sample in json.loads(line)['samples']] for name in ('1.jsonl', 'killed.jsonl')]
    assert texts[0] == texts[1] and not part.exists()
