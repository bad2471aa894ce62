"""
Sample text from a checkpoint of this repository or of nanoGPT, or from GPT-2.

    $ python sample.py --out_dir=out-shakespeare-char
    $ python sample.py --init_from=gpt2-xl --start="What is it?" --num_samples=5
    $ python sample.py --start=FILE:prompt.txt --temperature=0 --num_samples=1

The samples are generated as one batch. The first is printed as it comes, the
others when all are done.
"""

import sys
from contextlib import nullcontext

import torch

import checkpoint
import parallel
from configurator import explain_errors, override
from generate import generate_texts

sys.stdout.reconfigure(errors='replace')  # a terminal that can't show a character still gets the rest

# settings ------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': a checkpoint in out_dir; or a Hugging Face folder, a hub id, 'gpt2' to 'gpt2-xl'
out_dir = 'out'  # where train.py wrote ckpt.pt and best.pt
which = 'best'  # 'best': best.pt where there is one, else ckpt.pt; 'last': ckpt.pt
start = '\n'  # the prompt, or FILE:path of a text file that holds it
num_samples = 10  # how many to draw
max_new_tokens = 500  # tokens in each
temperature = 0.8  # 1.0: as the model says; lower: less random; 0: always the likeliest token
top_k: int | None = 200  # only the k likeliest tokens; None or 0: all
top_p: float | None = None  # only the likeliest tokens that together have this probability; None: all
stop = ''  # end a sample before this text; '': never
seed = 1337
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype = 'auto'  # 'auto', 'float32', 'bfloat16' or 'float16'
compile = False  # True: torch.compile the model; pays only for many tokens
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

sys.excepthook = explain_errors
for name, is_valid, expected in (
    ('num_samples', num_samples >= 1, '1 or more'),
    ('max_new_tokens', max_new_tokens >= 0, '0 or more'),
    ('temperature', temperature >= 0, '0 or more'),
    ('top_k', top_k is None or top_k >= 0, '1 or more, or None'),
    ('top_p', top_p is None or 0 < top_p <= 1, 'a probability above 0, or None'),
    ('which', which in ('best', 'last'), "'best' or 'last'"),
):
    if not is_valid:
        raise ValueError(f'{name}={config[name]!r}: expected {expected}')

# the model and its tokenizer
device = parallel.choose_device(device)
model, text_tokenizer, _, line = checkpoint.open_model(init_from, out_dir, which)
print(line)
model.to(device)
# on the CPU 'auto' is fp32: converting every weight for every token costs more than bf16 saves
dtype = 'float32' if dtype == 'auto' and device.type == 'cpu' else parallel.choose_dtype(dtype, device)[0]
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device.type, parallel.DTYPES[dtype])
if compile:
    torch._dynamo.config.suppress_errors = True  # without a working compiler: a warning, and go on without
    model.compile(dynamic=True)

prompt = start
if start.startswith('FILE:'):
    try:
        with open(start[len('FILE:') :], encoding='utf-8') as f:
            prompt = f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'start={start!r}: {error}') from error

# the first sample as it comes, without the tail that may yet turn out to be the beginning of `stop`
printed, texts = 0, [''] * num_samples
with autocast:
    for texts, done in generate_texts(model, text_tokenizer, prompt, num_samples, max_new_tokens, stop, seed,
                                      temperature=temperature, top_k=top_k or None, top_p=top_p,
                                      cache_dtype=parallel.DTYPES[dtype]):
        first = prompt + texts[0]
        safe = len(first) if done[0] else max(len(prompt), len(first) - max(0, len(stop) - 1))
        print(first[printed:safe], end='', flush=True)
        printed = max(printed, safe)
print((prompt + texts[0])[printed:] + '\n---------------')
for text in texts[1:]:
    print(prompt + text + '\n---------------')
