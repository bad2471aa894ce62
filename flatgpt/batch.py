"""
Sample continuations of many prompts, from a file of JSON lines into another.

    $ python -m flatgpt.batch --prompts=in.jsonl --out=out.jsonl --out_dir=out
    $ python -m flatgpt.batch --prompts=in.jsonl --out=out.jsonl --best_of=8
    $ torchrun --standalone --nproc_per_node=8 \\
        -m flatgpt.batch --prompts=in.jsonl --out=out.jsonl

A line of prompts is {"prompt": "text"}, {"ids": [1, 2]} or {"messages": [{"role":
"user", "content": "text"}]}, the same kind in all lines. Its other keys are copied.
A line of results has in addition "samples", a list of {"text", "finish"}. finish is
'stop' (a stop text, or the end of the answer), 'complete' (the constraint) or
'length'. --logprobs adds "tokens" and "logprobs" to each sample, --vote adds
"answer" and "votes" to the line. The order of lines is kept.

All prompts are checked before the first is sampled. The same command continues a
run that was killed, with any number of processes: they share the batches, which stay
as they are.
"""

import re
import time
from typing import Literal

from tqdm import tqdm

import tokenizer as tokenizers
from configurator import (
    Count,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Seed,
    Share,
    UserError,
    override,
)
from flatgpt import decoding, jsonl, output, parallel, shares
from flatgpt.files import read_text
from flatgpt.generate import generate_texts
from flatgpt.sampling import Sampling, likeliest, majority
from tokenizer.chat import encode_prompt, find_endings, render

output.protect(drop=True)

# settings -----------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': out_dir; or 'gpt2' to 'gpt2-xl', a Hugging Face folder, a hub id
out_dir = 'out'  # folder of train.py's ckpt.pt and best.pt
which: Literal['best', 'last'] | Count = 'best'  # best.pt if there is one; ckpt.pt; ckpt-STEP.pt
prompts = ''  # FILE.jsonl, see above
out = ''  # FILE.jsonl to write the results to
crop_prompt = False  # True: keep the end of prompts longer than the context; False: refuse them
num_samples: Count = 1  # samples of each prompt
max_new_tokens: Natural = 500  # tokens in each
batch_size: Count = 16  # samples to draw at once
slide: Count = 1  # tokens that a full context drops at once; 1 is exact, more are faster
# choice of the next token
temperature: NonNegative = 0.8  # 1: the model's own; lower: less random; 0: the likeliest
top_k: Natural | None = 200  # only the k likeliest tokens; None or 0: all
top_p: Share | None = None  # only the likeliest tokens that together have this probability
min_p: Probability | None = None  # only tokens with this share of the largest probability
repetition_penalty: Positive = 1.0  # above 1: earlier tokens become less likely
seed: Seed = 1337  # fixes each sample; in float32 the batch does not matter
stop = ''  # end before this text, or before one of a JSON list of texts
# form of the text: at most one of these
choices = ''  # one of these texts: yes,no,maybe or a JSON list
regex = ''  # a text that this regular expression matches as a whole
json_schema = ''  # JSON of this schema: {...} or the path of a file
# choice among samples
best_of: Natural = 0  # n: draw n for each sample and keep the likeliest; 0: draw one
vote = ''  # regular expression that matches the answer in a sample; counts the answers of a prompt
logprobs = False  # True: add the log-probability of each token, before any control
# machine
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
quantize: Literal['', 'int8'] = ''  # 'int8': 8-bit weights, on a CPU the fastest for one sample
compile: bool | Literal['auto'] = 'auto'  # compile the code of a step; pays for many tokens
config = override(globals())
# --------------------------------------------------------------------------------------------------

if not prompts or not out:
    raise UserError(f'prompts={prompts!r}, out={out!r}: expected two files, '
                    f'--prompts=IN.jsonl --out=OUT.jsonl')
try:
    re.compile(vote)
except re.error as error:
    raise UserError(f'vote={vote!r} is no regular expression: {error}') from error


def encode_line(value, kind):
    """Encode the prompt of a line, value[kind] -> ids. Raises UserError."""
    taken = [key for key in ('samples', *(('answer', 'votes') if vote else ())) if key in value]
    if taken:
        raise UserError(f'{taken[0]!r} is a key of the results; rename this one')
    if [key for key in KINDS if key in value] != [kind]:
        raise UserError('expected "prompt", "ids" or "messages", the same in every line')
    prompt, n_ids = value[kind], model.config.vocab_size
    if kind == 'messages':
        prompt = render(prompt, template, tokenizer)
    elif kind == 'prompt' and not isinstance(prompt, str):
        raise UserError('"prompt": expected a text')
    elif kind == 'ids' and not (isinstance(prompt, list) and all(
            type(i) is int and 0 <= i < n_ids for i in prompt)):
        raise UserError(f'"ids": expected a list of whole numbers from 0 to {n_ids - 1}')
    if not prompt:
        raise UserError(f'"{kind}" is empty: expected at least one token')
    return encode_prompt(prompt, tokenizer, block_size, crop_prompt)


