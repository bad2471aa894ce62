"""Test batch_size='auto', and steps that run out of memory. Run: pytest tests/test_fit.py"""

import os
import signal
import sys

import pytest
import torch
from conftest import close_state, losses

from configurator import UserError
from flatgpt import checkpoint, costs, fit, memory, parallel, plan, runtime
from flatgpt.cut import Cut, Stages, cut_step
from flatgpt.plan import Setup
from model import GPT, GPTConfig

ALONE = parallel.World()
OUT = 'CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB'
# config files that let torch run out of memory; names that they bind begin with _, for they are no settings
ONCE = f'''
import torch
_backward, _calls = torch.Tensor.backward, []
def failing(loss, *args, **kwargs):
    _backward(loss, *args, **kwargs)
    _calls.append(1)
    if len(_calls) == 6:  # the second of two micro-batches, in the third step; its gradients are there
        raise torch.OutOfMemoryError({OUT!r})
torch.Tensor.backward = failing
'''
LARGER = f'''
import ops, torch
_loss_of = ops.head_cross_entropy
def failing(x, *args):
    if len(x) > MOST and x.requires_grad:
        raise torch.OutOfMemoryError({OUT!r})
    return _loss_of(x, *args)
ops.head_cross_entropy = failing
'''
LIMITED = '''
import resource
with open('/proc/self/statm') as _file:
    _pages = int(_file.read().split()[0])
_most = _pages * resource.getpagesize() + 500 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (_most, _most))
'''


def broken(folder, text):
    """Write a config file that breaks torch; -> its path."""
    (folder.path / 'broken.py').write_text(text)
    return folder.path / 'broken.py'


# cuts -----------------------------------------------------------------------------------------------------------------


def test_resized_cuts_keep_the_step():
    cut = cut_step({'total_batch_size': 24 * 16, 'batch_size': 12}, 16, 2)
    assert (cut.batch_size, cut.micro_steps, cut.sequences, cut.smaller) == (12, 1, 24, 6)
    for batch_size, micro_steps, smaller in ((6, 2, 4), (4, 3, 3), (3, 4, 2), (2, 6, 1), (1, 12, 0), (12, 1, 6)):
        cut.resize(batch_size)
        assert (cut.batch_size, cut.micro_steps, cut.smaller, cut.tokens) == (batch_size, micro_steps, smaller, 384)
    assert [cut.largest(n) for n in (0, 1, 5, 11, 100)] == [0, 1, 4, 6, 12]


def test_auto_begins_with_one_sequence():
    cut = cut_step({'total_batch_size': 24 * 16, 'batch_size': 'auto'}, 16, 2)
    assert (cut.batch_size, cut.micro_steps) == (1, 12)
    with pytest.raises(UserError, match="batch_size='auto' needs .* --total_batch_size=7680"):
        cut_step({'total_batch_size': 0, 'gradient_accumulation_steps': 40, 'batch_size': 'auto'}, 16, 1)


