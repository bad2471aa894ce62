"""
Measure how fast posttrain.rl draws answers, in a batch and one by one.

    $ python -m bench.rollout --out_dir=out-sft-tiny-chat      # a minute

Both ways answer the same questions with the same random numbers, in turns. The
answers must agree except for rounding, and the ratio is taken within a round.
Answers differ in length: most rows of a batch have ended before the longest.
The floor is the time of all tokens' matrix products at the speed of a large
product, measured just before.
"""

import time

import torch

from bench import bare, common
from configurator import Count, override
from flatgpt import runtime
from flatgpt.generate import Sampling, uniforms
from flatgpt.pretrained import open_model
from posttrain.rollouts import draw_answers
from posttrain.tasks import common as tasks
from tokenizer.chat import find_endings

# Settings -----------------------------------------------------------------------------------------
out_dir = 'out-sft-tiny-chat'  # of a chat model
task = 'tiny_chat'  # the source of the questions
n: Count = 128  # answers at once
max_new_tokens: Count = 128
rounds: Count = 3
device = 'auto'
config = override(globals())
# --------------------------------------------------------------------------------------------------


def timed(device, function):
    """Return the function's result and its seconds."""
    bare.synchronize(device)
    started = time.perf_counter()
    result = function()
    bare.synchronize(device)
    return result, time.perf_counter() - started


def product_speed(device):
    """Return the FLOP/s of a large matrix product in fp32, the best of six."""
    a = torch.randn(2048, 2048, device=device)
    return 2 * 2048**3 / min(timed(device, lambda: a @ a)[1] for _ in range(6))


def main():
    # read the model and the questions
    torch_device = runtime.choose_device(device)
    runtime.use_cores()
    model, tokenizer, template, line = open_model('resume', out_dir)
    model.to(torch_device)
    print(line)
    stop_ids, _ = find_endings(template, tokenizer)
    sampling = Sampling(max_new_tokens, n_ids=tokenizer.vocab_size, stop_ids=stop_ids)
    room = model.config.block_size - max_new_tokens
    prompts = [tasks.chat_prompt(example, template, tokenizer, room)
               for example in tasks.load(task).examples('test', n, 0)]

    def draw(first, last):
        u = torch.stack([uniforms(0, i, 0, max_new_tokens) for i in range(first, last)])
        return draw_answers(model, prompts[first:last], sampling, u)

    # take turns
    draw(0, 8)  # warms up
    speeds, ratios, floors = {'one': [], 'batch': []}, [], []
    for _ in range(rounds):
        flops = product_speed(torch_device)
        batch, batch_s = timed(torch_device, lambda: draw(0, n))
        single, single_s = timed(torch_device, lambda: [draw(i, i + 1)[0] for i in range(n)])
        n_tokens = sum(map(len, batch))
        n_read = sum(map(len, prompts)) + n_tokens
        floors.append(n_read * model.flops_per_token() / 3 / flops / batch_s)
        speeds['batch'].append(n_tokens / batch_s)
        speeds['one'].append(sum(map(len, single)) / single_s)
        ratios.append(speeds['batch'][-1] / speeds['one'][-1])
        same = sum(a == b for a, b in zip(batch, single, strict=True))

    # report
    longest = max(map(len, batch))
    print(common.heading('rollout'))
    print(f'{same} of {n} answers are the same, {n_tokens / n:.1f} tokens on average, the longest '
          f'{longest}\n')
    figures = {name: common.spread(values) for name, values in speeds.items()} | {
        'ratio': common.spread(ratios), 'of_floor': common.spread(floors)}
    print(common.table([
        ['', 'tokens/s'], ['one prompt at a time', common.show(figures['one'], form='{:,.0f}')],
        [f'{n} at once', common.show(figures['batch'], form='{:,.0f}')],
        ['ratio', common.show(figures['ratio'], 'x')],
        ['share of the floor', common.show(figures['of_floor'], form='{:.1%}')]]))
    common.finish('rollout', rounds, same=same, answers=n, longest=longest, **figures)


if __name__ == '__main__':
    main()