def result_of(samples):
    """Return the entries that the samples of a prompt add to its line."""
    if best_of:
        samples = [likeliest(samples[i : i + best_of]) for i in range(0, len(samples), best_of)]
    result = {'samples': [{'text': sample.text, 'finish': sample.finish} for sample in samples]}
    if logprobs:
        for entry, sample in zip(result['samples'], samples, strict=True):
            entry |= {'tokens': sample.ids, 'logprobs': sample.logprobs}
    if vote:
        votes = majority([sample.text for sample in samples], vote)
        result |= {'answer': votes[0][0] if votes else None, 'votes': votes}
    return result


def keep(finished):
    """Write those of {line number: result} that are not written, in the main process."""
    for number in set(finished) - set(results.done) if results else ():
        results.add(number, finished[number])
        bar.update()


# join the other processes, and open the model
world, _ = shares.join(device)
model, tokenizer, template, line = decoding.open_model(config)
block_size = model.config.block_size

# read and check the prompts
KINDS = ('prompt', 'ids', 'messages')
lines, prompt_ids = jsonl.read_objects(prompts), {}  # both by line number
if not lines:
    raise UserError(f'{prompts} has no prompts: expected lines such as {{"prompt": "text"}}')
kind = next((key for key in KINDS if key in next(iter(lines.values()))), None)
for number, value in lines.items():
    try:
        prompt_ids[number] = encode_line(value, kind)
    except UserError as error:
        raise UserError(f'{prompts}, line {number}: {error}') from None

# find the ends of a sample
constraint = decoding.constraint_of(config, tokenizer)
stops, stop_ids = decoding.split_texts('stop', stop), set()
if kind == 'messages':
    stop_ids, endings = find_endings(template, tokenizer)
    stops += endings * (constraint is None)
rows = num_samples * max(1, best_of)  # samples of one prompt
sampling = Sampling(
    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop_ids=stop_ids,
    slide=slide, stops=stops, num_samples=rows, seed=seed, constraint=constraint)

# choose device, precision and compilation
at_once = max(rows, batch_size)
dtype = decoding.prepare(model, config, at_once, max_new_tokens, world.local_rank)
print(line, flush=True)

# open the results; the digest covers all that they depend on. Batches change only the rounding,
# which float32 makes too small to matter
if json_schema and not json_schema.lstrip().startswith(('{', '[')):
    config['json_schema'] = read_text(json_schema)
weights = [tensor.flatten()[:8].tolist() for tensor in model.state_dict().values()]
config |= {'prompts': '', 'out': '', 'batch_size': 0 if dtype == 'float32' else batch_size}
digest = tokenizers.digest({'settings': config, 'weights': weights,
                            'tokenizer': tokenizer.to_dict(), 'prompts': list(lines.items())})
world.check_alike({**config, 'dtype': dtype, 'digest': digest})
n_tokens, started = 0, time.perf_counter()
smaller = 'batch_size' if batch_size > rows else 'best_of' if best_of else 'num_samples'
with jsonl.writing(out, world.is_main):
    with shares.together(world):  # the main process alone writes
        results = jsonl.Results(out, digest) if world.is_main else None
    done = world.from_main(set(results.done) if results else None)
    bar = tqdm(total=len(lines), initial=len(done), unit='prompt', leave=False, dynamic_ncols=True,
               disable=None if world.is_main else True, miniters=0)

    # sample prompts of similar lengths together, the longest first: memory runs out early or never
    waiting = sorted(set(lines) - done, key=lambda number: -len(prompt_ids[number]))
    size = max(1, batch_size // rows)
    batches = [waiting[i : i + size] for i in range(0, len(waiting), size)]
    for first in range(0, len(batches), world.size):  # a batch for each process
        numbers, n_before = next(iter(batches[first + world.rank :]), []), n_tokens
        batch, finished = [prompt_ids[number] for number in numbers], {}
        with (shares.together(world),
              decoding.explain_out_of_memory(f'use a smaller --{smaller}')):
            if batch and first == 0:
                decoding.warm_up(model, generate_texts(model, tokenizer, batch, sampling, numbers))
            steps = generate_texts(model, tokenizer, batch, sampling, numbers) if batch else ()
            for samples in steps:
                for k, number in enumerate(numbers):
                    group = samples[k * rows : (k + 1) * rows]
                    if number not in finished and all(sample.finish for sample in group):
                        finished[number] = result_of(group)
                        keep({number: finished[number]})
                n_tokens = n_before + sum(len(sample.ids) for sample in samples)
                rate = n_tokens / (time.perf_counter() - started)
                bar.set_postfix_str(f'{rate:,.0f} tokens/s', refresh=False)
                bar.update(0)
        n_tokens = n_before + int(world.sum([n_tokens - n_before])[0])
        parts = shares.gather([finished], world)
        with shares.together(world):
            for part in parts:
                keep(part)
    bar.close()

    # write the results in the order of the prompts
    with shares.together(world):
        if results:
            results.finish(lines)
parallel.disconnect()
seconds = time.perf_counter() - started
print(f'{out}: {len(lines):,} prompts, {n_tokens:,} tokens in {seconds:.1f} s')
