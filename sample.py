"""
Sample text from a checkpoint of this repository or of nanoGPT, from GPT-2, or
from a folder of Hugging Face's; or talk to it.

    $ python sample.py --out_dir=out-shakespeare-char
    $ python sample.py --init_from=gpt2-xl --start="What is it?" --num_samples=5
    $ python sample.py --start=FILE:prompt.txt --temperature=0 --num_samples=1
    $ python sample.py --start="A person: " --json_schema=person.json
    $ python sample.py --prompts=questions.jsonl --out=answers.jsonl
    $ python sample.py --init_from=FOLDER --chat

The samples are generated as one batch. The first is printed as it comes, the
others when all are done.

Each line of a file of prompts is {"prompt": "text"}, {"ids": [1, 2]} or
{"messages": [{"role": "user", "content": "text"}]}, and may have other keys,
which are copied. The line of the result is the same with "samples", a list of
{"text", "finish"}. finish: 'stop' (a stop text, or the end of the answer),
'complete' (the constraint) or 'length'. --logprobs adds "tokens" and "logprobs"
to a sample, --vote "answer" and "votes" to a line. A run that was killed goes
on where it was when the same command is given again.
"""

import json
import math
import re
import sys
import textwrap
import time

import torch
from tqdm import tqdm

import tokenizer
from configurator import UserError, check, explain_errors, override
from flatgpt import jsonl, runtime
from flatgpt import quantize as quantization
from flatgpt.constrain import Constraint
from flatgpt.generate import Sampling, encode_prompt, generate_texts, likeliest, majority
from flatgpt.pretrained import open_model
from posttrain.chat import converse, for_terminal
from posttrain.tools import PYTHON_END, SYSTEM, check_tokenizer, output_of
from tokenizer.chat import find_endings, render

sys.stdout.reconfigure(errors='replace')  # a terminal that can't show a character still gets the rest

# settings ------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': a checkpoint in out_dir; or a Hugging Face folder, a hub id, 'gpt2' to 'gpt2-xl'
out_dir = 'out'  # where train.py wrote ckpt.pt and best.pt
which = 'best'  # 'best': best.pt where there is one, else ckpt.pt; 'last': ckpt.pt
start = '\n'  # the prompt, or FILE:path of a text file that holds it
prompts = ''  # many prompts instead: FILE.jsonl, see above
out = ''  # their results: FILE.jsonl
chat = False  # True: talk at the terminal, in the model's chat format if it has one
system = ''  # what the chat begins with: who the assistant is, what it should do
tools = False  # True: the chat also begins with "You have a calculator.", and the model may call it, see calculator.py
crop_prompt = False  # True: of a prompt longer than the context the model sees the end; False: refuse it
num_samples = 10  # how many to draw of each prompt; a chat has one answer
max_new_tokens = 500  # tokens in each
batch_size = 16  # prompts of a file times samples at once
slide = 1  # tokens a full context drops at once; 1: exact, a pass over all of it for each; more: depends on the batch

# which token comes next
temperature = 0.8  # 1.0: as the model says; lower: less random; 0: always the likeliest token
top_k: int | None = 200  # only the k likeliest tokens; None or 0: all
top_p: float | None = None  # only the likeliest tokens that together have this probability; None: all
min_p: float | None = None  # only tokens at least this times as likely as the likeliest; None: all
repetition_penalty = 1.0  # above 1: tokens that were there already become less likely
seed = 1337  # a sample depends on it and its own number, in float32 not on the batch it is in
stop = ''  # end a sample before this text, or one of a JSON list of texts; '': never

# what the text has to be: at most one of these
choices = ''  # one of these texts: yes,no,maybe or a JSON list
regex = ''  # a text that this regular expression matches as a whole
json_schema = ''  # JSON of this schema: {...} or the path of a file

# which samples are worth keeping
best_of = 0  # n: draw n for every sample and keep the likeliest; 0: do not
vote = ''  # a regular expression that finds the answer in a sample: count the answers of all, the most frequent first
logprobs = False  # True: also the log-probability of every token, before any of the controls

# the machine
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype = 'auto'  # 'auto', 'float32', 'bfloat16' or 'float16'
quantize = ''  # 'int8': weights of 8 bits; on a CPU the fastest, one sample at a time and compiled
compile: bool | str = 'auto'  # torch.compile the step of one token; pays for many tokens
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

