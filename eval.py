"""
The loss, perplexity and bits per byte of a model on a whole split or a text, or
its accuracy on a task.

    $ python eval.py --out_dir=out-shakespeare-char
    $ python eval.py --out_dir=out --dataset=openwebtext --stride=512
    $ python eval.py --init_from=gpt2 --input=book.txt --stride=512
    $ python eval.py --out_dir=out --quantize=int8   # what int8 costs
    $ python eval.py --out_dir=out-sft --task=tiny_chat
    $ python eval.py --init_from=gpt2 --task=hellaswag --input=val.jsonl

Prints what it found and then, as the last line, the same in JSON.

A window of block_size tokens slides over the text, `stride` tokens at a time,
and predicts what the window before did not: every token but the first is
predicted exactly once. A smaller stride leaves each more context, which costs
time and mostly lowers the loss; stride = block_size, the default, is how train.py
evaluates. The loss is the plain mean over these tokens, in nats.

Perplexity, exp(loss), compares models with the same tokenizer; bits per byte
any on the same text: all nats / ln 2 / UTF-8 bytes of the predicted tokens.
Special tokens such as <|endoftext|> have no bytes, but what they cost counts,
since to know where a text ends is part of predicting it. (nanochat leaves out
their nats, too.)

With overlap the windows are those of transformers' recipe ("Perplexity of
fixed-length models") for max_length = block_size, and so is each token's
probability. Its average gives all windows but the first the weight of one token
too few; and without overlap it never predicts the first token of a window.

A task is a file of tasks/, which asks and checks: those of tiny_chat are made,
those of gsm8k, multiple_choice (ARC, MMLU) and hellaswag are read from --input,
all of them, or, where rl.py learnt from the same file, with --split=test those
that it did not see.
A chat model is asked in its own format; any other, or with --shots=4 every one,
continues examples that are solved (of the file itself, where there is one) and
the question. The accuracy has Wilson's interval, which holds the true one in
95% of cases. With --num_samples=9 --temperature=0.8 the most frequent of nine
answers counts (self-consistency), with --reward_model=out-reward the one that it
scores highest (best of n); also given are the accuracy of single samples and the
share of questions that at least one of them gets right.

Of multiple choice the likeliest choice counts, by the log-probability of all of
its text, "accuracy", and by that of a character, "accuracy_norm": what
lm-evaluation-harness calls acc and acc_norm. A chat model is shown the choices
with letters, and the likeliest letter counts.
"""

import json
import math
import os
import sys
import textwrap
import time
from itertools import groupby

import numpy as np
import torch
from tqdm import tqdm

import tokenizer
from configurator import UserError, check, explain_errors, override
from data.documents import find_files, is_rows, read_documents, read_text
from data.encode import SEPARATOR
from data.tokens import (
    folder_of,
    gather,
    load_meta,
    open_tokens,
    prepare_command,
    row_of,
    sliding_windows,
    to_device,
    whole_windows,
)
from flatgpt import checkpoint, huggingface, runtime
from flatgpt.pretrained import open_model
from flatgpt.quantize import for_decoding
from posttrain.reward_model import open_reward_model, ratings_of
from posttrain.tasks import common as tasks
from tokenizer.chat import bos_ids

sys.stdout.reconfigure(errors='replace')  # a terminal that can't show a file's name still gets the rest

