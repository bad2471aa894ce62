"""
Decoding GPT-2 124M (random weights): tokens a second, against nanoGPT, transformers and the memory's bandwidth.

    $ python -m bench.generate --peer=../nanoGPT            # two CPU cores: about ten minutes
    $ python -m bench.generate --rounds=1 --new_tokens=20   # without nanoGPT, a quick look

Each answers a prompt of 32 tokens with 200, and one of 900 with 100, at temperature 0.8 and top_k 200; the second is
timed from the first of its tokens on (nanoGPT, which goes over the prompt for each of them, answers with fewer). They
take turns; ratios are taken within a round. A token can't be had in less than it takes to read every weight once: the
floor is the time in which torch.sum() reads as many bytes, on as many threads, just before. Also printed: how long a
process waits for the first and the third token of its first answer; the second is the one that is compiled for.

nanoGPT's model.generate() runs as its sample.py runs it on a CPU (fp32, eager), transformers' generate() with its cache
in the better of fp32 and bf16. The bars on two CPU cores: 12 times nanoGPT's tokens a second, 60 times at 900;
3 times transformers'; 70% of the floor in bf16; int8 1.5 times bf16; a batch of 16 6 times the throughput of one.
"""

import importlib.util
import os
import sys
import time

import torch

from bench import common
from configurator import override
from flatgpt import quantize, runtime
from flatgpt.generate import Sampling, generate
from model import GPT, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
peer = ''  # path of a nanoGPT checkout; '': without it
transformers = True  # compare with transformers' generate, if it is installed
rounds = 3  # turns of each
prompt_tokens = 32
new_tokens = 200
long_prompt = 900  # tokens of the long prompt; 0: without
long_tokens = 100  # that answer it
batch = 16  # prompts at once
n_layer = 12  # of the model, whose defaults are GPT-2's 124M
n_head = 12
n_embd = 768
vocab_size = 50304
dtype = 'bfloat16'  # of the weights in 'ours'
device = 'auto'
wait = 0  # seconds to wait before each round, at most, until other processes leave the machine alone
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

device = runtime.choose_device(device)
runtime.use_cores()
gpt_config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)


def ours(dtype, compile):
    """-> a function (idx, n) that yields each of n new tokens."""
    torch.manual_seed(0)
    model = quantize.for_decoding(GPT(gpt_config).eval().to(device), dtype, compile)

    def answer(idx, n):
        for ids, _, _ in generate(model, idx.to(device), Sampling(n, 0.8, top_k=200)):
            yield ids[0].item()

    return answer


def nanogpts():
    """The same of nanoGPT. Its generate() returns all tokens at once, so its first takes as long as all."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(peer, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its own module
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)).eval()
    model.to(device)
    return lambda idx, n: iter(model.generate(idx.to(device), n, temperature=0.8, top_k=200)[0, idx.size(1) :].tolist())


def hugging_faces(dtype):
    """The same of transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size,
                                       bos_token_id=None, eos_token_id=None)).eval().to(device, dtype)

    def answer(idx, n):
        ids = model.generate(idx.to(device), attention_mask=torch.ones_like(idx, device=device), max_new_tokens=n,
                             do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)
        return iter(ids[0, idx.size(1) :].tolist())

    return answer


def seconds(answer, idx, n):
    """-> (until the first token, until the last)"""
    start, first = time.perf_counter(), None
    with torch.no_grad():
        for _ in answer(idx, n):
            first = first or time.perf_counter() - start
    return first, time.perf_counter() - start


def read_seconds(n_bytes):
    """In which torch.sum reads that many bytes; the best of five."""
    data, best = torch.ones(n_bytes // 4, device=device), float('inf')
    for _ in range(5):
        start = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - start)
    return best


half = runtime.DTYPES[dtype]
ids = torch.randint(vocab_size, (batch, max(prompt_tokens, long_prompt)), generator=torch.Generator().manual_seed(0))
prompt, long = ids[:1, :prompt_tokens], ids[:1, :long_prompt]
compiled, int8 = ours(half, True), ours(torch.int8, True)
runs = {  # name: (function, prompt, new tokens)
    f'{dtype}, compiled': (compiled, prompt, new_tokens), 'int8, compiled': (int8, prompt, new_tokens),
    'float32, compiled': (ours(torch.float32, True), prompt, new_tokens),
    f'{dtype}': (ours(half, False), prompt, new_tokens),
    f'{dtype}, batch of {batch}': (ours(half, False), ids[:, :prompt_tokens], new_tokens)}
if long_prompt:
    runs[f'{dtype}, compiled, long'] = compiled, long, long_tokens
    runs['int8, compiled, long'] = int8, long, long_tokens
if peer:
    nanogpt = nanogpts()
    runs['nanoGPT'] = nanogpt, prompt, new_tokens
    if long_prompt:
        runs['nanoGPT, long'] = nanogpt, long, max(1, long_tokens // 16)
if transformers and importlib.util.find_spec('transformers'):
    for name in ('float32', dtype):
        runs[f'transformers, {name}'] = hugging_faces(runtime.DTYPES[name]), prompt, new_tokens

first, rate, ratios = {}, {name: [] for name in runs}, {}
for name, (answer, idx, _) in runs.items():  # compiles, warms up
    first[name] = seconds(answer, idx, 3)
    print('{}: first token after {:.2f} s, third {:.2f} s'.format(name, *first[name]), file=sys.stderr)
n_weights = GPT(gpt_config).get_num_params(non_embedding=True)
floors = []
for _ in range(rounds):
    common.wait_for_quiet(wait)
    floors.append(1 / read_seconds(n_weights * half.itemsize))
    for name, (answer, idx, n) in runs.items():
        until_first, until_last = seconds(answer, idx, n)
        if name.endswith('compiled, long'):
            rate[name].append((n - 1) / (until_last - until_first))
        else:
            rate[name].append(len(idx) * n / until_last)


def compare(label, name, other, bar):
    """Keep the ratios of two rates in each round."""
    if name in rate and other in rate:
        ratios[label] = common.spread([a / b for a, b in zip(rate[name], rate[other], strict=True)]), bar


ours_name = f'{dtype}, compiled'
rate['floor'] = floors
compare('against nanoGPT', ours_name, 'nanoGPT', 12)
compare('against nanoGPT, long', f'{ours_name}, long', 'nanoGPT, long', 60)
best = max((name for name in rate if name.startswith('transformers')), key=lambda name: max(rate[name]), default='')
compare(f'against {best}', ours_name, best, 3)
compare('share of the floor', ours_name, 'floor', 0.7)
compare('int8 against ' + dtype, 'int8, compiled', ours_name, 1.5)
compare(f'batch of {batch} against 1', f'{dtype}, batch of {batch}', ours_name, 6)

print(common.heading('bench/generate.py'))
rows = [('', 'tokens/s', 'first', 'third')]
rows += [(name, common.show(common.spread(values)), *(f'{s:.1f} s' for s in first.get(name, ())), '', '')[:4]
         for name, values in rate.items()]
print(common.table(rows), '\n')
print(common.table([('ratio, within a round', 'median', 'bar'),
                    *((label, common.show(figures, '', '{:.2f}'), bar) for label, (figures, bar) in ratios.items())]))
common.finish('generate', rounds, tokens_per_second={name: common.spread(values) for name, values in rate.items()},
              first_and_third_token_s={name: [round(s, 2) for s in pair] for name, pair in first.items()},
              ratios={label: figures for label, (figures, _) in ratios.items()})
