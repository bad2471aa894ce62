"""
Evaluate a model: bits per byte of a split or a text, or accuracy on a task.

    $ python eval.py --out_dir=out-shakespeare-char
    $ python eval.py --init_from=gpt2 --input=book.txt --stride=512
    $ python eval.py --out_dir=out --quantize=int8     # the cost of int8
    $ python eval.py --out_dir=out-sft --task=tiny_chat
    $ python eval.py --init_from=gpt2 --task=hellaswag --input=val.jsonl
    $ torchrun --standalone --nproc_per_node=8 eval.py --out_dir=out

Prints the result, and in the last line the same as JSON. A window of block_size tokens
slides over the text by `stride` tokens, and each token but the first is predicted once.
The default, stride = block_size, is train.py's evaluation; a smaller stride gives
tokens more context and takes longer (transformers, "Perplexity of fixed-length
models"). The loss is in nats per token. Perplexity, exp(loss), compares models with the
same tokenizer; bits per byte compare any two on the same text. Special tokens have no
bytes; their loss counts.

A task is a module of posttrain/tasks: tiny_chat makes its questions; gsm8k,
multiple_choice (ARC, MMLU) and hellaswag read --input. A chat model gets the question
in its own format; other models, or all with --shots=4, continue solved examples. Among
several samples the most frequent answer counts (self-consistency), or with
--reward_model the one with the highest score. accuracy and accuracy_norm of multiple
choice are acc and acc_norm of lm-evaluation-harness.
"""

import json
import math
import os
import sys
import time
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

from configurator import (
    Count,
    Natural,
    NonNegative,
    Range,
    Seed,
    UserError,
    fit,
    override,
    printable,
)
from data import mixture, scoring
from data.datasets import folder_of
from data.encode import names_of
from data.tokens import evenly, to_device
from flatgpt import output, parallel, runtime, shares
from flatgpt.pretrained import dataset_of, open_model
from flatgpt.quantize import for_decoding
from posttrain.reward_model import open_reward_model, ratings_of
from posttrain.tasks import common as tasks

output.protect()

# Settings -----------------------------------------------------------------------------------------
init_from = 'resume'  # the run in out_dir; or a folder, a hub id, 'gpt2' to 'gpt2-xl'
out_dir = 'out'  # where train.py wrote ckpt.pt and best.pt
which: Literal['best', 'last'] | Count = 'best'  # best.pt if there is one; ckpt.pt; ckpt-STEP.pt
# a text
dataset = ''  # a folder under data/, or a path; '': the one that the model was trained on
split: Literal['', 'train', 'val', 'test', 'all'] = ''  # '': val; a task: test; its file: all
input = ''  # replaces a dataset, or for a task: a text, .jsonl, .csv, .tsv, .parquet, a folder
text_key = 'text'  # the field of .jsonl, .csv, .tsv and .parquet that holds the text
stride: Natural | None = None  # tokens from a window to the next; None or 0: block_size
block_size: Count | None = None  # context, tokens; None: the model's; longer only with pos='rope'
max_tokens: Annotated[int, Range(least=2)] | None = None  # evaluate the first tokens alone
eval_tokens: Natural = 0  # predict about so many, in windows spaced evenly over the text; 0: all
# a task
task = ''  # tiny_chat, gsm8k, multiple_choice, hellaswag, or your own file tasks/NAME.py
n: Annotated[int, Range(least=1, most=10**6)] = 500  # questions at most
kinds = ''  # kinds of questions, such as addition,spelling; '': all
shots: Natural | None = None  # solved examples before the question; None: 0 for a chat model, or 4
max_new_tokens: Count = 128  # tokens in an answer
num_samples: Count = 1  # answers to a question
reward_model = ''  # out_dir of posttrain.reward; its favourite answer counts, not the most frequent
temperature: NonNegative = 0.0  # 0: the likeliest tokens
tools: bool | str = False  # that the model may call: calculator,python; True: the calculator
seed: Seed = 1337  # fixes questions and answers
# the machine
batch_size: Count | None = None  # windows, None: 8,192 tokens; with a task answers, None: 64
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'float32'  # the most precise
quantize: Literal['', 'int8'] = ''  # a text: also measured before rounding; a task: only after
config = override(globals())
# --------------------------------------------------------------------------------------------------