sys.excepthook = explain_errors
check(config, (
    ('which', lambda value: value in ('best', 'last'), "'best' or 'last'"),
    ('num_samples batch_size slide', lambda value: value >= 1, '1 or more'),
    ('max_new_tokens', lambda value: value >= 0, '0 or more'),
    ('temperature', lambda value: 0 <= value < math.inf, '0 or more'),
    ('top_k', lambda value: value is None or value >= 0, '1 or more, or None'),
    ('top_p', lambda value: value is None or 0 < value <= 1, 'a probability above 0, or None'),
    ('min_p', lambda value: value is None or 0 <= value <= 1, 'a probability, or None'),
    ('repetition_penalty', lambda value: 0.01 <= value <= 100, '0.01 to 100'),
    ('seed', lambda value: 0 <= value < 2**64, '0 or more, of 64 bits'),
    ('best_of', lambda value: value == 0 or value >= 2, '2 or more, or 0'),
    ('quantize', lambda value: value in ('', 'int8'), "'' or 'int8'"),
    ('dtype', lambda value: value == 'auto' or not quantize,
     f"'auto' with --quantize={quantize}, which is a precision itself"),
    ('chat', lambda value: not (value and (prompts or best_of or vote or logprobs)),
     'no prompts, best_of, vote or logprobs beside it'),
    ('system tools', lambda value: chat or not value, 'a chat, with --chat'),
    ('prompts', lambda value: not value or out, 'also a file for the results: --out=FILE.jsonl'),
    ('out', lambda value: not value or prompts, 'also the prompts: --prompts=FILE.jsonl'),
    ('stop', lambda value: not value or not (choices or regex or json_schema),
     "'' with choices, regex or json_schema, which say themselves where the text ends"),
    ('regex', lambda value: sum(map(bool, (choices, value, json_schema))) <= 1,
     'only one of choices, regex and json_schema'),
))
try:
    re.compile(vote)
except re.error as error:
    raise UserError(f'vote={vote!r} is no regular expression: {error}') from error


def read_file(path, setting):
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{setting}={config[setting]!r}: {error}') from error


def split_list(setting, separator=None):
    """The texts of a setting that is a JSON list, or several with a separator between them, or one, or none."""
    text = config[setting]
    if text.startswith('['):
        try:
            texts = json.loads(text)
        except ValueError:
            texts = None
        if not (isinstance(texts, list) and texts and all(isinstance(one, str) and one for one in texts)):
            raise UserError(f'{setting}={text!r} begins as a JSON list does; expected one of texts: ["a", "b"]')
        return texts
    if separator:
        return [one.strip() for one in text.split(separator)]
    return [text] if text else []


# the model, its tokenizer, what its text has to be
device = runtime.choose_device(device)
model, text_tokenizer, template, line = open_model(init_from, out_dir, which)
block_size = model.config.block_size
if slide > block_size:
    raise UserError(f'slide={slide}: expected 1 to {block_size}, the context of the model')
stops, stop_ids, constraint = split_list('stop'), set(), None
if json_schema and not json_schema.lstrip().startswith(('{', '[')):
    json_schema = read_file(json_schema, 'json_schema')
if choices or regex or json_schema:

    constraint = Constraint(text_tokenizer, choices=split_list('choices', ',') if choices else None,
                            regex=regex or None, json_schema=json_schema or None)
    constraint.check_length(max_new_tokens)

# precision, compilation
rows = num_samples * max(1, best_of)  # of one prompt
at_once = 1 if chat else max(rows, batch_size) if prompts else rows
runtime.use_cores()
if device.type == 'cpu':
    runtime.keep_freed_memory()
if quantize:
    dtype, dtype_reason = quantize, 'as set'
elif dtype == 'auto' and device.type == 'cpu':
    # a token of a large model costs the reading of its weights; those of a small one are in the caches
    is_large = model.get_num_params() > 30e6 and quantization.has_bf16_products()
    dtype, dtype_reason = ('bfloat16', 'half as much to read') if is_large else ('float32', 'small, or no bf16 here')
else:
    dtype, dtype_reason = runtime.choose_dtype(dtype, device)
is_long = quantize or device.type == 'cuda' or chat or at_once == 1 and max_new_tokens >= 1000
compile, compile_reason = runtime.choose_compile(compile, device, math.inf if is_long else 0)
threads = f' (threads: {torch.get_num_threads()})' if device.type == 'cpu' else ''
print(textwrap.fill(f'device {device}{threads}, dtype {dtype} ({dtype_reason}), compile {compile} ({compile_reason})',
                    80, subsequent_indent='  '), file=sys.stderr, flush=True)
