"""
Measure serve.py: streams at once, waiting for the first token, shared prompts.

    $ python -m bench.serve                              # two CPU cores: 5 minutes
    $ python -m bench.serve --rounds=1 --new_tokens=50   # a quick look

The model is GPT-2 124M with random weights. A client in this process reads the
streams of a server in another one, so that both share the cores. It compares one
stream with sample.py's loop in this process, compiled, and eight streams with
transformers' generate() of a batch of eight, the better of bf16 and fp32. Prompts
have 32 tokens. The first token of a long prompt is timed alone and while four
streams run, and the longest gap between two tokens of these four is taken. The
bars on two CPU cores: eight streams with 3 times the tokens per second of one, and
above transformers'; one stream with 0.9 of sample.py's; the first token of 512 in
1.5 times its time alone, no gap over 0.3 s; a prompt whose first 400 tokens were
sent before in a tenth.
"""

import http.client
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict

import torch

import tokenizer
from bench import common
from configurator import Count, NonNegative, UserError, override
from flatgpt import quantize, runtime
from flatgpt.generate import Sampling, generate
from model import GPT, GPTConfig

# Settings -----------------------------------------------------------------------------------------
transformers = True  # compare with transformers' generate, if it is installed
rounds: Count = 3
streams: Count = 8  # at once
prompt_tokens: Count = 32
new_tokens: Count = 200
long_prompt: Count = 512  # tokens of the prompt whose first token is timed
beside: Count = 4  # streams that run meanwhile
shared_tokens: Count = 400  # of the system prompt that is sent again
n_layer: Count = 12  # of the model; the defaults are GPT-2's 124M
n_head: Count = 12
n_embd: Count = 768
vocab_size: Count = 50304
wait: NonNegative = 0  # most seconds to wait for a quiet machine before each round
config = override(globals())
# --------------------------------------------------------------------------------------------------

CONTROLS = {'temperature': 0.8, 'top_k': 200}
torch.manual_seed(0)
model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)).eval()
numbers = torch.Generator().manual_seed(0)


def prompt_of(n):
    """Return n random ids."""
    return torch.randint(256, (n,), generator=numbers).tolist()