# rules between settings
OF_ANSWERS = {'num_samples', 'reward_model', 'temperature', 'tools'}
OF_TASKS = {*OF_ANSWERS, 'n', 'kinds', 'shots', 'max_new_tokens', 'seed'}
OF_TEXTS = {'dataset', 'text_key', 'stride', 'max_tokens', 'eval_tokens'}
for name in sorted(config.given & (OF_TEXTS if task else OF_TASKS)):
    remedy = f'texts, not for --task={task}' if task else 'tasks; name one: --task=tiny_chat'
    raise UserError(f'{name}={config[name]!r} is for {remedy}')
if split in ('test', 'all') and not task:
    raise UserError(f"split={split!r}: expected 'train' or 'val' without a task")
if input and dataset:
    raise UserError(f'input={input!r}: expected this or --dataset={dataset}, not both')
if num_samples > 1 and temperature == 0:
    raise UserError(f'temperature={temperature}: expected above 0 with several samples')
if reward_model and num_samples == 1:
    raise UserError(f'reward_model={reward_model!r}: expected several answers, --num_samples=8')

# the processes and the model
questions = tasks.load(task) if task else None
world, torch_device = shares.join(device)
dtype, _ = runtime.choose_dtype(dtype, torch_device)
runtime.use_cores()
runtime.keep_freed_memory()
model, text_tokenizer, template, line = open_model(init_from, out_dir, which)
print(line)
world.check_alike({'model': line, **config, 'dtype': dtype})
model.crop_block_size(block_size or model.config.block_size)
block_size = model.config.block_size
model.to(torch_device)
hidden = None if world.is_main else True  # a bar, in all processes but one


def accuracy():
    """Print the accuracy on the task; -> the JSON line's dict."""
    # the questions
    source, kind_names = split or ('all' if input else 'test'), names_of(kinds)
    selection = tasks.Questions(source, n, seed, input, kind_names)
    examples = tasks.examples_of(questions, selection)
    if not examples:
        raise UserError(f'{input or task} has no question for --split={source}')
    for name in sorted(config.given & OF_ANSWERS if 'choices' in examples[0] else ()):
        raise UserError(f'{name}={config[name]!r} is for written answers, not for --task={task}')
    n_shots = (0 if template else 4) if shots is None else shots
    is_chat, rate = template is not None and not n_shots, None
    if (tools or reward_model) and not is_chat:
        raise UserError('tools, reward_model: expected a chat model and no --shots')
    # the model, and the reward model that chooses an answer
    for_decoding(model, torch.int8 if quantize else getattr(torch, dtype))
    if reward_model:
        judge, judge_line = open_reward_model(reward_model, text_tokenizer, template)
        print(f'reward model: {judge_line}')
        judge.to(torch_device)

        def rate(example, texts):
            messages = tasks.chat_messages(example, tools)
            return ratings_of(judge, messages, texts, template, text_tokenizer)

    pool = tasks.solved_examples(questions, selection) if n_shots else ()
    # the answers
    started = time.perf_counter()
    n_asked = len(examples[world.rank :: world.size])
    with tqdm(total=n_asked, unit='question', disable=hidden, leave=False) as bar:
        answering = tasks.Answering(template, tools, n_shots, pool, max_new_tokens, temperature,
                                    num_samples, seed, batch_size or 64, rate, bar.update, world)
        result = tasks.measure(questions, examples, model, text_tokenizer, answering)
    prompting = 'chat' if is_chat else 'few-shot' if n_shots else 'plain text'
    origin = f'{input}, {source}' if input else source
    print(f'{task}, {origin}: {len(examples):,} questions, {prompting}, {quantize or dtype}, on '
          f'{torch_device}\n\n{"kind":24}  {"n":>6}  {"right":>6}  {"accuracy":>8}  95% interval')
    for kind, row in result['kinds'].items():
        print(f'{printable(kind)[:24]:24}  {row["n"]:6,}  {row["right"]:6,}  '
              f'{row["accuracy"]:8.1%}  {row["low"]:6.1%} to {row["high"]:.1%}')
    for name, value in result['others'].items():
        print(f'{name}: {value:.1%}')
    if n_shots:
        print(f'shots: {result["shots"]:.3g} of {n_shots} on average, as many as fit')
    return {'task': task, **result['kinds']['all'], **result['others'], 'shots': result['shots'],
            'kinds': result['kinds'], 'asked': prompting, 'model': line, 'questions': origin,
            'tools': tools, 'num_samples': num_samples, 'reward_model': reward_model,
            'temperature': temperature, 'seed': seed, 'dtype': quantize or dtype,
            'device': str(torch_device), 'seconds': round(time.perf_counter() - started, 3)}