# settings ------------------------------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': a checkpoint in out_dir; 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'; a HF folder
out_dir = 'out'  # where train.py wrote ckpt.pt and best.pt
which = 'best'  # 'best': best.pt where there is one, else ckpt.pt; 'last': ckpt.pt
dataset = ''  # a folder under data/, or the path of one elsewhere; '': the one the checkpoint was trained on
split = ''  # 'val', 'train', of a task 'test', of its file 'all'; '': val of a dataset, test of a task, all of a file
input = ''  # instead of a dataset: a text file, .jsonl, .csv, .tsv, .parquet or a folder of such, for any tokenizer
text_key = 'text'  # the field of .jsonl, .csv, .tsv and .parquet that holds the text
stride: int | None = None  # tokens from a window to the next, 1 to block_size; None or 0: block_size
block_size: int | None = None  # context length, tokens; None: the model's; with pos='rope' it may be longer
max_tokens: int | None = None  # only the first so many tokens of the text; None: all
batch_size: int | None = None  # windows at a time, None: as many as have 8,192 tokens; of a task: answers, None: 64
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype = 'float32'  # the most precise; 'bfloat16' or 'auto' (what suits the device) can be several times faster
quantize = ''  # 'int8': the model as it is, and with the weights of sample.py --quantize=int8 (a task: only with these)
compile = False  # True: torch.compile the model; pays only for many tokens

# instead of a text: a task
task = ''  # tiny_chat, gsm8k, multiple_choice, hellaswag, or a file tasks/NAME.py of your own
n = 500  # questions, or as many as there are
kinds = ''  # only of these kinds: addition,spelling; '': all
shots: int | None = None  # examples before the question, as plain text; None: 0 for a chat model, else 4
max_new_tokens = 128  # of an answer
num_samples = 1  # answers to a question, of which the most frequent counts
reward_model = ''  # out_dir of reward.py: the answer counts that has its highest score instead
temperature = 0.0  # 0: the likeliest tokens
tools = False  # True: a chat model is told that it has a calculator, and may call it
seed = 1337  # of what is asked and drawn
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

sys.excepthook = explain_errors
check(config, (
    ('which', lambda value: value in ('best', 'last'), "'best' or 'last'"),
    ('split', lambda value: value in ('', 'train', 'val', *(('test', 'all') if task else ())),
     "'train' or 'val', of a task also 'test' or, where it is read from a file, 'all'"),
    ('max_tokens', lambda value: value is None or value >= 2, '2 or more (the first is not predicted), or None'),
    ('batch_size', lambda value: value is None or value >= 1, '1 or more, or None'),
    ('quantize', lambda value: value in ('', 'int8'), "'int8', or '' for none"),
    ('text_key', lambda value: value == 'text' or input, 'a text beside it, --input=FILE'),
    ('input', lambda value: not (value and dataset), f'this or --dataset={dataset}, not both'),
    ('n max_new_tokens num_samples', lambda value: value >= 1, '1 or more'),
    ('shots', lambda value: value is None or value >= 0, '0 or more, or None'),
    ('temperature', lambda value: 0 <= value < math.inf, '0 or more'),
    ('temperature', lambda value: value > 0 or num_samples == 1, 'above 0 with several samples, or all are the same'),
    ('reward_model', lambda value: not value or num_samples > 1, 'several answers to choose from: --num_samples=8 '
     '--temperature=0.8'),
    ('seed', lambda value: 0 <= value < 2**64, '0 or more, of 64 bits'),
))
of_tasks = {'n', 'kinds', 'shots', 'max_new_tokens', 'num_samples', 'reward_model', 'temperature', 'tools', 'seed'}
of_answers = {'num_samples', 'reward_model', 'temperature', 'tools'}  # of tasks, but not of multiple choice
of_texts = {'dataset', 'text_key', 'stride', 'max_tokens', 'compile'}
for name in sorted(config.given & (of_texts if task else of_tasks)):
    raise UserError(f'{name}={config[name]!r} is for {"texts" if task else "tasks"}, and does not go with '
                     f'{f"--task={task}" if task else "a text; name a task: --task=tiny_chat"}')
questions = tasks.load(task) if task else None

# the model
device = runtime.choose_device(device)
dtype, _ = runtime.choose_dtype(dtype, device)
model, text_tokenizer, template, line = open_model(init_from, out_dir, which)
print(line)
if block_size is not None:
    model.crop_block_size(block_size)
block_size = model.config.block_size
stride = stride or block_size
if not 1 <= stride <= block_size:
    raise UserError(f'stride={stride}: expected 1 to block_size={block_size}, or 0 for block_size')


