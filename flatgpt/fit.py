"""
Find the largest micro-batch that fits into memory, before a run and during it.

    print(fit.choose_batch(cut, resolved, model, world))  # batch_size='auto'
    fit.begin(cut, first_step, run, opt, is_auto)         # take a first step, smaller if need be
    while (loss := fit.attempt(cut, True, step, micro_batches)) is None:
        print(fit.halve(cut, run))                        # memory ran out: the step is repeated

The number of tokens of a step never changes, so a smaller micro-batch takes the same steps.
"""

import gc
from dataclasses import replace

import torch

from flatgpt import costs, memory, plan, runtime
from flatgpt.flops import GPU, Machine
from flatgpt.owners import local


def choose_batch(cut, resolved, model, world):
    """Choose the largest micro-batch that should fit; -> a line with the reason.

    resolved: train.py's settings, with the resolved dtype and compile. The memory that is needed is
    predicted. All processes take the least of their sizes.
    """
    device, precision = model.lm_head.weight.device, resolved['dtype']
    how = costs.How(runtime.DTYPES[precision].itemsize, resolved['compile'],
                    device.type == 'cuda', precision != 'float16')
    n_local = runtime.machine_size()
    machine = Machine('', GPU(0, 0, 0), n_local, max(1, world.size // n_local))
    setup = plan.setup_of(resolved, replace(model.config, block_size=cut.block_size), machine,
                          how)
    free = free_bytes(model, n_local)
    sizes = plan.divisors(cut.batch_size * cut.micro_steps // cut.stages.n)
    most = plan.largest_batch(setup, free)
    votes = world.sum([n <= most for n in sizes])
    cut.resize(next((n for n, count in zip(sizes, votes, strict=True) if count == world.size), 1))
    resolved['batch_size'] = cut.batch_size
    if not most:
        return (f'batch_size {cut.batch_size}, the smallest: no step should fit into the '
                f'{free / 1e9:.1f} GB that are free')
    return (f'batch_size {cut.batch_size}: the largest of {", ".join(map(str, sizes[::-1]))} for '
            f'which a step should fit into the {free / 1e9:.1f} GB that are free')


def free_bytes(model, n_local):
    """Return the bytes that this process's tensors may take, with its weights."""
    weights = list(model.parameters())
    if weights[0].device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(weights[0].device)
        return 0.95 * (free + torch.cuda.memory_reserved(weights[0].device))  # the rest: gaps
    # gaps take more on a CPU, and a process without memory is killed without an error
    return 0.7 * memory.free_memory() / n_local + sum(local(p).nbytes for p in weights)


def begin(cut, first_step, run, opt, is_auto):
    """Take a first step, with smaller micro-batches as long as memory runs out.

    Several processes do so with batch_size='auto' alone, and take the least size. With shards, or
    else, the error is raised: the others would wait for the process that it came from. The memory
    of the moments that opt has not yet made is held meanwhile.
    """
    world, params = run.world, [p for group in opt.param_groups for p in group['params']]
    is_sharded = any(hasattr(p, 'device_mesh') for p in params)
    may_shrink = world.size == 1 or is_auto and not is_sharded
    moments = [] if opt.state or not is_auto else [torch.empty_like(p) for p in params + params]
    while True:
        is_out = attempt(cut, may_shrink, lambda: first_step() or True) is None
        opt.zero_grad(set_to_none=True)
        if not may_shrink or not world.sum([is_out])[0]:
            break
        if cut.smaller:
            shrink(cut, cut.smaller, run)
            world.print(f'memory ran out in the first step: batch_size {cut.batch_size}')
    moments.clear()


def attempt(cut, may_shrink, function, *arguments):
    """Call a function; -> its result, or None if memory ran out.

    The error is raised where no smaller batch exists.
    """
    try:
        return function(*arguments)
    except RuntimeError as error:
        if not (runtime.out_of_memory(error) and cut.smaller and may_shrink):
            raise
    # the error, whose frames hold tensors, is gone here
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def halve(cut, run):
    """Halve the micro-batches of a run, or take the next smaller divisor; -> a line."""
    shrink(cut, cut.largest(cut.batch_size // 2) or cut.smaller, run)
    return (f'step {run.step}: memory ran out; it is repeated, and the run goes on, with '
            f'--batch_size={cut.batch_size} --total_batch_size={cut.tokens}: the same steps')


def shrink(cut, batch_size, run):
    """Set a smaller batch_size, in the settings of the run too."""
    cut.resize(batch_size)
    run.settings['batch_size'] = batch_size
    explain(cut, run)


def explain(cut, run):
    """Let an error of memory print a command that needs less of it."""
    smaller = {'batch_size': cut.smaller, 'total_batch_size': cut.tokens} if cut.smaller else {}
    run.explain_out_of_memory(smaller, 'One sequence does not fit: lower --block_size or --n_embd')
