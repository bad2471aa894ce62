"""
What the tasks beside this file share: how one is found, questions from files, prompts, and what a model makes of them.

    task = load('tiny_chat')
    examples = task.examples('test', 500, seed=0)
    texts = answer(model, tokenizer, prompts, max_new_tokens=100)   # prompts: of chat_prompt() or few_shot()
    n_right = sum(task.evaluate(example, text) for example, text in zip(examples, texts, strict=True))

A task is a module tasks/NAME.py, here or in the current folder, with

    examples(split, n, seed=0, input='', kinds=()) -> n of its examples, or as many as there are, a pure function of
        these; split: 'train', 'val', 'test', which have no question in common, or, of a file, also 'all' of it; input:
        the file, for tasks that are read from one; kinds: only these, () for all
    extract(text) -> the answer that the assistant's text comes to, or None
    evaluate(example, text) -> whether that is right
    reward(example, text) -> 0 to 1, what reinforcement learning is to raise; 1 is right

and an example is a dict of plain values:

    messages    what the assistant is asked, as chat.py takes it
    context     the same in plain text, which ' ' + solution continues, for models that know no conversations
    solution    a text that evaluate() accepts
    answer      what extract() finds in it
    kind        of question, for accuracies of each
    choices, label    of multiple choice: what ' ' + choice may continue the context; which of them is right, from 0.
        In messages they have letters, and the answer is one
"""

import collections
import csv
import importlib.util
import itertools
import math
import os
import pkgutil
import random

import torch

from configurator import UserError
from data.documents import text_hash
from data.tokens import to_device
from flatgpt import jsonl
from flatgpt.generate import Sampling, generate_texts, uniforms
from posttrain import tasks
from posttrain.tools import SYSTEM, generate_with_tools
from tokenizer.chat import bos_ids, find_endings, render

LETTERS = 'ABCDEFGHIJ'  # of the choices
SPLITS = ('train', 'val', 'test')
FUNCTIONS = ('examples', 'extract', 'evaluate', 'reward')  # of a task
KEYS = ('messages', 'context', 'solution', 'answer', 'kind')  # of an example

# Tasks and their examples ---------------------------------------------------------------------------------------------


def load(name):
    """The module of a task. Raises ValueError naming those there are."""
    built_in = {module.name for module in pkgutil.iter_modules(tasks.__path__)} - {'common'}
    if name in built_in:
        return importlib.import_module(f'posttrain.tasks.{name}')
    path = os.path.join('tasks', f'{name}.py')
    if not os.path.isfile(path):
        raise UserError(f'there is no task {name!r}; expected one of {", ".join(sorted(built_in))}, or a file {path} '
                         f'of your own, see posttrain/tasks/common.py')
    spec = importlib.util.spec_from_file_location(f'tasks.{name}', path)
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    return task


def examples_of(task, split, n, seed, input, kinds, functions=FUNCTIONS, keys=KEYS):
    """task.examples(...). ValueError for a task that lacks one of the functions, or an example one of the keys."""
    if missing := [name for name in functions if not hasattr(task, name)]:
        raise UserError(f'{task.__file__} has no {", ".join(missing)}; expected what tasks/common.py says of a task')
    examples = task.examples(split, n, seed, input=input, kinds=kinds)
    for example in examples:
        if missing := [key for key in keys if key not in example]:
            raise UserError(f'{task.__file__}: an example has no {", ".join(missing)}; expected what tasks/common.py '
                             f'says of examples, but it is {str(example)[:60]}')
    return examples


def split_of(content):
    """
    'train', 'val' or 'test', the last two a tenth each, by a hash of what is asked, so that the choice depends on
    nothing else and no other way to ask the same is in another split.
    """
    place = text_hash(content)
    return 'test' if place < 0.1 else 'val' if place < 0.2 else 'train'


def check_split(split, splits=SPLITS):
    if split not in splits:
        raise UserError(f'split={split!r}: expected one of {", ".join(splits)}')


def kinds_of(text):
    """The kinds that a setting names: 'addition, spelling' -> ('addition', 'spelling'), '' -> (), which is all."""
    return tuple(kind.strip() for kind in text.split(',') if kind.strip())


def check_kinds(kinds, there):
    """ValueError unless all of kinds are among those there are."""
    unknown = [kind for kind in kinds if kind not in there]
    if unknown:
        raise UserError(f'kinds: there is no {unknown[0]!r}; expected some of {", ".join(there)}')


