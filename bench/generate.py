"""
Measure decoding of GPT-2 124M against nanoGPT, transformers and bandwidth.

    $ python -m bench.generate --peer=../nanoGPT            # two CPU cores: about ten minutes
    $ python -m bench.generate --rounds=1 --new_tokens=20   # without nanoGPT, a quick look

The weights are random. Each program answers a prompt of 32 tokens with 200, and
one of 900 with 100, at temperature 0.8 and top_k 200. The second is timed from
its first token on; nanoGPT, which repeats the prompt for each token, answers
with fewer. The programs take turns, and ratios are taken within a round. The
floor is the time in which torch.sum() reads as many bytes as the weights have,
on as many threads, just before: each token reads every weight once. Also
printed is the time to the first and to the third token of the first answer.

nanoGPT's model.generate() runs as in its sample.py on a CPU (fp32, eager),
transformers' generate() with its cache in the better of fp32 and bf16. The bars
on two CPU cores: 12 times nanoGPT's tokens per second, 60 times at 900; 4 times
transformers'; 75% of the floor in bf16; int8 1.4 times bf16; a batch of 16 with
5 times the throughput of one.
"""

import importlib.util
import os
import sys
import time
from typing import Literal

import torch

from bench import common
from configurator import Count, Natural, NonNegative, override
from flatgpt import quantize, runtime
from flatgpt.generate import Sampling, generate
from model import GPT, GPTConfig

# Settings -----------------------------------------------------------------------------------------
peer = ''  # path of a nanoGPT checkout; '': without it
transformers = True  # compare with transformers' generate, if it is installed
rounds: Count = 3
prompt_tokens: Count = 32
new_tokens: Count = 200
long_prompt: Natural = 900  # tokens of the long prompt; 0: without
long_tokens: Count = 100  # in the answer to it
batch: Count = 16  # prompts at once
n_layer: Count = 12  # of the model; the defaults are GPT-2's 124M
n_head: Count = 12
n_embd: Count = 768
vocab_size: Count = 50304
dtype: Literal['bfloat16', 'float32', 'float16'] = 'bfloat16'  # of the weights in 'ours'
device = 'auto'
wait: NonNegative = 0  # most seconds to wait for a quiet machine before each round
config = override(globals())
# --------------------------------------------------------------------------------------------------