print(line, flush=True)
quantization.for_decoding(model.to(device), torch.int8 if quantize else runtime.DTYPES[dtype], compile)
model.has_compiled_step = compile and (device.type != 'cpu' or at_once == 1)  # a last, smaller batch is not worth it


def draw(batch, numbers, n):
    """generate_texts() with all the settings: n samples of each prompt, a list of ids, of the batch."""
    try:
        yield from generate_texts(model, text_tokenizer, batch, Sampling(
            max_new_tokens, temperature, top_k or None, top_p, min_p, repetition_penalty, stop_ids=stop_ids,
            slide=slide, stops=stops, num_samples=n, seed=seed, constraint=constraint), numbers)
    except RuntimeError as error:
        if not runtime.out_of_memory(error):
            raise
        smaller = 'batch_size' if len(batch) > 1 else 'best_of' if best_of else 'num_samples'
        raise SystemExit(f'out of memory with {len(batch) * n} samples at once; try a smaller --{smaller}') from None


def warm_up(batch, n):
    """Compile the step, if it will be, with two tokens of this batch; where that fails, go on without."""
    if not model.has_compiled_step:
        return
    print('compiling the step of one token (--compile=False starts at once)', file=sys.stderr, flush=True)
    try:
        for step, _ in enumerate(draw(batch, None, n)):
            if step == 2:
                break
    except ValueError:  # not of a compiler
        raise
    except Exception as error:  # whatever is wrong with a compiler
        why = f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'
        print(f'WARNING: torch.compile failed ({why}); going on without it, slower. --compile=False silences this',
              file=sys.stderr, flush=True)
        model.has_compiled_step = False
        torch.compiler.set_stance('force_eager')


def keep(samples):
    """The samples, or the likeliest of each best_of."""
    return [likeliest(samples[i : i + best_of]) for i in range(0, len(samples), best_of)] if best_of else samples