# a task --------------------------------------------------------------------------------------------------------------
if task:
    split, wanted = split or ('all' if input else 'test'), tasks.kinds_of(kinds)
    asked_from = f'{input}, {split}' if input else split
    examples = tasks.examples_of(questions, tasks.Questions(split, n, seed, input, wanted))
    if not examples:
        raise UserError(f'{input or task} has no question for --split={split}')
    for name in sorted(config.given & of_answers if 'choices' in examples[0] else ()):
        raise UserError(f'{name}={config[name]!r} is for answers that are written, and does not go with --task='
                         f'{task}, of which the likeliest choice counts; leave it out')
    runtime.use_cores()
    for_decoding(model.to(device), torch.int8 if quantize else runtime.DTYPES[dtype])
    shots = (0 if template else 4) if shots is None else shots
    if tools and (shots or template is None):
        raise UserError('tools=True: expected a chat model, one trained on conversations, and no --shots')
    rate = None
    if reward_model:
        if shots or template is None:
            raise UserError(f'reward_model={reward_model!r}: expected a chat model, one trained on conversations, and '
                             f'no --shots')
        judge, judge_line = open_reward_model(reward_model, text_tokenizer, template)
        print(f'reward model: {judge_line}')
        judge.to(device)

        def rate(example, texts):
            return ratings_of(judge, tasks.chat_messages(example, tools), texts, template, text_tokenizer)
    # solved ones are of another split, or else others of the same file
    pool_split = 'all' if split == 'all' else 'train'
    pool = tasks.examples_of(questions, tasks.Questions(pool_split, 1000, seed, input, wanted)) if shots else ()
    started = time.perf_counter()
    bar = tqdm(total=len(examples), unit='question', disable=None, leave=False, dynamic_ncols=True)
    try:
        answering = tasks.Answering(template, tools, shots, pool, max_new_tokens, temperature, num_samples, seed,
                                    batch_size or 64, rate, bar.update)
        found = tasks.measure(questions, examples, model, text_tokenizer, answering)
    except RuntimeError as error:
        if not runtime.out_of_memory(error):
            raise
        raise SystemExit(f'out of memory; try --batch_size={(batch_size or 64) // 2 or 1}') from None
    bar.close()
    asked = ('few-shot' if shots else 'plain text') if shots or template is None else 'chat'
    print(f'{task}, {asked_from}: {len(examples):,} questions, {asked}, {quantize or dtype}, on {device}\n\n'
          f'{"kind":24}  {"n":>6}  {"right":>6}  {"accuracy":>8}  95% interval')
    for kind, row in found['kinds'].items():
        print(f'{kind[:24]:24}  {row["n"]:6,}  {row["right"]:6,}  {row["accuracy"]:8.1%}  '
              f'{row["low"]:6.1%} to {row["high"]:.1%}')
    for name, value in found['others'].items():
        print(f'{name}: {value:.1%}')
    if shots:
        print(f'shots: {found["shots"]:.3g} of {shots} on average, as many as fit')
    print(json.dumps({'task': task, **found['kinds']['all'], **found['others'], 'shots': found['shots'],
                      'kinds': found['kinds'], 'asked': asked, 'model': line, 'questions': asked_from,
                      'tools': tools, 'num_samples': num_samples, 'reward_model': reward_model,
                      'temperature': temperature, 'seed': seed,
                      'dtype': quantize or dtype, 'device': str(device),
                      'seconds': round(time.perf_counter() - started, 3)}))
    raise SystemExit


# the text: its tokens, where they are from, and how many ids there can be
def read_input():
    """Yield the text in pieces. Documents end with a blank line, whatever the tokenizer, so all read the same bytes."""
    files, _ = find_files(input)
    if len(files) == 1 and not is_rows(files[0]):
        yield from read_text(files[0])
    else:
        for text in read_documents(files, text_key):
            yield text + SEPARATOR