def start_server(folder):
    """Save the model and serve it; -> (process, port)."""
    state = {'version': 1, 'model': model.state_dict(), 'model_args': asdict(model.config),
             'iter_num': 1, 'best_val_loss': 11.0, 'config': {}, 'chat_template': None,
             'tokenizer': tokenizer.ByteTokenizer().to_dict()}
    torch.save(state, os.path.join(folder, 'ckpt.pt'))
    process = subprocess.Popen([sys.executable, 'serve.py', f'--out_dir={folder}', '--port=0'],
                               cwd=common.ROOT, env=common.environment(), text=True,
                               stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith('http://'):
            return process, int(line.split()[0].rpartition(':')[2])
    raise UserError('serve.py has ended; expected a server')


def stream(port, prompt, n):
    """Return the times at which n tokens came, in seconds after the request."""
    connection = http.client.HTTPConnection('127.0.0.1', port)
    # tokens of which the text is empty come with their log-probability
    body = {'prompt': prompt, 'max_tokens': n, 'stream': True, 'logprobs': 0, **CONTROLS}
    began, times = time.perf_counter(), []
    connection.request('POST', '/v1/completions', json.dumps(body))
    for line in connection.getresponse():
        if line.startswith(b'data: {'):
            choice = json.loads(line[6:])['choices'][0]
            n_tokens = len(choice['logprobs']['tokens']) if choice['logprobs'] else 0
            times += [time.perf_counter() - began] * n_tokens
    connection.close()
    return times


def together(calls):
    """Run functions in threads; -> their results."""
    results = [None] * len(calls)

    def run(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def rate_of(n_streams):
    """Return the tokens per second of all streams together, with their prompts."""
    prompts = [prompt_of(prompt_tokens) for _ in range(n_streams)]
    began = time.perf_counter()
    times = together([lambda prompt=prompt: stream(port, prompt, new_tokens) for prompt in prompts])
    return sum(map(len, times)) / (time.perf_counter() - began)


def first_token(prompt):
    """Return the seconds to the first token behind a prompt."""
    return stream(port, prompt, 2)[0]


def first_beside_streams():
    """Return the seconds to a first token while streams run, and their longest gap."""
    firsts, n = [], new_tokens
    prompts = [prompt_of(prompt_tokens) for _ in range(beside)]

    def ask():
        time.sleep(0.7)  # the streams run by then
        firsts.append(first_token(prompt_of(long_prompt)))

    *times, _ = together([lambda prompt=prompt: stream(port, prompt, n) for prompt in prompts]
                         + [ask])
    gaps = [b - a for own in times for a, b in zip(own, own[1:], strict=False)]
    return firsts[0], max(gaps)


def again():
    """Return the seconds to the first token of a prompt, and of one that shares it."""
    shared = prompt_of(shared_tokens)
    return tuple(first_token(shared + prompt_of(10)) for _ in range(2))


def of_sample():
    """Return a function that measures the tokens per second of sample.py's loop."""
    decoding = quantize.for_decoding(model, torch.bfloat16, compile=True)

    def measure():
        began = time.perf_counter()
        steps = generate(decoding, [prompt_of(prompt_tokens)], Sampling(new_tokens, 0.8, 200))
        return sum(1 for _ in steps) / (time.perf_counter() - began)

    return measure


def of_transformers(dtype):
    """Return a function that measures the tokens per second of transformers' batch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd, 'vocab_size': vocab_size}
    peer = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    peer = peer.eval().to(runtime.DTYPES[dtype])

    def measure():
        idx, began = torch.tensor([prompt_of(prompt_tokens) for _ in range(streams)]), (
            time.perf_counter())
        with torch.no_grad():
            peer.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new_tokens,
                          do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)
        return streams * new_tokens / (time.perf_counter() - began)

    return measure


with tempfile.TemporaryDirectory() as folder:
    process, port = start_server(folder)
    runtime.use_cores()
    rates = {'one stream': lambda: rate_of(1), f'{streams} streams': lambda: rate_of(streams),
             'sample.py, compiled': of_sample()}
    if transformers and importlib.util.find_spec('transformers'):
        rates |= {f'transformers, batch of {streams}, {dtype}': of_transformers(dtype)
                  for dtype in ('bfloat16', 'float32')}
    for measure in rates.values():  # warm up
        measure()
    values = {name: [] for name in rates}
    firsts = {'alone': [], f'beside {beside}': [], 'gap': [], 'new': [], 'again': []}
    try:
        for _ in range(rounds):
            common.wait_for_quiet(wait)
            for name, measure in rates.items():
                values[name].append(measure())
            firsts['alone'].append(first_token(prompt_of(long_prompt)))
            seconds, gap = first_beside_streams()
            firsts[f'beside {beside}'].append(seconds)
            firsts['gap'].append(gap)
            new, same = again()
            firsts['new'].append(new)
            firsts['again'].append(same)
    finally:
        process.terminate()
        process.wait()


def ratio(a, b):
    """Return the spread of ratios within each round."""
    return common.spread([x / y for x, y in zip(a, b, strict=True)])


# report
peers = [name for name in values if name.startswith('transformers')]
best = max(peers, key=lambda name: sum(values[name]), default=None)
many, one = values[f'{streams} streams'], values['one stream']
ratios = {f'{streams} streams against one': (ratio(many, one), '3'),
          'one stream against sample.py': (ratio(one, values['sample.py, compiled']), '0.9'),
          f'first token of {long_prompt} beside {beside} streams': (
              ratio(firsts[f'beside {beside}'], firsts['alone']), 'at most 1.5'),
          f'first token behind {shared_tokens} tokens sent before': (
              ratio(firsts['again'], firsts['new']), 'at most 0.1')}
if best:
    ratios[f'{streams} streams against transformers'] = ratio(many, values[best]), '1'
print(common.heading('serve'))
print(common.table([('', 'tokens/s'), *((name, common.show(common.spread(own)))
                                        for name, own in values.items())]), '\n')
print(common.table([('', 'seconds'), *((name, common.show(common.spread(own), '', '{:.3f}'))
                                       for name, own in firsts.items())]), '\n')
print(common.table([('ratio, within a round', 'median', 'bar'),
                    *((name, common.show(own, '', '{:.2f}'), bar)
                      for name, (own, bar) in ratios.items())]))
common.finish('serve', rounds,
              tokens_per_second={name: common.spread(own) for name, own in values.items()},
              seconds={name: common.spread(own) for name, own in firsts.items()},
              ratios={name: own for name, (own, _) in ratios.items()})
