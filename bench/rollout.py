"""
Rollouts: how fast rl.py draws answers, against calling generate for one prompt after the other.

    $ python -m bench.rollout --out_dir=out-sft-tiny-chat      # a minute

Both answer the same questions with the same random numbers, in turns; the answers have to be the same but for rounding,
and the ratio is taken within a round. Answers differ in length: of the rows that a batch has at first most have ended
when the longest answer does. The floor is what the matrix products of all tokens would take at the speed of large ones,
measured just before.
"""

import sys
import time

import torch

from bench import bare, common
from configurator import explain_errors, override
from flatgpt import runtime
from flatgpt.generate import uniforms
from flatgpt.pretrained import open_model
from posttrain.rollouts import Sampling, draw_answers
from posttrain.tasks import common as tasks
from tokenizer.chat import find_endings

# settings ------------------------------------------------------------------------------------------------------------
out_dir = 'out-sft-tiny-chat'  # of a chat model
task = 'tiny_chat'  # whose questions it answers
n = 128  # answers at once
max_new_tokens = 128
rounds = 3
device = 'auto'
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------


def timed(function):
    """-> (what it returns, seconds)"""
    bare.synchronize(device)
    started = time.perf_counter()
    result = function()
    bare.synchronize(device)
    return result, time.perf_counter() - started


def product_speed():
    """FLOP/s of a large matrix product in fp32, the best of six."""
    a = torch.randn(2048, 2048, device=device)
    return 2 * 2048**3 / min(timed(lambda: a @ a)[1] for _ in range(6))


def main():
    global device
    device = runtime.choose_device(device)
    runtime.use_cores()
    model, tokenizer, template, line = open_model('resume', out_dir)
    model.to(device)
    print(line)
    stop_ids, _ = find_endings(template, tokenizer)
    sampling = Sampling(max_new_tokens, n_ids=tokenizer.vocab_size, stop_ids=stop_ids)
    prompts = [tasks.chat_prompt(example, template, tokenizer, model.config.block_size - max_new_tokens)
               for example in tasks.load(task).examples('test', n, 0)]

    def draw(first, last):
        u = torch.stack([uniforms(0, i, 0, max_new_tokens) for i in range(first, last)])
        return draw_answers(model, prompts[first:last], sampling, u)

    draw(0, 8)  # warm up
    speeds, ratios, floors, same = {'one': [], 'batch': []}, [], [], 0
    for _ in range(rounds):
        flops = product_speed()
        batch, batch_s = timed(lambda: draw(0, n))
        one, one_s = timed(lambda: [draw(i, i + 1)[0] for i in range(n)])
        tokens = sum(map(len, batch))
        floors.append(sum(len(p) + len(a) for p, a in zip(prompts, batch, strict=True))
                      * model.flops_per_token() / 3 / flops / batch_s)
        speeds['batch'].append(tokens / batch_s)
        speeds['one'].append(sum(map(len, one)) / one_s)
        ratios.append(speeds['batch'][-1] / speeds['one'][-1])
        same = sum(a == b for a, b in zip(batch, one, strict=True))
    print(common.heading('rollout'))
    print(f'{same} of {n} answers are the same, {tokens / n:.1f} tokens on average, the longest '
          f'{max(map(len, batch))}\n')
    figures = {name: common.spread(values) for name, values in speeds.items()} | {
        'ratio': common.spread(ratios), 'of_floor': common.spread(floors)}
    print(common.table([['', 'tokens/s'], ['one prompt at a time', common.show(figures['one'], form='{:,.0f}')],
                        [f'{n} at once', common.show(figures['batch'], form='{:,.0f}')],
                        ['ratio', common.show(figures['ratio'], 'x')],
                        ['share of the floor', common.show(figures['of_floor'], form='{:.1%}')]]))
    common.finish('rollout', rounds, same=same, answers=n, longest=max(map(len, batch)), **figures)


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
