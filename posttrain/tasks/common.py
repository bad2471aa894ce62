"""
Tasks: questions whose answers a program can check, and the accuracy of a model on them.

    task = load('tiny_chat')
    examples = examples_of(task, Questions('test', 500))
    report = measure(task, examples, model, tokenizer, Answering(template))

A task is a module posttrain/tasks/NAME.py, or tasks/NAME.py in the current folder, with

    examples(split, n, seed=0, input='', kinds=()) -> at most n examples, a pure function of these.
        split: 'train', 'val' or 'test', which share no question, or 'all' of a file; input: the
        file, for a task that reads one; kinds: only these, () for all
    extract(text) -> the answer in the assistant's text, or None
    evaluate(example, text) -> whether that answer is right
    reward(example, text) -> 0 to 1, the reward of reinforcement learning; 1 is right

An example is a dict of plain values:

    messages    the question as a conversation, see tokenizer/chat.py
    context     the question as plain text, which ' ' + solution continues
    solution    a text that evaluate() accepts
    answer      what extract() returns for it
    kind        of question; accuracies are given per kind
    choices, label    multiple choice: the texts that may follow the context, and the index of the
        right one. In messages the choices have letters, and the answer is a letter
"""

import csv
import importlib.util
import itertools
import math
import os
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from configurator import UserError
from data.documents import text_hash
from data.tokens import to_device
from flatgpt import jsonl
from flatgpt.generate import generate_texts, majority, uniforms
from posttrain import tasks
from posttrain.rollouts import Sampling
from posttrain.tools import SYSTEM, generate_with_tools
from tokenizer.chat import bos_ids, find_endings, render

LETTERS = 'ABCDEFGHIJ'  # of the choices
SPLITS = ('train', 'val', 'test')
FUNCTIONS = ('examples', 'extract', 'evaluate', 'reward')  # of a task
KEYS = ('messages', 'context', 'solution', 'answer', 'kind')  # of an example

# Tasks and their examples -------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Which examples of a task: the arguments of its examples()."""

    split: str
    n: int
    seed: int = 0
    input: str = ''
    kinds: tuple = ()


def load(name):
    """Import a task by name. Raises UserError with the names of the built-in tasks."""
    built_in = {module.name for module in pkgutil.iter_modules(tasks.__path__)} - {'common'}
    if name in built_in:
        return importlib.import_module(f'posttrain.tasks.{name}')
    path = os.path.join('tasks', f'{name}.py')
    if not os.path.isfile(path):
        raise UserError(f'there is no task {name!r}; expected one of '
                        f'{", ".join(sorted(built_in))}, or a file {path} of your own (posttrain/README.md)')
    spec = importlib.util.spec_from_file_location(f'tasks.{name}', path)
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    return task


def examples_of(task, questions, functions=FUNCTIONS, keys=KEYS):
    """Return a task's examples. Raises UserError if the task lacks a function, or an example a key."""
    if missing := [name for name in functions if not hasattr(task, name)]:
        raise UserError(f'{task.__file__} has no {", ".join(missing)}; expected the functions that '
                        f'posttrain/tasks/common.py lists')
    q = questions
    examples = task.examples(q.split, q.n, q.seed, input=q.input, kinds=q.kinds)
    for example in examples:
        if missing := [key for key in keys if key not in example]:
            raise UserError(f'{task.__file__}: an example has no {", ".join(missing)}, it is '
                            f'{str(example)[:60]}; expected the keys that posttrain/tasks/common.py lists')
    return examples


def split_of(content):
    """Return the split of a question: 'val' and 'test' a tenth each, by a hash of its content."""
    place = text_hash(content)
    return 'test' if place < 0.1 else 'val' if place < 0.2 else 'train'


def check_split(split, splits=SPLITS):
    if split not in splits:
        raise UserError(f'split={split!r}: expected one of {", ".join(splits)}')


def kinds_of(text):
    """Parse a setting: 'addition, spelling' -> ('addition', 'spelling'); '' -> (), all kinds."""
    return tuple(kind.strip() for kind in text.split(',') if kind.strip())


def check_kinds(kinds, known):
    """Raise UserError for a kind that is not known."""
    for kind in kinds:
        if kind not in known:
            raise UserError(f'kinds: there is no {kind!r}; expected some of {", ".join(known)}')


