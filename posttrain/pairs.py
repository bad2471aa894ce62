"""Make pairs or conversations to learn from, out of a model's own answers.

    $ python -m posttrain.pairs --init_from=out-sft --task=tiny_chat \\
        --out=pairs.jsonl
    $ python -m posttrain.pairs --input=prompts.jsonl --judge=reward \\
        --reward_model=out-reward --out=pairs.jsonl
    $ python -m posttrain.pairs --task=tiny_chat --judge=person --out=mine.jsonl
    $ python -m posttrain.pairs --task=tiny_chat --write=sft --out=talks.jsonl
    $ torchrun --standalone --nproc_per_node=8 \\
        -m posttrain.pairs --task=tiny_chat --out=pairs.jsonl

A chat model answers each prompt several times. Answers that are empty, cut off
at max_new_tokens or equal to an earlier one are dropped. The others are judged
by the task's program, by a reward model, or by a person, who presses a key: 1 or
2 for the better of two, = for a tie or to skip, q to quit. From a pipe the first
character of a line counts.

--write=pairs writes {"messages", "chosen", "rejected"}, which posttrain.reward
and posttrain.dpo read: the best answer and the worst, then the next best and the
next worst. A prompt whose answers are all right or all wrong gives none.
--write=sft writes {"messages"}, which data/chat/prepare.py reads: the right
answers, those with the highest scores, or those that a person prefers (rejection
sampling; "Llama 2", Touvron et al. 2023, and "STaR", Zelikman et al. 2022).
--skip_equal=True leaves out prompts whose answers are all right: easy ones.

A line of --input is {"prompt": "text"} or {"messages": [...]}, and may have a
"group". Questions of a task are those of its split train. An answer depends on
the seed, its prompt's number and its own number alone. The same command continues
a run that was stopped. After q the pairs so far are in --out.
"""

import os
import random
import time
from collections import Counter
from contextlib import suppress
from typing import Literal

from tqdm import tqdm

import tokenizer as tokenizers
from configurator import Count, NonNegative, Seed, UserError, fit, override
from data.documents import read_records
from data.encode import names_of
from flatgpt import decoding, jsonl, lora, output, parallel, shares
from flatgpt.generate import Sampling, generate_texts
from posttrain import judges
from posttrain.policy import open_chat_model
from posttrain.preferences import conversation_before, render_answer
from posttrain.reward_model import open_reward_model, ratings_of
from posttrain.tasks import common as tasks
from tokenizer.chat import find_endings, render

output.protect(drop=True)

# Settings -----------------------------------------------------------------------------------------
init_from = 'out-sft'  # a chat model: an out_dir, a Hugging Face folder or hub id
out = ''  # FILE.jsonl to write
write: Literal['pairs', 'sft'] = 'pairs'
per_prompt: Count = 1  # pairs or conversations from a prompt at most
skip_equal = False  # write=sft: leave out prompts whose answers are all right
# prompts
task = ''  # tiny_chat, gsm8k, ..., or your own file tasks/NAME.py
input = ''  # FILE.jsonl of prompts; with a task, its file
split: Literal['train', 'val', 'test', 'all'] = 'train'  # of the task
kinds = ''  # kinds of questions, such as addition,spelling; '': all
n: Count = 1000  # prompts at most
# answers
num_samples: Count = 8  # to each prompt
max_new_tokens: Count = 128  # tokens in each
temperature: NonNegative = 1.0
seed: Seed = 1337  # fixes questions and answers
# judgement
judge: Literal['verifier', 'reward', 'person'] = 'verifier'  # verifier: the task's program
reward_model = ''  # out_dir of posttrain.reward
# machine
batch_size: Count = 128  # answers to draw at once
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
config = override(globals())
# --------------------------------------------------------------------------------------------------

# rules between settings
if not out:
    raise UserError("out='': expected a file to write: --out=FILE.jsonl")
if not task and not input:
    raise UserError("task='', input='': expected --task=NAME, or prompts: --input=FILE.jsonl")
if judge == 'verifier' and not task:
    raise UserError("judge='verifier' checks the answers to a task; expected --task=NAME, "
                    '--judge=reward --reward_model=FOLDER, or --judge=person')
if (judge == 'reward') != bool(reward_model):
    raise UserError(f'judge={judge!r}, reward_model={reward_model!r}: expected both, '
                    f'--judge=reward --reward_model=FOLDER, or another judge without it')
if num_samples == 1 and (write == 'pairs' or judge != 'verifier'):
    raise UserError('num_samples=1: expected 2 or more answers to compare, such as --num_samples=8')