def encode_input():
    """The ids of the text; what looks like a special token is ordinary text. Raises ValueError if there are too few."""
    arrays = [np.array(bos_ids(text_tokenizer), dtype=np.int64)]
    n_tokens = len(arrays[0])
    for piece in text_tokenizer.cut_safely(read_input()):
        arrays.append(text_tokenizer.encode_array(piece))
        n_tokens += len(arrays[-1])
        if max_tokens is not None and n_tokens >= max_tokens:
            break
    if n_tokens < 2:
        raise UserError(f'{input} has {n_tokens} token(s); expected 2 or more, as the first is not predicted')
    return np.concatenate(arrays)


def trained_on():
    """The name of the dataset that the checkpoint was trained on. Raises ValueError if there is none to know of."""
    state = {}
    if init_from == 'resume':  # open_model() has read it whole and found it sound; mapped, its tensors stay on the disk
        state = torch.load(checkpoint.path_in(out_dir, which), map_location='cpu', weights_only=True, mmap=True)
    if not state.get('config', {}).get('dataset'):
        raise UserError(f'{line} does not say what it was trained on; name what to evaluate it on: --dataset=NAME or '
                         f'--input=FILE')
    return state['config']['dataset']


bytes_unknown = None  # why the bytes of the tokens can't be counted
if input:
    tokens, what, n_ids = encode_input(), input, model.config.vocab_size
else:
    whose = '' if dataset else ', of the dataset the model was trained on'
    dataset = dataset or trained_on()
    data_dir = folder_of(dataset)
    split = split or 'val'
    what = os.path.join(data_dir, f'{split}.bin')
    if not os.path.exists(what):
        raise UserError(f'there is no {what}{whose}; prepare it: {prepare_command(data_dir)}\n'
                         f'or name another --dataset, or a text: --input=FILE')
    meta = load_meta(data_dir)
    # a shorter window than the model's is fine
    tokens = open_tokens(data_dir, split, meta, block_size=meta['row'] - 1 if meta['row'] else 1)
    n_ids = min(meta['vocab_size'] or math.inf, model.config.vocab_size)
    if meta['tokenizer'] is None:
        bytes_unknown = f'{data_dir} does not say which tokenizer it was prepared with'
    else:
        theirs = tokenizer.from_dict(meta['tokenizer'])
        if not huggingface.same_tokenizer(meta['tokenizer'], text_tokenizer.to_dict()):
            raise UserError(f'{data_dir} was prepared with another tokenizer ({theirs.kind}, {theirs.vocab_size:,} '
                             f'ids) than the model has ({text_tokenizer.kind}, {text_tokenizer.vocab_size:,} ids); '
                             f'give the text itself, which any tokenizer reads: --input=FILE')
n_tokens = min(len(tokens), max_tokens or math.inf)

runtime.use_cores()
if device.type == 'cpu':
    runtime.keep_freed_memory()
model.to(device)
if compile:
    torch._dynamo.config.suppress_errors = True  # without a working compiler: a warning, and go on without
    model.compile()
autocast = runtime.autocast(dtype, device)
row = row_of(tokens)
if row:  # conversations, of which only the answers are predicted
    if stride != block_size or max_tokens:
        raise UserError(f'{what} has conversations in rows of {row} tokens, which are evaluated whole; leave out '
                         f'--stride and --max_tokens')
    if row > block_size + 1:
        raise UserError(f'{what} has conversations in rows of {row} tokens, more than the {block_size} of the '
                         f'context and one; prepare it for this model: --block_size={block_size}')
    block_size = stride = row - 1
    windows = [(start, start + row, start + 1) for start in whole_windows(n_tokens, block_size, row)]
else:
    windows = sliding_windows(n_tokens, block_size, stride)
