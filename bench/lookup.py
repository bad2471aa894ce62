"""
Measure decoding with guesses from repeats of the text, --lookup of sample.py.

    $ python -m bench.lookup --out_dir=out-quickstart            # a minute
    $ python -m bench.lookup --out_dir=out --input=text.txt

A trained model continues pieces of a text, one at a time, greedily and at
temperature 0.8 with top_k 200. With and without guesses it draws with the same
random numbers, in turns, and the ratio is taken within a round. Also printed is
how many texts are the same. The default text is Python's argparse module, which
config/quickstart.py may have trained on.
"""

import argparse
import time

import torch

from bench import common
from configurator import Count, UserError, override
from flatgpt import decoding, files
from flatgpt.generate import Sampling, generate, uniforms

# Settings -----------------------------------------------------------------------------------------
out_dir = 'out-quickstart'  # of the model
input = argparse.__file__  # the text whose pieces it continues
n: Count = 20  # pieces
lookup: Count = 8  # most guesses in a pass
rounds: Count = 3
device = 'auto'
dtype = 'auto'
compile = 'auto'
config = override(globals())
# --------------------------------------------------------------------------------------------------


def main():
    # open the model, and cut half a context of each piece for the prompt
    settings = {**config, 'init_from': 'resume', 'which': 'best', 'slide': 1, 'quantize': ''}
    model, tokenizer, _, line = decoding.open_model(settings)
    half = model.config.block_size // 2
    decoding.prepare(model, settings, 1, half)
    ids = tokenizer.encode(files.read_text(input))
    if len(ids) < n + half:
        raise UserError(f'{input} has {len(ids)} tokens: expected {n + half} or more')
    step = (len(ids) - half) // n
    prompts = [ids[i * step : i * step + half] for i in range(n)]
    print(line)

    def answers(temperature, most):
        """Return all texts and the tokens per second."""
        sampling = Sampling(half, temperature, top_k=200, lookup=most)
        began = time.perf_counter()
        texts = [[ids.item() for ids, _, _ in generate(
            model, [prompt], sampling, torch.stack([uniforms(0, i, 0, half)]))]
            for i, prompt in enumerate(prompts)]
        return texts, n * half / (time.perf_counter() - began)

    # take turns
    figures, rows = {}, [('', 'tokens/s', 'with guesses', 'ratio', 'same texts')]
    for temperature in (0.0, 0.8):
        speeds, guessing, ratios = [], [], []
        for _ in range(rounds):
            plain, speed = answers(temperature, 0)
            guessed, faster = answers(temperature, lookup)
            speeds.append(speed)
            guessing.append(faster)
            ratios.append(faster / speed)
        same = sum(a == b for a, b in zip(plain, guessed, strict=True))
        figures[f'temperature {temperature}'] = {
            'tokens_per_s': common.spread(speeds), 'with_guesses': common.spread(guessing),
            'ratio': common.spread(ratios), 'same': same}
        rows.append((f'temperature {temperature}', common.show(common.spread(speeds)),
                     common.show(common.spread(guessing)),
                     common.show(common.spread(ratios), '', '{:.2f}'), f'{same} of {n}'))

    # report
    print(common.heading('lookup'))
    print(common.table(rows))
    common.finish('lookup', rounds, **figures)


if __name__ == '__main__':
    main()