def read_rows(path, columns=None):
    """
    [(where, dict), ...] of the rows of a .jsonl, .csv or .parquet file. columns: of a .csv whose first line does not
    name a column 'question'. Raises ValueError for what can't be read, or has no rows.
    """
    kind = os.path.splitext(path)[1]
    if kind == '.jsonl':
        rows = [(f'{path}, line {number}', row) for number, row in jsonl.read_objects(path).items()]
    elif kind == '.csv':
        try:
            with open(path, encoding='utf-8-sig', newline='') as file:
                reader = csv.reader(file)
                lines = [(reader.line_num, line) for line in reader if line]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f'{path} can not be read as CSV: {error}') from None
        if lines and (columns is None or 'question' in lines[0][1]):
            columns, lines = lines[0][1], lines[1:]
        for number, line in lines:
            if len(line) != len(columns):
                raise UserError(f'{path}, line {number}: {len(line)} fields; expected {len(columns)}: '
                                 f'{", ".join(columns)}')
        rows = [(f'{path}, line {number}', dict(zip(columns, line, strict=True))) for number, line in lines]
    elif kind == '.parquet':
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError(f"{path} is Parquet, which needs the package pyarrow: pip install -e '.[data]'") from None
        try:
            rows = [(f'{path}, row {i}', row) for i, row in enumerate(pq.read_table(path).to_pylist(), 1)]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f'{path} can not be read as Parquet: {error}') from None
    else:
        raise UserError(f'input={path!r}: expected a .jsonl, .csv or .parquet file')
    if not rows:
        raise UserError(f'{path} has no questions')
    return rows