# tokens at once: the model's loss computes its logits in chunks, except in fp16 and int8, where they take 256 MB
at_once = 2**13 if dtype != 'float16' and not quantize else min(2**13, 2**26 // model.config.vocab_size)


def mean_loss():
    """-> (nats a token, how often each id was predicted); full windows of equal length at a time."""
    total, counts = 0.0, np.zeros(n_ids, dtype=np.int64)
    bar = tqdm(total=n_tokens - 1, unit='tok', unit_scale=True, disable=None, leave=False, dynamic_ncols=True)
    for length, group in groupby(windows, key=lambda window: window[1] - window[0] - 1):
        group = list(group)
        size = batch_size or max(1, at_once // length)
        for i in range(0, len(group), size):
            starts, _, first = (np.array(column) for column in zip(*group[i : i + size], strict=True))
            x, y = gather(tokens, starts, length, n_ids)
            y[torch.from_numpy(starts[:, None] + np.arange(1, length + 1) < first[:, None])] = -1  # scored before
            scored = y[y >= 0]
            counts += np.bincount(scored, minlength=n_ids)
            x, y = to_device((x, y), device)
            try:
                with torch.no_grad(), autocast:
                    total += model(x, y, return_logits=False)[1].item() * len(scored)
            except RuntimeError as error:
                if not runtime.out_of_memory(error):
                    raise
                smaller = f'batch_size={len(x) // 2}' if len(x) > 1 else f'block_size={max(1, length // 2)}'
                raise SystemExit(f'out of memory with {len(x)} windows of {length} tokens; try --{smaller}') from None
            bar.update(len(scored))
    bar.close()
    if not counts.any():
        raise UserError(f'{what} has no token that carries loss; prepare it again')
    loss = total / int(counts.sum())
    if not loss < 700:  # where exp(loss) ends in fp64
        raise UserError(f'the loss of {line} is {loss} nats a token: its weights are broken, or {dtype} can not hold '
                         f'what they give (--dtype=float32 can)')
    return loss, counts


started = time.perf_counter()
plain_loss = mean_loss()[0] if quantize else None
if quantize:
    for_decoding(model, torch.int8)
loss, counts = mean_loss()
n_predicted = int(counts.sum())
seconds = time.perf_counter() - started

# bytes of text in the predicted tokens
n_bytes, bits_per_byte = None, None
if text_tokenizer.kind == 'word' and counts[text_tokenizer.special_tokens['<|unk|>']]:
    bytes_unknown = 'the vocabulary lacks words of this text, and <|unk|> does not say which'
if not bytes_unknown:
    special = set(text_tokenizer.special_tokens.values())
    n_bytes = sum(len(text_tokenizer.decode_bytes([id])) * int(counts[id]) for id in np.flatnonzero(counts).tolist()
                  if id not in special)
    if n_bytes:
        bits_per_byte = loss * n_predicted / math.log(2) / n_bytes
    else:
        bytes_unknown = 'the predicted tokens are all special ones, which have none'

shown = f'{bits_per_byte:.4f} bits per byte' if n_bytes else f'bits per byte unknown: {bytes_unknown}'
change = math.exp(loss - plain_loss) - 1 if quantize else None
in_what = f'{quantize}, {100 * change:+.3f}% perplexity against {dtype}' if quantize else dtype
for text in (f'{what}: {n_predicted:,} tokens predicted in {len(windows):,} window(s) of {block_size}, '
             f'stride {stride}, on {device}, {seconds:.1f} s',
             f'{in_what}: loss {loss:.4f} nats a token, perplexity {math.exp(loss):.6g}, {shown}'):
    print(textwrap.fill(text, 80, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False))
print(json.dumps({'loss': loss, 'perplexity': math.exp(loss), 'bits_per_byte': bits_per_byte, 'tokens': n_predicted,
                  'bytes': n_bytes, 'windows': len(windows), 'block_size': block_size, 'stride': stride, 'model': line,
                  'text': what, 'dtype': quantize or dtype, 'perplexity_change': change, 'device': str(device),
                  'seconds': round(seconds, 3)}))