def test_stages_by_hand():
    """10 steps are 4, 3 and 3; the n-ths that a step takes are the stages that have begun."""
    assert [3 * Stages(3, 10).share(step) for step in range(13)] == pytest.approx([1] * 4 + [2] * 3 + [3] * 6)
    assert Stages().share(0) == Stages(3, 0).share(0) == 1.0
    for n, end in ((1, 5), (4, 3), (5, 23)):
        shares = [min(n, 1 + step * n // end) for step in range(30)]
        assert [Stages(n, end).until(step) for step in range(30)] == [sum(shares[:step]) for step in range(30)]


def test_cuts_of_stages():
    """24 sequences in two processes: 4, 8 and 12 each, in micro-batches of one size."""
    settings = {'total_batch_size': 24 * 16, 'batch_size': 100, 'batch_stages': 3, 'lr_decay_iters': None, 'max_iters': 10}
    cut = cut_step(settings, 16, 2)
    assert (cut.batch_size, cut.micro_steps, cut.tokens, cut.smaller) == (4, 3, 384, 2)
    assert [cut.tokens_of(step, step + 1) for step in (3, 4, 7)] == [128, 256, 384]
    assert cut.tokens_of(3, 8) == 128 + 3 * 256 + 384 and cut.tokens_of(8, 3) == -cut.tokens_of(3, 8)
    cut.resize(2)
    assert (cut.micro_steps, cut.smaller, cut.tokens_of(3, 8)) == (6, 1, 1280)
    assert cut_step({**settings, 'batch_size': 'auto'}, 16, 2).micro_steps == 12
    with pytest.raises(UserError, match='1/3 of a step of 400 tokens is no.*each of 2 processes.*--total_batch_size=384'):
        cut_step({**settings, 'total_batch_size': 400}, 16, 2)
    with pytest.raises(UserError, match='4 sequences per step and process .* batch_size=3; try --batch_size=2'):
        cut_step({**settings, 'batch_size': 3}, 16, 2)


# the choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('megabytes', [6, 12, 24, 100])
def test_the_largest_that_fits(monkeypatch, megabytes):
    """By the plan's own prediction, of which tests/test_plan.py checks the numbers."""
    monkeypatch.setattr(memory, 'free_memory', lambda: megabytes * 1e6)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=64, block_size=64, bias=False)
    settings = {'total_batch_size': 64 * 48, 'batch_size': 'auto', 'dtype': 'float32', 'compile': False,
                'optimizer': 'adamw', 'recompute': 'none', 'lora_rank': 0, 'lora_targets': ''}
    cut = cut_step(settings, 64, 1)
    model = GPT(config)
    line = fit.choose_batch(cut, settings, model, ALONE)
    free = 0.7e6 * megabytes + sum(p.nbytes for p in model.parameters())
    assert line.startswith(f'batch_size {cut.batch_size}') and settings['batch_size'] == cut.batch_size
    assert cut.batch_size * cut.micro_steps == 48 and cut.tokens == 64 * 48

    def bytes_of(n):
        return plan.total(Setup(config, n, 48 // n, how=costs.How(4, on_gpu=False)))

    larger = [n for n in plan.divisors(48) if n > cut.batch_size]
    assert all(bytes_of(n) > free for n in larger)
    assert bytes_of(cut.batch_size) <= free or cut.batch_size == 1
    assert ('no step should fit' in line) == (bytes_of(1) > free)
    assert bool(larger) == (megabytes < 100)


def test_free_memory():
    physical = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    assert 1e8 < memory.free_memory() <= physical


@pytest.mark.parametrize('names', memory.CGROUPS)
def test_free_memory_of_a_container(tmp_path, names):
    """Its limit less its use, but for files that the system can drop; 'max' is none."""
    *files, key = names
    for name, content in zip(files, ('80000000', '79000000', f'anon 5\n{key} 2000000\n'), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory.free_memory(tmp_path) == 3_000_000
    (tmp_path / files[0]).write_text('max')
    assert memory.free_memory(tmp_path) > 1e8


def test_a_first_step_shrinks_until_it_fits(capsys, monkeypatch):
    """12 -> 6 -> 4 -> 3; gradients of the trials are dropped. Of several processes only 'auto' shrinks."""
    weight = torch.nn.Parameter(torch.zeros(2))
    opt, cut, tried = torch.optim.AdamW([weight]), Cut(12, 16, 12), []

    def first_step():
        tried.append(cut.batch_size)
        weight.sum().backward()
        if cut.batch_size > 3:
            raise torch.OutOfMemoryError(OUT)

    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # a run installs one, and signal handlers
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    run = checkpoint.Run('out', {}, world=ALONE, folder=False)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    fit.begin(cut, first_step, run, opt, True)
    assert run.settings == {'batch_size': 3}
    assert tried == [12, 6, 4, 3] and (cut.batch_size, cut.micro_steps) == (3, 4) and weight.grad is None
    assert capsys.readouterr().out.count('memory ran out in the first step') == 3
    cut.resize(12)
    with pytest.raises(torch.OutOfMemoryError):
        run.world = parallel.World(0, 0, 2)
        fit.begin(cut, first_step, run, opt, False)


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        fit.attempt(Cut(4, 4, 4), True, torch.mm, torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="can't allocate memory|not enough memory"):
        fit.attempt(Cut(4, 4, 1, 4), True, torch.empty, 2**60)  # one sequence: no smaller batch
    assert fit.attempt(Cut(4, 4, 4), True, torch.empty, 2**60) is None


# runs -----------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_same_steps(finished, folder):
    """On this machine all sequences of a step fit at once."""
    run = folder.train(batch_size='auto', total_batch_size=128).ok()
    assert 'batch_size 8: the largest of 1, 2, 4, 8 for which a step should fit into the' in run.out
    assert '1 micro-batch(es) x 8 x 16' in run.out
    assert losses(run)[0] == pytest.approx(losses(finished[1])[0], abs=1e-4)
    assert folder.checkpoint()['config']['batch_size'] == 8


def test_auto_of_two_processes(finished, folder):
    run = folder.train_two(batch_size='auto', total_batch_size=128)
    assert 'batch_size 4: the largest of 1, 2, 4 for which' in run.out
    assert losses(run)[0] == pytest.approx(losses(finished[1])[0], abs=1e-4)


@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_without_memory_is_repeated(finished, folder, compile):
    """The third step fails when its gradients are complete; it and the rest are those of an undisturbed run."""
    config = broken(folder, ONCE)
    run = folder.train(config, compile=compile, dropout=0.0).ok()
    assert run.out.count('memory ran out') == 1
    assert 'step 2: memory ran out; it is repeated, and the run goes on, with --batch_size=2 ' in ' '.join(run.out.split())
    assert losses(run)[0] == pytest.approx(losses(finished[1])[0], abs=1e-4)
    assert folder.checkpoint()['config']['batch_size'] == 2
    close_state(folder.checkpoint(), finished[0].checkpoint(), 1e-4)


def test_memory_for_two_sequences(finished, folder):
    """It is halved as often as needed, and says so."""
    run = folder.train(broken(folder, LARGER.replace('MOST', '2')), batch_size=8, total_batch_size=128).ok()
    assert run.out.count('memory ran out') == 2 and '--batch_size=4' in run.out and '--batch_size=2' in run.out
    assert losses(run)[0] == pytest.approx(losses(finished[1])[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='limits memory as Linux does')
def test_memory_that_really_ends(folder):
    """The kernel refuses memory in a forward or backward pass; the run takes all its steps in smaller pieces."""
    settings = {'total_batch_size': 2**18, 'max_iters': 2, 'eval_interval': 100, 'eval_first': False, 'eval_iters': 1}
    whole = folder.train(broken(folder, LIMITED), batch_size=2**14, **settings).ok()
    assert 'memory ran out' in whole.out
    pieces = folder.train(batch_size=2**8, out_dir='pieces', **settings).ok()
    assert losses(whole)[0] == pytest.approx(losses(pieces)[0], abs=1e-4)


def test_memory_for_no_sequence(folder):
    run = folder.train(broken(folder, LARGER.replace('MOST', '0')))
    run.refused('memory ran out', '--batch_size=1', 'One sequence does not fit: lower --block_size or --n_embd')


def test_several_processes_end_with_the_command(folder):
    """One that runs out of memory cannot repeat a step while the others wait for its gradients."""
    runs = folder.start_two(broken(folder, LARGER.replace('MOST', '2')), batch_size=4, total_batch_size=128)
    for run in runs:
        run.refused('The same steps in smaller pieces:', '--batch_size=2')
        assert 'is repeated' not in run.out


def test_auto_without_a_total(folder):
    folder.train(batch_size='auto').refused("batch_size='auto' needs the tokens of a step", '--total_batch_size=')
    run = folder.train(batch_size='auto', total_batch_size=16 * 64, plan='H100').ok()
    assert '1 micro-batch(es) x 64 x 16' in run.out


# the allocator of a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch._C, '_accelerator_setAllocatorSettings'), reason='of torch 2.9 and later')
@pytest.mark.parametrize('name', [None, 'PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'])
def test_segments_expand_unless_the_user_set_them(monkeypatch, name):
    applied = []
    monkeypatch.setattr(torch._C, '_accelerator_setAllocatorSettings', applied.append)
    monkeypatch.setattr(runtime.sys, 'platform', 'linux')
    for variable in ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_HIP_ALLOC_CONF'):
        monkeypatch.delenv(variable, raising=False)
    if name:
        monkeypatch.setenv(name, 'max_split_size_mb:128')
    runtime.expand_segments()
    assert applied == ([] if name else ['expandable_segments:True'])