def read_rows(path, columns=None):
    """
    Read the rows of a .jsonl, .csv or .parquet file; -> [(where, dict), ...].

    columns: of a .csv whose first line names no column 'question'. Raises UserError for a file that
    cannot be read or has no rows.
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
            raise UserError(f'{path} cannot be read as CSV: {error}') from None
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
            raise UserError(f"{path} is Parquet, which needs pyarrow: pip install -e '.[data]'") from None
        try:
            rows = [(f'{path}, row {i}', row) for i, row in enumerate(pq.read_table(path).to_pylist(), 1)]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f'{path} cannot be read as Parquet: {error}') from None
    else:
        raise UserError(f'input={path!r}: expected a .jsonl, .csv or .parquet file')
    if not rows:
        raise UserError(f'{path} has no questions')
    return rows


def from_file(questions, expected, example_of, columns=None):
    """
    Return the examples of a file, in an order that the seed fixes.

    expected: the rows' shape, in words. example_of: function from a row to an example; an error that
    it raises becomes a UserError naming the line. columns: see read_rows().
    """
    check_split(questions.split, (*SPLITS, 'all'))
    if not questions.input:
        raise UserError(f'this task has no questions of its own; name a file, --input=FILE, with {expected}')
    examples = []
    for where, row in read_rows(questions.input, columns):
        try:
            examples.append(example_of(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            why = f'there is no {error}' if isinstance(error, KeyError) else error
            raise UserError(f'{where}: {why}; expected {expected}') from None
    kinds = questions.kinds
    check_kinds(kinds, sorted({example['kind'] for example in examples}))
    examples = [example for example in examples if (not kinds or example['kind'] in kinds)
                and questions.split in ('all', split_of(example['context']))]
    random.Random(questions.seed).shuffle(examples)
    return examples[: questions.n]


def choice_example(question, context, choices, label, kind):
    """Make an example of multiple choice. Raises UserError for impossible choices."""
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f'choices={choices!r} are not 2 to {len(LETTERS)} texts')
    if not 0 <= label < len(choices):
        raise UserError(f'the right choice is number {label} of {len(choices)}')
    if not isinstance(kind, str):
        raise UserError(f'the kind of the question is {kind!r}, not a text')
    listed = ''.join(f'\n{letter}. {choice}' for letter, choice in zip(LETTERS, choices, strict=False))
    return {'messages': [{'role': 'user', 'content': f'{question}{listed}\nAnswer with the letter alone.'}],
            'context': context, 'solution': choices[label], 'answer': LETTERS[label], 'kind': kind,
            'choices': choices, 'label': label}


def extract_letter(text):
    """Return the letter of an answer such as 'B', 'B.' or 'B. a choice'; None for any other text."""
    text = text.strip()
    return text[0] if text and text[0] in LETTERS and text[1:2] in ('', '.', ')', '\n') else None


# Prompts ------------------------------------------------------------------------------------------


def few_shot(example, shots):
    """Return a text to continue: the solved examples `shots`, then the question."""
    return '\n\n'.join([f'{shot["context"]} {shot["solution"]}' for shot in shots] + [example['context']])


def few_shot_prompt(example, pool, shots, tokenizer, room):
    """
    Build a few-shot prompt; -> (text, ids, number of solved examples).

    The solved examples are a sample of the pool that depends on the question alone, of its kind
    where the pool has some. There are fewer than `shots` if the prompt would exceed `room` tokens.
    """
    others = [other for other in pool if other['context'] != example['context']]
    same_kind = [other for other in others if other['kind'] == example['kind']] or others
    chosen = random.Random(example['context']).sample(same_kind, min(shots, len(same_kind)))
    for count in range(len(chosen), -1, -1):
        text = few_shot(example, chosen[:count])
        ids = bos_ids(tokenizer) + tokenizer.encode(text, allowed_special='none')
        if len(ids) <= room:
            return text, ids, count
    raise too_long(example, ids, room)


def chat_messages(example, tools):
    """Return the messages of a question. tools: the system message permits the calculator."""
    return [{'role': 'system', 'content': SYSTEM}] * tools + example['messages']


def chat_prompt(example, template, tokenizer, room, tools=False):
    """Return the ids that an assistant answers. Raises UserError for more than `room` of them."""
    ids = render(chat_messages(example, tools), template, tokenizer)
    if len(ids) > room:
        raise too_long(example, ids, room)
    return ids


def too_long(example, ids, room):
    return UserError(f'a question has {len(ids):,} tokens, and the context has room for {room:,} beside the '
                     f'answer: {example["context"][:60]!r}; lower --max_new_tokens')


def choice_prompts(example, context, context_ids, tokenizer):
    """
    Return [(context ids, continuation ids), ...], one for each choice.

    The continuation is ' ' and the choice, encoded together with the text `context` of
    few_shot_prompt(). With context=None, after chat_prompt(), it is the choice's letter.
    """
    if context is None:
        letters = LETTERS[: len(example['choices'])]
        return [(context_ids, tokenizer.encode(letter, allowed_special='none')) for letter in letters]
    pairs = []
    for choice in example['choices']:
        ids = bos_ids(tokenizer) + tokenizer.encode(f'{context} {choice}', allowed_special='none')
        pairs.append((ids[: len(context_ids)], ids[len(context_ids) :]))
    return pairs


# Answers and accuracies ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Answering:
    """
    How a model answers the questions of a task.

    template: of the chat; None, or shots above 0: plain text after that many solved examples of
    `pool`. rate: function (example, texts) -> scores, whose best answer counts (best of n); None: the
    most frequent answer counts. progress: called with the number of questions done.
    """

    template: str | None = None
    tools: bool = False  # the model may call the calculator
    shots: int = 0
    pool: tuple | list = ()
    max_new_tokens: int = 128
    temperature: float = 1.0
    num_samples: int = 1  # answers to each question
    seed: int = 1337
    batch_size: int = 64  # answers at once
    rate: Callable | None = None
    progress: Callable = lambda n: None


def answer(model, tokenizer, prompts, answering):
    """
    Answer prompts, lists of ids; -> texts, num_samples for each prompt, the first prompt's first.

    In a chat the template's endings end an answer; in plain text a blank line or a new question.
    """
    how = answering
    stop_ids, stops = find_endings(how.template, tokenizer)
    if how.template is None:
        stops = ['\n\n', '\nQ:', '\nQuestion:']
    texts, at_once = [], max(1, how.batch_size // how.num_samples)
    for first in range(0, len(prompts), at_once):
        batch = prompts[first : first + at_once]
        numbers = range(first, first + len(batch))
        if how.tools:
            u = torch.stack([uniforms(how.seed, number, sample, how.max_new_tokens) for number in numbers
                             for sample in range(how.num_samples)])
            sampling = Sampling(how.max_new_tokens, temperature=how.temperature, stop_ids=stop_ids)
            repeated = [ids for ids in batch for _ in range(how.num_samples)]
            for ids in generate_with_tools(model, tokenizer, repeated, sampling, u)[0]:
                text = tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids)
                texts.append(text[: min((text.find(stop) for stop in stops if stop in text), default=None)])
        else:
            *_, samples = generate_texts(model, tokenizer, batch, how.max_new_tokens, how.num_samples, stops,
                                         how.seed, numbers, stop_ids=stop_ids, temperature=how.temperature)
            texts += [sample.text for sample in samples]
        how.progress(len(batch))
    return texts


@torch.no_grad()
def loglikelihoods(model, pairs, batch_size=64):
    """
    Return the log-probability in nats of each continuation after its context.

    pairs: [(context ids, continuation ids), ...]. The last block_size + 1 tokens of both count.
    Raises UserError for a continuation of no tokens or of more than block_size.
    """
    block_size, device = model.config.block_size, model.lm_head.weight.device
    for _, continuation in pairs:
        if not 1 <= len(continuation) <= block_size:
            raise UserError(f'a choice has {len(continuation):,} tokens; expected 1 to {block_size:,}, the context')
    logprobs = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))  # little padding
    while order:
        T = min(block_size, len(pairs[order[-1]][0]) + len(pairs[order[-1]][1]) - 1)
        size = max(1, min(batch_size, 2**26 // (T * model.config.vocab_size)))  # logits of 256 MB
        rows, order = order[-size:], order[:-size]
        sequences = [(pairs[i][0] + pairs[i][1])[-block_size - 1 :] for i in rows]
        x = torch.tensor([ids[:-1] + [0] * (T + 1 - len(ids)) for ids in sequences])
        y = torch.tensor([[-1] * (len(ids) - 1 - len(pairs[i][1])) + ids[-len(pairs[i][1]) :]
                          + [-1] * (T + 1 - len(ids)) for i, ids in zip(rows, sequences, strict=True)])
        x, y = to_device((x, y), device)
        logits = model(x, y)[0].float()  # (B, T, V)
        token_logprobs = logits.gather(-1, y.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)  # (B, T)
        sums = token_logprobs.double().masked_fill(y < 0, 0.0).sum(-1).tolist()
        for i, total in zip(rows, sums, strict=True):
            logprobs[i] = total
    return logprobs


def measure(task, examples, model, tokenizer, answering):
    """
    Measure the accuracy of a model on examples of a task.

    Multiple choice is decided by likelihood, all else by answer(). -> {'kinds': of accuracies(),
    'shots': mean number of solved examples, 'others': {name: accuracy}}. The others are, of multiple
    choice, 'accuracy_norm', by log-probability per character; of several samples, 'accuracy_of_one',
    their mean, and 'accuracy_of_any', of questions with at least one right answer; with rate,
    'accuracy_of_majority'.
    """
    block_size, is_choice = model.config.block_size, 'choices' in examples[0]
    room = block_size if is_choice else max(1, block_size - answering.max_new_tokens)
    if answering.shots:
        answering = replace(answering, template=None)
    if answering.template:
        asked = [(None, chat_prompt(example, answering.template, tokenizer, room, answering.tools), 0)
                 for example in examples]
    else:
        asked = [few_shot_prompt(example, answering.pool, answering.shots, tokenizer, room)
                 for example in examples]
    contexts, prompts, n_shots = zip(*asked, strict=True)
    if is_choice:
        pairs = [pair for each in zip(examples, contexts, prompts, strict=True)
                 for pair in choice_prompts(*each, tokenizer)]
        logprobs = iter(loglikelihoods(model, pairs, answering.batch_size))
        rights, others = choose(examples, logprobs, by_letter=bool(answering.template))
        answering.progress(len(examples))
    else:
        texts = answer(model, tokenizer, prompts, answering)
        rights, others = vote(task, examples, texts, answering)
    return {'kinds': accuracies([example['kind'] for example in examples], rights),
            'shots': sum(n_shots) / len(examples), 'others': others}


def choose(examples, logprobs, by_letter):
    """
    Compare the likeliest choices to the labels; -> (list of bools, other accuracies).

    logprobs: iterator over those of all choices. by_letter: the continuations were letters, which
    are equally long.
    """
    rights, norms = [], []
    for example in examples:
        scores = list(itertools.islice(logprobs, len(example['choices'])))
        lengths = [1 if by_letter else len(choice) for choice in example['choices']]
        per_character = [score / length for score, length in zip(scores, lengths, strict=True)]
        rights.append(scores.index(max(scores)) == example['label'])
        norms.append(per_character.index(max(per_character)) == example['label'])
    return rights, {'accuracy_norm': sum(norms) / len(norms)}


def vote(task, examples, texts, answering):
    """Evaluate the answer of each question that counts; -> (list of bools, other accuracies)."""
    n, rate = answering.num_samples, answering.rate
    rights, others = [], {}
    n_right = n_any = n_majority = 0
    for i, example in enumerate(examples):
        samples = texts[i * n : (i + 1) * n]
        each = [task.evaluate(example, text) for text in samples]
        by_majority = task.evaluate(example, majority_text(task, samples))
        n_right, n_any, n_majority = n_right + sum(each), n_any + any(each), n_majority + by_majority
        scores = rate(example, samples) if rate else []
        rights.append(each[scores.index(max(scores))] if rate else by_majority)
    if n > 1:
        others = {'accuracy_of_one': n_right / len(texts), 'accuracy_of_any': n_any / len(examples)}
    if rate:
        others['accuracy_of_majority'] = n_majority / len(examples)
    return rights, others


def majority_text(task, texts):
    """
    Return the first text with the most frequent answer; see flatgpt.generate.majority.

    Texts without an answer do not vote; if none has one, the first text is returned.
    """
    answers = [task.extract(text) for text in texts]
    answers = ['' if extracted is None else str(extracted) for extracted in answers]
    votes = majority(answers, r'(?s).+')
    return texts[answers.index(votes[0][0])] if votes else texts[0]


def wilson(n_right, n, z=1.959964):
    """
    Return Wilson's interval (low, high) of an accuracy, 95% for this z.

    Unlike p +- z sd it stays in [0, 1] and is wide at 0 and 1 ("Probable Inference, the Law of
    Succession, and Statistical Inference", Wilson 1927).
    """
    p, spread = n_right / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return 0.0 if n_right == 0 else centre - half, 1.0 if n_right == n else centre + half


def accuracies(kinds, rights):
    """
    Return {kind: {'n', 'right', 'accuracy', 'low', 'high'}}, sorted by kind, and 'all' last.

    kinds, rights: of each question.
    """
    by_kind = {kind: [r for k, r in zip(kinds, rights, strict=True) if k == kind] for kind in sorted(set(kinds))}
    report = {}
    for kind, group in {**by_kind, 'all': rights}.items():
        low, high = wilson(sum(group), len(group))
        report[kind] = {'n': len(group), 'right': sum(group), 'accuracy': sum(group) / len(group),
                        'low': low, 'high': high}
    return report