if num_samples > 1 and temperature == 0:
    raise UserError('temperature=0: the answers would be equal; expected above 0')
if skip_equal and (write == 'pairs' or judge != 'verifier'):
    raise UserError('skip_equal is for --write=sft and --judge=verifier; pairs are never of equal '
                    'answers')
for name in sorted(config.given & {'split', 'kinds'}) if not task else ():
    raise UserError(f'{name}={config[name]!r} is for tasks; name one: --task=tiny_chat')


def read_prompts():
    """Return the questions of the task, or the prompts of the file.

    Each is a dict with "messages". A dict of a task is its example. Raises UserError with the line
    of a bad prompt.
    """
    if task:
        selection = tasks.Questions(split, n, seed, input, names_of(kinds))
        needed = ('examples', 'evaluate') if judge == 'verifier' else ('examples',)
        return tasks.examples_of(questions, selection, needed, ('messages',))
    prompts = []
    for where, record in read_records(input):
        if len(prompts) == n:
            break
        try:
            messages = conversation_before(
                record, ('messages', 'conversations', 'prompt'), 'a prompt')
            if messages is None:
                raise UserError(f'no conversation, only {", ".join(record)}; expected "prompt" or '
                                f'"messages"')
            render(messages, template, tokenizer)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None
        prompts.append({'messages': messages, 'content': record.get('group')})
    return prompts


def is_answer(messages, sample):
    """Return whether a sample is whole, not empty and well formed."""
    if sample.finish != 'stop' or not sample.text.strip():
        return False
    try:
        render_answer(messages, sample.text, template, tokenizer)
    except UserError:  # a call of a tool that does not end
        return False
    return True


def judge_answers(number, samples):
    """Return the result of a prompt: lines to write, and numbers of answers."""
    example = prompts[number]
    messages, group = example['messages'], example.get('content')
    counts = Counter(sample.text for sample in samples if is_answer(messages, sample))
    answers, n_right = list(counts), None  # in the order of the samples
    if judge == 'person':
        chosen = [pair for i in range(0, len(answers) - 1, 2)[:per_prompt]
                  if (pair := compare(number, answers[i : i + 2]))]
    else:
        if judge == 'verifier':
            ratings = [float(bool(questions.evaluate(example, text))) for text in answers]
            n_right = sum(counts[text] for text, right in zip(answers, ratings, strict=True)
                          if right)
        else:
            ratings = ratings_of(critic, messages, answers, template, tokenizer)
        chosen = judges.extremes(answers, ratings, per_prompt)
    if write == 'pairs':
        lines = [judges.pair_of(messages, *pair, group) for pair in chosen]
    else:
        if judge == 'person':
            best = [better for better, _ in chosen]
        else:
            order = sorted(range(len(answers)), key=lambda i: -ratings[i])
            best = [answers[i] for i in order if judge == 'reward' or ratings[i]][:per_prompt]
            best *= not (skip_equal and n_right == counts.total())
        lines = [{'messages': [*messages, {'role': 'assistant', 'content': text}]}
                 for text in best]
    return {'lines': lines, 'right': n_right, 'usable': counts.total(), 'distinct': len(counts)}


def compare(number, answers):
    """Let the person compare two answers; -> (better, worse), or None for a tie."""
    better = judges.ask_person(f'prompt {number + 1} of {len(prompts)}',
                               prompts[number]['messages'], answers,
                               random.Random(f'{seed} {number} {answers}'))
    return None if better is None else (answers[better], answers[1 - better])


def report(done):
    """Return the numbers of answers and prompts, in lines."""
    total = Counter()
    for result in done.values():
        total.update({key: result[key] or 0 for key in ('right', 'usable', 'distinct')})
        total['all right'] += bool(result['right']) and result['right'] == result['usable']
        total['all wrong'] += result['right'] == 0 < result['usable']
    n_drawn = len(done) * num_samples
    lines = [f'{len(done):,} prompts, {n_drawn:,} answers: {n_drawn - total["usable"]:,} cut off, '
             f'empty or malformed, {total["distinct"]:,} distinct within their prompt']
    if judge == 'verifier':
        lines.append(f'{total["right"] / max(1, total["usable"]):.1%} right; all right for '
                     f'{total["all right"]:,} prompts, all wrong for {total["all wrong"]:,}')
    return '\n'.join(fit(line, indent='  ') for line in lines)


# join the other processes, and open the models
questions = tasks.load(task) if task else None
world, torch_device = shares.join(device)
if judge == 'person' and world.size > 1:
    raise UserError("judge='person': expected one process, without torchrun")