def from_file(input, what, example_of, split, n, seed, kinds, columns=None):
    """
    n examples of a file, in an order that the seed decides. example_of(row) -> an example; whatever it raises for a row
    that is none becomes a ValueError that names the line. what: the rows that are expected, in words.
    """
    check_split(split, (*SPLITS, 'all'))
    if not input:
        raise UserError(f'this task has no questions of its own; name a file of them, --input=FILE, with {what}')
    found = []
    for where, row in read_rows(input, columns):
        try:
            found.append(example_of(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            why = f'there is no {error}' if isinstance(error, KeyError) else error
            raise UserError(f'{where}: {why}; expected {what}') from None
    check_kinds(kinds, sorted({example['kind'] for example in found}))
    found = [example for example in found if (not kinds or example['kind'] in kinds)
             and split in ('all', split_of(example['context']))]
    random.Random(seed).shuffle(found)
    return found[:n]


def choice_example(question, context, choices, label, kind):
    """An example of multiple choice, see above."""
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(f'choices={choices!r} are not 2 to {len(LETTERS)} texts')
    if not 0 <= label < len(choices):
        raise UserError(f'the right choice is number {label} of {len(choices)}')
    if not isinstance(kind, str):
        raise UserError(f'the kind of the question is {kind!r}, no text')
    asked = ''.join(f'\n{letter}. {choice}' for letter, choice in zip(LETTERS, choices, strict=False))
    return {'messages': [{'role': 'user', 'content': f'{question}{asked}\nAnswer with the letter alone.'}],
            'context': context, 'solution': choices[label], 'answer': LETTERS[label], 'kind': kind, 'choices': choices,
            'label': label}


def extract_letter(text):
    """The letter that an answer is, such as 'B', 'B.' or 'B. a choice'; None for any other."""
    text = text.strip()
    return text[0] if text and text[0] in LETTERS and text[1:2] in ('', '.', ')', '\n') else None


# Prompts --------------------------------------------------------------------------------------------------------------


def few_shot(example, shots):
    """The text that a model continues with an answer: examples that are solved, and then the question."""
    return '\n\n'.join([f'{shot["context"]} {shot["solution"]}' for shot in shots] + [example['context']])


def few_shot_prompt(example, pool, shots, tokenizer, room):
    """
    -> (few_shot() with examples from the pool, its ids, how many). They are of the question's own kind, where there are
    some, the same for the same question; fewer than `shots` if more would take above `room` tokens.
    """
    others = [other for other in pool if other['context'] != example['context']]
    same = [other for other in others if other['kind'] == example['kind']] or others
    chosen = random.Random(example['context']).sample(same, min(shots, len(same)))
    for count in range(len(chosen), -1, -1):
        text = few_shot(example, chosen[:count])
        ids = bos_ids(tokenizer) + tokenizer.encode(text, allowed_special='none')
        if len(ids) <= room:
            return text, ids, count
    raise too_long(example, ids, room)


def asked_of(example, tools):
    """What a chat model is asked, messages; with tools it is told first that it has a calculator."""
    return [{'role': 'system', 'content': SYSTEM}] * tools + example['messages']


def chat_prompt(example, template, tokenizer, room, tools=False):
    """The ids after which an assistant answers. tools: it is told that it has a calculator."""
    ids = render(asked_of(example, tools), template, tokenizer)
    if len(ids) > room:
        raise too_long(example, ids, room)
    return ids


def too_long(example, ids, room):
    return UserError(f'a question has {len(ids):,} tokens, and the context has room for {room:,} beside the answer: '
                      f'{example["context"][:60]!r}; shorter answers leave more, --max_new_tokens')


# What a model makes of them -------------------------------------------------------------------------------------------


def answer(model, tokenizer, prompts, max_new_tokens, template=None, num_samples=1, tools=False, seed=1337,
           batch_size=64, progress=lambda n: None, **controls):
    """
    -> texts, num_samples for each of the prompts, lists of ids, those of the first prompt first. template: of the
    chat, whose endings end an answer; None: plain text, where a blank line or another question does. tools: the model
    may call the calculator. progress: called with the number of prompts done. controls: of generate.Sampling.
    """
    stop_ids, stops = find_endings(template, tokenizer)
    if template is None:
        stops = ['\n\n', '\nQ:', '\nQuestion:']
    texts, at_once = [], max(1, batch_size // num_samples)
    for first in range(0, len(prompts), at_once):
        batch = prompts[first : first + at_once]
        numbers = range(first, first + len(batch))
        if tools:
            u = torch.stack([uniforms(seed, number, sample, max_new_tokens) for number in numbers
                             for sample in range(num_samples)])
            found, _ = generate_with_tools(model, tokenizer, [ids for ids in batch for _ in range(num_samples)],
                                           max_new_tokens, stop_ids, u, **controls)
            for ids in found:
                text = tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids)
                texts.append(text[: min((text.find(stop) for stop in stops if stop in text), default=None)])
        else:
            *_, samples = generate_texts(model, tokenizer, batch, Sampling(
                max_new_tokens, stops=stops, stop_ids=stop_ids, num_samples=num_samples, seed=seed, **controls), numbers)
            texts += [sample.text for sample in samples]
        progress(len(batch))
    return texts


def choice_prompts(example, context, context_ids, tokenizer):
    """
    [(context, continuation), ...] of ids, one for each choice: ' ' and its text, encoded together with the context,
    which is that of few_shot_prompt(); or where that is None, after chat_prompt(), the choice's letter.
    """
    if context is None:
        letters = LETTERS[: len(example['choices'])]
        return [(context_ids, tokenizer.encode(letter, allowed_special='none')) for letter in letters]
    pairs = []
    for choice in example['choices']:
        ids = bos_ids(tokenizer) + tokenizer.encode(f'{context} {choice}', allowed_special='none')
        pairs.append((ids[: len(context_ids)], ids[len(context_ids) :]))
    return pairs


@torch.no_grad()
def loglikelihoods(model, pairs, batch_size=64):
    """
    The log-probability, in nats, of each continuation after its context, [(context, continuation), ...] of ids. The
    last block_size + 1 tokens of both count. ValueError for a continuation of no tokens, or more than block_size.
    """
    block_size, device = model.config.block_size, model.lm_head.weight.device
    for _, continuation in pairs:
        if not 1 <= len(continuation) <= block_size:
            raise UserError(f'a choice has {len(continuation):,} tokens; expected 1 to {block_size:,}, the context')
    found = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))  # so that padding is little
    while order:
        T = min(block_size, len(pairs[order[-1]][0]) + len(pairs[order[-1]][1]) - 1)
        size = max(1, min(batch_size, 2**26 // (T * model.config.vocab_size)))  # logits of 256 MB
        rows, order = order[-size:], order[:-size]
        whole = [(pairs[i][0] + pairs[i][1])[-block_size - 1 :] for i in rows]
        x = torch.tensor([ids[:-1] + [0] * (T + 1 - len(ids)) for ids in whole])
        y = torch.tensor([[-1] * (len(ids) - 1 - len(pairs[i][1])) + ids[-len(pairs[i][1]) :]
                          + [-1] * (T + 1 - len(ids)) for i, ids in zip(rows, whole, strict=True)])
        x, y = to_device((x, y), device)
        logits = model(x, y)[0].float()  # (B, T, V)
        logprobs = logits.gather(-1, y.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)  # (B, T)
        for i, total in zip(rows, logprobs.double().masked_fill(y < 0, 0.0).sum(-1).tolist(), strict=True):
            found[i] = total
    return found


def measure(task, examples, model, tokenizer, template=None, pool=(), shots=0, max_new_tokens=128, num_samples=1,
            tools=False, seed=1337, batch_size=64, progress=lambda n: None, rate=None, **controls):
    """
    The accuracy of a model on a task: of a chat, if it has a template and shots is 0, or else of plain text that begins
    with that many solved examples of the pool. Multiple choice is decided by likelihood, everything else by answer().
    Of several samples the most frequent answer counts; with rate(example, texts) -> scores, the best (best of n).

    -> {'kinds': of accuracies(), 'shots': how many examples each had on average, 'others': {name: accuracy}}: of
    multiple choice that by the log-probability of a character of the choices, 'accuracy_norm'; of several samples
    'accuracy_of_one', the mean of all, 'accuracy_of_any', the share of questions that one of them or more gets right,
    and with rate 'accuracy_of_majority'.
    """
    block_size, is_choice = model.config.block_size, 'choices' in examples[0]
    room = block_size if is_choice else max(1, block_size - max_new_tokens)
    template = None if shots else template
    if template:
        found = [(None, chat_prompt(example, template, tokenizer, room, tools), 0) for example in examples]
    else:
        found = [few_shot_prompt(example, pool, shots, tokenizer, room) for example in examples]
    contexts, prompts, n_shots = zip(*found, strict=True)
    if is_choice:
        pairs = [pair for each in zip(examples, contexts, prompts, strict=True)
                 for pair in choice_prompts(*each, tokenizer)]
        logprobs, rights, norms = iter(loglikelihoods(model, pairs, batch_size)), [], []
        for example in examples:
            scores = list(itertools.islice(logprobs, len(example['choices'])))
            lengths = [1 if template else len(choice) for choice in example['choices']]  # letters are equally long
            by_length = [score / length for score, length in zip(scores, lengths, strict=True)]
            rights.append(scores.index(max(scores)) == example['label'])
            norms.append(by_length.index(max(by_length)) == example['label'])
            progress(1)
        others = {'accuracy_norm': sum(norms) / len(norms)}
    else:
        texts = answer(model, tokenizer, prompts, max_new_tokens, template, num_samples, tools, seed, batch_size,
                       progress, **controls)
        rights, others = [], {}
        n_right = n_any = n_majority = 0
        for i, example in enumerate(examples):
            mine = texts[i * num_samples : (i + 1) * num_samples]
            each = [task.evaluate(example, text) for text in mine]
            by_majority = task.evaluate(example, majority_text(task, mine))
            n_right, n_any, n_majority = n_right + sum(each), n_any + any(each), n_majority + by_majority
            scores = rate(example, mine) if rate else []
            rights.append(each[scores.index(max(scores))] if rate else by_majority)
        if num_samples > 1:
            others = {'accuracy_of_one': n_right / len(texts), 'accuracy_of_any': n_any / len(examples)}
        if rate:
            others['accuracy_of_majority'] = n_majority / len(examples)
    return {'kinds': accuracies([example['kind'] for example in examples], rights),
            'shots': sum(n_shots) / len(examples), 'others': others}


def majority_text(task, texts):
    """
    Of texts the first one with the answer that most come to (self-consistency, Wang et al. 2023); of answers that are
    equally frequent the one that came first counts, of texts without an answer none does unless all are.
    """
    answers = [task.extract(text) for text in texts]
    counts = collections.Counter(answer for answer in answers if answer is not None)
    return texts[answers.index(counts.most_common(1)[0][0])] if counts else texts[0]


def wilson(n_right, n, z=1.959964):
    """
    (low, high): the interval that holds the true accuracy in 95% of cases (for this z), n_right of n answers being
    right ("Probable Inference, the Law of Succession, and Statistical Inference", Wilson 1927). Unlike p +- z sd it
    stays in [0, 1] and has a width where all or none are right.
    """
    p, spread = n_right / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return 0.0 if n_right == 0 else centre - half, 1.0 if n_right == n else centre + half


def accuracies(kinds, rights):
    """
    {kind: {'n', 'right', 'accuracy', 'low', 'high'}}, sorted, and the same of 'all'. kinds, rights: of each question.
    """
    found = {}
    for kind, group in itertools.groupby(sorted(zip(kinds, rights, strict=True)), key=lambda pair: pair[0]):
        group = [right for _, right in group]
        found[kind] = (sum(group), len(group))
    found['all'] = (sum(rights), len(rights))
    return {kind: {'n': n, 'right': right, 'accuracy': right / n, **dict(zip(('low', 'high'), wilson(right, n),
                                                                            strict=True))}
            for kind, (right, n) in found.items()}