device = runtime.choose_device(device)
runtime.use_cores()
sizes = {'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd, 'vocab_size': vocab_size}


def ours(dtype, compile):
    """Return a function (idx, n) that yields each of n new tokens."""
    torch.manual_seed(0)
    model = quantize.for_decoding(GPT(GPTConfig(**sizes)).eval().to(device), dtype, compile)

    def answer(idx, n):
        for ids, _, _ in generate(model, idx.to(device), Sampling(n, 0.8, top_k=200)):
            yield ids[0].item()

    return answer


def of_nanogpt():
    """Return the same for nanoGPT, whose generate() returns all tokens at once."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(peer, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks up its own module there
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(**sizes)).eval().to(device)

    def answer(idx, n):
        ids = model.generate(idx.to(device), n, temperature=0.8, top_k=200)
        return iter(ids[0, idx.size(1) :].tolist())

    return answer


def of_transformers(dtype):
    """Return the same for transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval().to(device, dtype)

    def answer(idx, n):
        ids = model.generate(idx.to(device), attention_mask=torch.ones_like(idx, device=device),
                             max_new_tokens=n, do_sample=True, temperature=0.8, top_k=200,
                             pad_token_id=0)
        return iter(ids[0, idx.size(1) :].tolist())

    return answer


def seconds(answer, idx, n):
    """Return the seconds to the first and to the last token."""
    start, first = time.perf_counter(), None
    with torch.no_grad():
        for _ in answer(idx, n):
            first = first or time.perf_counter() - start
    return first, time.perf_counter() - start


def read_seconds(n_bytes):
    """Return the seconds in which torch.sum reads that many bytes, the best of five."""
    data, best = torch.ones(n_bytes // 4, device=device), float('inf')
    for _ in range(5):
        start = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - start)
    return best


# what to measure: {name: (function, prompt, new tokens)}
half = runtime.DTYPES[dtype]
ids = torch.randint(vocab_size, (batch, max(prompt_tokens, long_prompt)),
                    generator=torch.Generator().manual_seed(0))
prompt, long = ids[:1, :prompt_tokens], ids[:1, :long_prompt]
compiled, int8 = ours(half, True), ours(torch.int8, True)
runs = {
    f'{dtype}, compiled': (compiled, prompt, new_tokens),
    'int8, compiled': (int8, prompt, new_tokens),
    'float32, compiled': (ours(torch.float32, True), prompt, new_tokens),
    f'{dtype}': (ours(half, False), prompt, new_tokens),
    f'{dtype}, batch of {batch}': (ours(half, not quantize.has_bf16_products()),
                                   ids[:, :prompt_tokens], new_tokens)}
if long_prompt:
    runs[f'{dtype}, compiled, long'] = compiled, long, long_tokens
    runs['int8, compiled, long'] = int8, long, long_tokens
if peer:
    nanogpt = of_nanogpt()
    runs['nanoGPT'] = nanogpt, prompt, new_tokens
    if long_prompt:
        runs['nanoGPT, long'] = nanogpt, long, max(1, long_tokens // 16)
if transformers and importlib.util.find_spec('transformers'):
    for name in ('float32', dtype):
        runs[f'transformers, {name}'] = of_transformers(runtime.DTYPES[name]), prompt, new_tokens

# compile and warm up, then take turns
first, rate, ratios = {}, {name: [] for name in runs}, {}
for name, (answer, idx, _) in runs.items():
    first[name] = seconds(answer, idx, 3)
    print(f'{name}: first token after {first[name][0]:.2f} s, third {first[name][1]:.2f} s',
          file=sys.stderr)
n_weights = GPT(GPTConfig(**sizes)).get_num_params(non_embedding=True)
rate['floor'] = []
for _ in range(rounds):
    common.wait_for_quiet(wait)
    rate['floor'].append(1 / read_seconds(n_weights * half.itemsize))
    for name, (answer, idx, n) in runs.items():
        until_first, until_last = seconds(answer, idx, n)
        if name.endswith('compiled, long'):
            rate[name].append((n - 1) / (until_last - until_first))
        else:
            rate[name].append(len(idx) * n / until_last)


def compare(label, name, other, bar):
    """Keep the ratios of two rates in each round."""
    if name in rate and other in rate:
        pairs = zip(rate[name], rate[other], strict=True)
        ratios[label] = common.spread([a / b for a, b in pairs]), bar


# report
reference = f'{dtype}, compiled'
theirs = [name for name in rate if name.startswith('transformers')]
best = max(theirs, key=lambda name: max(rate[name]), default='')
compare('against nanoGPT', reference, 'nanoGPT', 12)
compare('against nanoGPT, long', f'{reference}, long', 'nanoGPT, long', 60)
compare(f'against {best}', reference, best, 4)
compare('share of the floor', reference, 'floor', 0.75)
compare('int8 against ' + dtype, 'int8, compiled', reference, 1.4)
compare(f'batch of {batch} against 1', f'{dtype}, batch of {batch}', reference, 5)
print(common.heading('generate'))
rows = [('', 'tokens/s', 'first', 'third')]
for name, values in rate.items():
    times = [f'{s:.1f} s' for s in first[name]] if name in first else ['', '']
    rows.append((name, common.show(common.spread(values)), *times))
print(common.table(rows), '\n')
print(common.table([('ratio, within a round', 'median', 'bar'),
                    *((label, common.show(figures, '', '{:.2f}'), bar)
                      for label, (figures, bar) in ratios.items())]))
common.finish('generate', rounds,
              tokens_per_second={name: common.spread(values) for name, values in rate.items()},
              first_and_third_token_s={name: [round(s, 2) for s in pair]
                                       for name, pair in first.items()},
              ratios={label: figures for label, (figures, _) in ratios.items()})