def loss_on_text():
    """Print the loss on the text; -> the JSON line's dict."""
    # the text and its windows
    if input:
        text = scoring.open_file(input, text_key, text_tokenizer, max_tokens)
    else:
        name = dataset or dataset_of(init_from, out_dir, which)
        if len(names := list(mixture.parse(name))) > 1:
            raise UserError(f'dataset={name!r} is a mixture of {", ".join(names)}; expected one, '
                            f'such as --dataset={names[0]}')
        data_dir = folder_of(name)
        text = scoring.open_split(data_dir, split or 'val', text_tokenizer)
    vocab_size = min(text.vocab_size or math.inf, model.config.vocab_size)
    windows, window, step = scoring.windows_over(text, max_tokens, block_size, stride)
    n_windows, windows.starts = len(windows), evenly(windows.starts, eval_tokens, step)
    of_process = replace(windows, starts=windows.starts[world.rank :: world.size])
    share = f' evenly spaced of {n_windows:,}' if len(windows) < n_windows else ''
    # tokens in a batch; fp16 and int8 compute all of its logits at once: 256 MB
    all_logits = dtype == 'float16' or quantize
    at_once = min(2**13, 2**26 // model.config.vocab_size) if all_logits else 2**13

    def mean_loss():
        """Return the loss in nats per token, and how often each id was predicted."""
        total, counts = 0.0, np.zeros(vocab_size, dtype=np.int64)
        with (shares.together(world),
              tqdm(total=len(of_process), unit='window', disable=hidden, leave=False) as bar):
            for x, y in scoring.batches(text.tokens, of_process, vocab_size, batch_size, at_once):
                scored = y[y >= 0]
                counts += np.bincount(scored, minlength=vocab_size)
                with torch.no_grad(), runtime.autocast(dtype, torch_device):
                    _, loss = model(*to_device((x, y), torch_device), return_logits=False)
                total += loss.item() * len(scored)
                bar.update(len(x))
        total, = world.sum([total])
        shares.add_up([torch.from_numpy(counts)], world)  # in place
        if not counts.any():
            raise UserError(f'{text.source} has no token that carries loss; prepare it again')
        loss = total / int(counts.sum())
        if not loss < 700:  # exp(loss) would overflow
            raise UserError(f'{line}: the loss is {loss}; weights are broken, or {dtype} overflows')
        return loss, counts

    # the loss, with int8 weights once more
    started = time.perf_counter()
    plain_loss = mean_loss()[0] if quantize else None
    if quantize:
        for_decoding(model, torch.int8)
    loss, counts = mean_loss()
    n_predicted, seconds = int(counts.sum()), time.perf_counter() - started
    # bits per byte
    n_bytes, reason = scoring.count_bytes(text, counts, text_tokenizer)
    bits_per_byte = loss * n_predicted / math.log(2) / n_bytes if n_bytes else None
    bits = f'{bits_per_byte:.4f} bits per byte' if n_bytes else f'bits per byte unknown: {reason}'
    change = math.exp(loss - plain_loss) - 1 if quantize else None
    against = f', {100 * change:+.3f}% perplexity against {dtype}' if quantize else ''
    print(fit(f'{text.source}: {n_predicted:,} tokens predicted in {len(windows):,}{share} '
              f'window(s) of {window}, stride {step}, on {torch_device}, {seconds:.1f} s',
              indent='  '))
    print(fit(f'{quantize or dtype}{against}: loss {loss:.4f} nats a token, perplexity '
              f'{math.exp(loss):.6g}, {bits}', indent='  '))
    return {'loss': loss, 'perplexity': math.exp(loss), 'bits_per_byte': bits_per_byte,
            'tokens': n_predicted, 'bytes': n_bytes, 'windows': len(windows), 'block_size': window,
            'stride': step, 'eval_tokens': eval_tokens, 'model': line, 'text': text.source,
            'dtype': quantize or dtype, 'perplexity_change': change, 'device': str(torch_device),
            'seconds': round(seconds, 3)}


try:
    result = accuracy() if task else loss_on_text()
except RuntimeError as error:
    if not runtime.out_of_memory(error):
        raise
    raise UserError('out of memory; try a smaller --batch_size or --block_size') from None
parallel.disconnect()
print(json.dumps(result))