# a chat --------------------------------------------------------------------------------------------------------------
if chat:
    stop_ids, ends = find_endings(template, text_tokenizer)
    stops += ends * (constraint is None)
    if tools:
        if template is None:
            raise UserError('tools=True: expected a chat model, one trained on conversations')
        check_tokenizer(text_tokenizer)
        system = f'{system} {SYSTEM}'.strip()

    def answer(ids, number):
        """The text of an answer as it grows; one that calls the calculator goes on with what it is told."""
        said, left, n_calls = '', max_new_tokens, 0
        while left > 0:
            for [sample] in draw([ids[-block_size:]], [number + n_calls * 2**16], 1):  # a call: other random numbers
                yield said + sample.shown(stops)
                has_called = tools and sample.ids[-1:] == [text_tokenizer.special_tokens[PYTHON_END]]
                if has_called or len(sample.ids) == left:
                    break
            if not has_called:
                return
            told = output_of(sample.ids, text_tokenizer)
            ids, left, n_calls = ids + sample.ids + told, left - len(sample.ids) - len(told), n_calls + 1
            said += sample.text + text_tokenizer.decode(told)
            yield said

    print('it was trained on chats' if template else 'it has no chat format, so it continues a transcript of one')
    first = [{'role': 'system', 'content': system}] * bool(system) + [{'role': 'user', 'content': 'Hello'}]
    warm_up([render(first, template, text_tokenizer)[-block_size:]], 1)
    converse(answer, template, text_tokenizer, block_size - min(max_new_tokens, block_size // 2), system)
    raise SystemExit


# one prompt ----------------------------------------------------------------------------------------------------------
if not prompts:
    prompt = read_file(start[len('FILE:') :], 'start') if start.startswith('FILE:') else start
    ids, printed = encode_prompt(prompt, text_tokenizer, block_size, crop_prompt), 0
    warm_up([ids], rows)
    for samples in draw([ids], [0], rows):
        if not best_of:
            shown = prompt + samples[0].shown(stops)
            print(for_terminal(shown[printed:]), end='', flush=True)
            printed = len(shown)
    samples = keep(samples)
    for sample in samples:
        print(for_terminal((prompt + sample.text)[printed:]))
        printed = 0
        if logprobs:
            for i, logprob in zip(sample.ids, sample.logprobs, strict=True):
                token = text_tokenizer.decode_bytes([i]).decode('utf-8', 'backslashreplace')
                print(f'{logprob:10.4f}  {token!r}')
        print('---------------')
    if vote:
        answers = majority([sample.text for sample in samples], vote)
        print('\n'.join(f'{count:5}  {answer}' for answer, count in answers) or f'no sample has an answer: {vote}')
    raise SystemExit


# many prompts --------------------------------------------------------------------------------------------------------
def ids_of(value):
    """What the model is to continue, of the object of a line."""
    if taken := [key for key in ('samples', *(('answer', 'votes') if vote else ())) if key in value]:
        raise UserError(f'the result has a {taken[0]!r} of its own; rename this one')
    given = [kind for kind in ('prompt', 'ids', 'messages') if kind in value]
    if len(given) != 1 or given != kinds:
        raise UserError('expected either "prompt" or "ids" or "messages", and in every line the same of them')
    prompt = value[kinds[0]]
    if kinds == ['messages']:
        prompt = render(prompt, template, text_tokenizer)
    elif kinds == ['prompt'] and not isinstance(prompt, str):
        raise UserError('"prompt" is a text')
    elif kinds == ['ids']:
        n_ids = model.config.vocab_size
        if not isinstance(prompt, list) or not all(type(i) is int and 0 <= i < n_ids for i in prompt):
            raise UserError(f'"ids" are a list of whole numbers from 0 to {n_ids - 1}')
    if not prompt:
        raise UserError(f'"{kinds[0]}" is empty, and the model continues at least one token')
    return encode_prompt(prompt, text_tokenizer, block_size, crop_prompt)


def result_of(samples):
    """What is added to a line."""
    result = {'samples': [{'text': sample.text, 'finish': sample.finish} for sample in samples]}
    if logprobs:
        for entry, sample in zip(result['samples'], samples, strict=True):
            entry |= {'tokens': sample.ids, 'logprobs': sample.logprobs}
    if vote:
        votes = majority([sample.text for sample in samples], vote)
        result |= {'answer': votes[0][0] if votes else None, 'votes': votes}
    return result


objects, prompt_ids = jsonl.read_objects(prompts), {}
if not objects:
    raise UserError(f'{prompts} has no prompts; expected lines such as {{"prompt": "text"}}')
kinds = [kind for kind in ('prompt', 'ids', 'messages') if kind in next(iter(objects.values()))][:1]  # of all lines
for number, value in objects.items():  # all are checked before anything is drawn
    try:
        prompt_ids[number] = ids_of(value)
    except ValueError as error:
        raise UserError(f'{prompts}, line {number}: {error}') from None
if kinds == ['messages']:
    stop_ids, ends = find_endings(template, text_tokenizer)
    stops += ends * (constraint is None)
# all that the results depend on; in which batches they are computed only by rounding, of which float32 has too little
settings = {**config, 'json_schema': json_schema, 'prompts': '', 'out': '',
            'batch_size': 0 if dtype == 'float32' else batch_size}
weights = [tensor.flatten()[:8].tolist() for tensor in model.state_dict().values()]  # enough to tell models apart
digest = tokenizer.digest({'settings': settings, 'weights': weights, 'tokenizer': text_tokenizer.to_dict(),
                           'prompts': list(objects.items())})
n_tokens, started = 0, time.perf_counter()
try:
    results = jsonl.Results(out, digest)
    # those of similar lengths together, the longest first, so that memory runs out at the beginning or never
    waiting = sorted(set(objects) - set(results.done), key=lambda number: -len(prompt_ids[number]))
    size = max(1, batch_size // rows)
    bar = tqdm(total=len(objects), initial=len(results.done), unit='prompt', disable=None, leave=False,
               dynamic_ncols=True, miniters=0)
    for i in range(0, len(waiting), size):
        numbers, before = waiting[i : i + size], n_tokens
        batch = [prompt_ids[number] for number in numbers]
        if i == 0:
            warm_up(batch, rows)
        for samples in draw(batch, numbers, rows):
            for k, number in enumerate(numbers):
                group = samples[k * rows : (k + 1) * rows]
                if number not in results.done and all(sample.finish for sample in group):
                    results.add(number, result_of(keep(group)))
                    bar.update()
            n_tokens = before + sum(len(sample.ids) for sample in samples)
            bar.set_postfix_str(f'{n_tokens / (time.perf_counter() - started):,.0f} tokens/s', refresh=False)
            bar.update(0)
    bar.close()
    results.finish(objects)
except OSError as error:
    raise UserError(f'{out} can not be written: {error}; free some space, or name another --out') from error
except KeyboardInterrupt:
    raise SystemExit(f'\nstopped; the results so far are in {out}.part, and the same command goes on') from None
print(f'{out}: {len(objects):,} prompts, {n_tokens:,} tokens in {time.perf_counter() - started:.1f} s')
