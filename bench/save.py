"""
Measure how long training stands still for a checkpoint.

    $ python -m bench.save                                             # 124M, a minute
    $ torchrun --standalone --nproc_per_node=2 -m bench.save           # in shards

Training stands still while the state is copied; a thread writes the copy. The first save also takes
the memory of the copy from the system. The bar: 10% of the whole save. Prints a table, then a JSON
line.
"""

import tempfile
import time
from dataclasses import asdict

import torch

from bench import common
from configurator import Count, override
from flatgpt import checkpoint, optim, parallel, runtime, sharded, shares
from model import GPT, GPTConfig

# Settings -----------------------------------------------------------------------------------------
n: Count = 6  # saves
n_layer: Count = 12
n_embd: Count = 768
config = override(globals())
# --------------------------------------------------------------------------------------------------


def main():
    # a model with the moments of a step
    world, device = shares.join('auto')
    runtime.use_machine(device)
    with sharded.deferred(world.size > 1):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd))
    sharded.place(model, 'full' if world.size > 1 else 'none', world, 'float32', device)
    opt = optim.adamw(model, 0.1, 1e-3, (0.9, 0.95))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()

    def state_of_run():
        return {'model': model.state_dict(), 'optimizer': opt.state_dict(), 'scaler': {},
                'model_args': asdict(model.config)}

    # save it n times
    rows = [['save', 'stands still, s', 'whole, s', 'share']]
    with tempfile.TemporaryDirectory() as folder:
        run = checkpoint.Run(world.from_main(folder), {}, None, world)
        run.say = lambda line: None
        for i in range(n):
            run.step += 1
            world.sum([0])  # all begin together
            start = time.perf_counter()
            run.save(state_of_run)
            still = time.perf_counter() - start
            run.saver.wait()
            whole = time.perf_counter() - start
            rows.append([i + 1, f'{still:.3f}', f'{whole:.3f}', f'{still / whole:.1%}'])
        world.sum([0])  # a folder goes when all have written
    parallel.disconnect()
    print(common.heading('save'))
    print(common.table(rows))
    common.finish('save', n, rows=rows[1:], processes=world.size)


if __name__ == '__main__':
    main()
