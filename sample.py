"""
Sample text from a model: of train.py or nanoGPT, of Hugging Face, or GPT-2.

    $ python sample.py --out_dir=out-shakespeare-char
    $ python sample.py --init_from=gpt2-xl --start="What is it?" --num_samples=5
    $ python sample.py --start=FILE:prompt.txt --temperature=0 --num_samples=1
    $ python sample.py --start="A person: " --json_schema=person.json

All samples are one batch. The first is printed as it grows, the others at the end.
A file of prompts: python -m flatgpt.batch. A conversation: python -m posttrain.chat.
"""

import os
import sys
from typing import Literal

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

from configurator import Count, Natural, NonNegative, Positive, Probability, Seed, Share, override
from flatgpt import decoding, output
from flatgpt.files import read_text
from flatgpt.generate import generate_texts
from flatgpt.sampling import Sampling
from tokenizer.chat import encode_prompt

output.protect()

# settings -----------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': out_dir; or 'gpt2' to 'gpt2-xl', a Hugging Face folder, a hub id
out_dir = 'out'  # folder of train.py's ckpt.pt and best.pt
which: Literal['best', 'last'] | Count = 'best'  # best.pt if there is one; ckpt.pt; ckpt-STEP.pt
start = '\n'  # the prompt, or FILE:path of a text file that holds it
crop_prompt = False  # True: keep the end of a prompt longer than the context; False: refuse it
num_samples: Count = 10  # samples to draw
max_new_tokens: Natural = 500  # tokens in each
slide: Count = 1  # tokens that a full context drops at once; 1 is exact, more are faster
lookup: Natural = 8  # tokens that repeats let it guess at once, in a single sample; 0: none
# choice of the next token
temperature: NonNegative = 0.8  # 1: the model's own; lower: less random; 0: the likeliest
top_k: Natural | None = 200  # only the k likeliest tokens; None or 0: all
top_p: Share | None = None  # only the likeliest tokens that together have this probability
min_p: Probability | None = None  # only tokens with this share of the largest probability
repetition_penalty: Positive = 1.0  # above 1: earlier tokens become less likely
seed: Seed = 1337  # fixes each sample; in float32 also the number of samples does not matter
stop = ''  # end before this text, or before one of a JSON list of texts
# form of the text: at most one of these
choices = ''  # one of these texts: yes,no,maybe or a JSON list
regex = ''  # a text that this regular expression matches as a whole
json_schema = ''  # JSON of this schema: {...} or the path of a file
# machine
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
quantize: Literal['', 'int8'] = ''  # 'int8': 8-bit weights, on a CPU the fastest for one sample
compile: bool | Literal['auto'] = 'auto'  # compile the code of a step; pays for many tokens
config = override(globals())
# --------------------------------------------------------------------------------------------------

# open the model
model, tokenizer, _, line = decoding.open_model(config)
block_size = model.config.block_size

# read the prompt and the constraint
prompt = read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start
prompt_ids = encode_prompt(prompt, tokenizer, block_size, crop_prompt)
stops = decoding.split_texts('stop', stop)
sampling = Sampling(
    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, slide=slide,
    lookup=lookup, stops=stops, num_samples=num_samples, seed=seed,
    constraint=decoding.constraint_of(config, tokenizer))

# choose device, precision and compilation
decoding.prepare(model, config, num_samples, max_new_tokens)
print(line, flush=True)

# sample, and print the first sample as it grows
printed = 0
with decoding.explain_out_of_memory('use a smaller --num_samples'):
    decoding.warm_up(model, generate_texts(model, tokenizer, [prompt_ids], sampling))
    for samples in generate_texts(model, tokenizer, [prompt_ids], sampling):
        text = prompt + samples[0].shown(stops)
        print(decoding.for_terminal(text[printed:]), end='', flush=True)
        printed = len(text)

# print the rest
for sample in samples:
    print(decoding.for_terminal((prompt + sample.text)[printed:]), '---------------', sep='\n')
    printed = 0