model, tokenizer, template, line = open_chat_model(init_from)
print(line)
render_answer([{'role': 'user', 'content': '?'}], '!', template, tokenizer)  # raises UserError
critic = None
if reward_model:
    critic, judge_line = open_reward_model(reward_model, tokenizer, template)
    print(f'reward model: {judge_line}')
    critic.to(torch_device)
digests = [lora.digest(part) for part in (model, critic) if part is not None]

# read the prompts
prompts = read_prompts()
if not prompts:
    raise UserError(f'{input or task} has no prompts')
room = model.config.block_size - max_new_tokens
ids = [render(prompt['messages'], template, tokenizer) for prompt in prompts]
fitting = [number for number in range(len(ids)) if len(ids[number]) <= room]
if not fitting:
    raise UserError(f'no prompt has room in a context of {model.config.block_size} tokens with '
                    f'max_new_tokens={max_new_tokens}; lower that')
if len(fitting) < len(ids):
    print(f'{len(ids) - len(fitting):,} of {len(ids):,} prompts are longer than the {room} tokens '
          f'that an answer leaves, left out')

# choose device and precision
dtype = decoding.prepare(model, {**config, 'quantize': '', 'compile': 'auto'}, batch_size,
                         max_new_tokens, world.local_rank)
stop_ids, stops = find_endings(template, tokenizer)
sampling = Sampling(max_new_tokens, temperature, stop_ids=stop_ids, stops=stops,
                    num_samples=num_samples, seed=seed)

# open the results; the digest covers all that they depend on
settings = {**config, 'out': '', 'batch_size': 0 if dtype == 'float32' else batch_size}
digest = tokenizers.digest({'settings': settings, 'models': digests, 'prompts': ids,
                            'tokenizer': tokenizer.to_dict()})
world.check_alike({**config, 'dtype': dtype, 'digest': digest})
started = time.perf_counter()
with suppress(judges.Quit), jsonl.writing(out, world.is_main):
    with shares.together(world):  # the main process alone writes
        results = jsonl.Results(out, digest) if world.is_main else None
    done = world.from_main(dict(results.done) if results else None)
    bar = tqdm(total=len(fitting), initial=len(done), unit='prompt', leave=False,
               dynamic_ncols=True, disable=None if world.is_main and judge != 'person' else True)

    # draw and judge prompts of similar lengths together; a person gets one at a time
    waiting = [number for number in fitting if number not in done]
    size = 1 if judge == 'person' else max(1, batch_size // num_samples)
    if judge != 'person':
        waiting.sort(key=lambda number: -len(ids[number]))
    batches = [waiting[i : i + size] for i in range(0, len(waiting), size)]
    for first in range(0, len(batches), world.size):  # a batch for each process
        numbers, judged = next(iter(batches[first + world.rank :]), []), []
        with shares.together(world), decoding.explain_out_of_memory('use a smaller --batch_size'):
            *_, drawn = generate_texts(model, tokenizer, [ids[number] for number in numbers],
                                       sampling, numbers) if numbers else [[]]
            for i, number in enumerate(numbers):
                group = drawn[i * num_samples : (i + 1) * num_samples]
                judged.append((number, judge_answers(number, group)))
        for part in shares.gather([judged], world):
            for number, result in part:
                done[number] = result
                if results:
                    results.add(number, result)
                bar.update()
    bar.close()

# write the lines in the order of the prompts
lines = [line for number in sorted(done) for line in done[number]['lines']]
name, n_left = 'pairs' if write == 'pairs' else 'conversations', len(fitting) - len(done)
print(report(done))
with jsonl.writing(out, world.is_main), shares.together(world):
    if results and lines:
        results.write(b''.join(map(jsonl.to_line, lines)))
    if results and not n_left:
        results.close()
    if not lines and not n_left:
        raise UserError(f'the answers make no {name}; expected other prompts, a higher '
                        f'--temperature or more answers than --num_samples={num_samples}')
parallel.disconnect()
print(f'{out}: {len(lines):,} {name}, {time.perf_counter() - started:.1f} s' if lines else
      f'no {name} yet')
if n_left:
    print(f'{n_left:,} prompts are left; the same command continues')
elif write == 'pairs':
    print(f'learn from them:\n  python -m posttrain.reward --init_from={init_from} --data={out}\n'
          f'  python -m posttrain.dpo --init_from={init_from} --pairs={out}')
else:
    dataset = os.path.splitext(os.path.basename(out))[0]
    print(f'learn from them:\n  python data/chat/prepare.py --input={out} '
          f'--tokenizer={init_from}\n'
          f'  python train.py config/sft.py --init_from={init_from} --dataset={dataset}')
