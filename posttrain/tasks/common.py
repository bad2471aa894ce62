"""Load tasks, questions with checkable answers, and measure a model's accuracy.

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
    answer      extract(solution)
    kind        of question; accuracies are given per kind
    choices, label    multiple choice: the texts that may follow the context, and the index of the
        right one. In messages the choices have letters, and the answer is a letter
"""

import importlib.util
import itertools
import math
import os
import pkgutil
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from configurator import UserError
from data.documents import read_records, text_hash
from data.tokens import to_device
from flatgpt import shares
from flatgpt.generate import Sampling, generate_texts, majority, uniforms
from flatgpt.parallel import World
from posttrain import tasks
from posttrain.answers import LETTERS, letter_in
from posttrain.losses import token_logprobs
from posttrain.tools import toolbox
from tokenizer.chat import bos_ids, find_endings, render

SPLITS = ('train', 'val', 'test')
FUNCTIONS = ('examples', 'extract', 'evaluate', 'reward')  # functions of a task
KEYS = ('messages', 'context', 'solution', 'answer', 'kind')  # keys of an example

# Tasks and their examples -------------------------------------------------------------------------

@dataclass(frozen=True)
class Questions:
    """Hold the arguments of a task's examples()."""

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
                        f'{", ".join(sorted(built_in))}, or a file {path} of your own '
                        f'(posttrain/README.md)')
    spec = importlib.util.spec_from_file_location(f'tasks.{name}', path)
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    return task


def examples_of(task, questions, functions=FUNCTIONS, keys=KEYS):
    """Return a task's examples. Raises UserError for a missing function or key."""
    if missing := [name for name in functions if not hasattr(task, name)]:
        raise UserError(f'{task.__file__} has no {", ".join(missing)}; expected the functions that '
                        f'posttrain/tasks/common.py lists')
    q = questions
    examples = task.examples(q.split, q.n, q.seed, input=q.input, kinds=q.kinds)
    for example in examples:
        if missing := [key for key in keys if key not in example]:
            raise UserError(f'{task.__file__}: an example has no {", ".join(missing)}, it is '
                            f'{str(example)[:60]}; expected the keys in posttrain/tasks/common.py')
    return examples


def solved_examples(task, questions):
    """Return solved examples for few-shot prompts: of train, or of the same file."""
    split = 'all' if questions.split == 'all' else 'train'
    return examples_of(task, replace(questions, split=split, n=1000))


def split_of(content):
    """Return a question's split, by a hash of its content: val and test get a tenth."""
    place = text_hash(content)
    return 'test' if place < 0.1 else 'val' if place < 0.2 else 'train'


def check_split(split, splits=SPLITS):
    """Raise UserError for a split that is not among `splits`."""
    if split not in splits:
        raise UserError(f'split={split!r}: expected one of {", ".join(splits)}')


def check_kinds(kinds, known):
    """Raise UserError for a kind that is not known."""
    for kind in kinds:
        if kind not in known:
            raise UserError(f'kinds: there is no {kind!r}; expected some of {", ".join(known)}')


def from_file(questions, expected, example_of, columns=None):
    """Return the examples of a file, in an order that the seed fixes.

    expected: the shape of a row, in words. example_of: function from a row to an example; its
    errors become a UserError that names the line. columns: of a .csv without a header.
    """
    check_split(questions.split, (*SPLITS, 'all'))
    if not questions.input:
        raise UserError(f'this task has no questions of its own; name a file, --input=FILE, with '
                        f'{expected}')
    examples = []
    for where, row in read_records(questions.input, columns):
        try:
            examples.append(example_of(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            why = f'there is no {error}' if isinstance(error, KeyError) else error
            raise UserError(f'{where}: {why}; expected {expected}') from None
    if not examples:
        raise UserError(f'{questions.input} has no questions')
    known = sorted({example['kind'] for example in examples})
    check_kinds(questions.kinds, known)
    examples = [example for example in examples if example['kind'] in (questions.kinds or known)
                and questions.split in ('all', split_of(example['context']))]
    random.Random(questions.seed).shuffle(examples)
    return examples[: questions.n]


# Multiple choice ----------------------------------------------------------------------------------

def choice_example(question, context, choices, label, kind):
    """Make an example of multiple choice. Raises UserError for impossible choices."""
    if (not 2 <= len(choices) <= len(LETTERS)
            or not all(isinstance(choice, str) and choice for choice in choices)):
        raise UserError(f'choices={choices!r} are not 2 to {len(LETTERS)} texts')
    if not 0 <= label < len(choices):
        raise UserError(f'the right choice is number {label} of {len(choices)}')
    if not isinstance(kind, str):
        raise UserError(f'the kind of the question is {kind!r}, not a text')
    options = [f'{letter}. {choice}' for letter, choice in zip(LETTERS, choices, strict=False)]
    content = '\n'.join([question, *options, 'Answer with the letter alone.'])
    return {'messages': [{'role': 'user', 'content': content}], 'context': context,
            'solution': choices[label], 'answer': LETTERS[label], 'kind': kind, 'choices': choices,
            'label': label}


def evaluate_letter(example, text):
    """Return whether the text names the right choice, and no other."""
    return letter_in(text) == example['answer']


def reward_letter(example, text):
    """Return 1 for the right letter, else 0."""
    return float(evaluate_letter(example, text))


def choice_prompts(example, context, context_ids, tokenizer):
    """Return [(context ids, continuation ids), ...], one for each choice.

    The continuation is ' ' and the choice, encoded together with the text `context` of
    few_shot_prompt(). With context=None, after chat_prompt(), it is the choice's letter.
    """
    if context is None:
        return [(context_ids, tokenizer.encode(letter, allowed_special='none'))
                for letter in LETTERS[: len(example['choices'])]]
    wholes = [bos_ids(tokenizer) + tokenizer.encode(f'{context} {choice}', allowed_special='none')
              for choice in example['choices']]
    return [(ids[: len(context_ids)], ids[len(context_ids) :]) for ids in wholes]


@torch.no_grad()
def loglikelihoods(model, pairs, batch_size=64):
    """Return the log-probability in nats of each continuation after its context.

    pairs: [(context ids, continuation ids), ...]. The last block_size + 1 tokens of both count.
    Raises UserError for a continuation of no tokens or of more than block_size.
    """
    block_size, device = model.config.block_size, model.lm_head.weight.device
    for _, continuation in pairs:
        if not 1 <= len(continuation) <= block_size:
            raise UserError(f'a choice has {len(continuation):,} tokens; expected 1 to '
                            f'{block_size:,}, the context')
    logprobs = [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))  # little padding
    while order:
        T = min(block_size, sum(map(len, pairs[order[-1]])) - 1)
        size = max(1, min(batch_size, 2**26 // (T * model.config.vocab_size)))  # logits of 256 MB
        rows, order = order[-size:], order[:-size]
        x, y = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
        for row, (context, continuation) in enumerate(pairs[i] for i in rows):
            ids = torch.tensor((context + continuation)[-block_size - 1 :])
            end, start = len(ids) - 1, len(ids) - 1 - len(continuation)
            x[row, :end], y[row, start:end] = ids[:-1], ids[start + 1 :]
        x, y = to_device((x, y), device)
        logits = model(x, y)[0].float()  # (B, T, V)
        sums = token_logprobs(logits, y.clamp(min=0)).double().masked_fill(y < 0, 0.0).sum(-1)
        for i, total in zip(rows, sums.tolist(), strict=True):
            logprobs[i] = total
    return logprobs


# Prompts and answers ------------------------------------------------------------------------------

def few_shot(example, shots):
    """Return a text to continue: the solved examples `shots`, then the question."""
    solved = [f'{shot["context"]} {shot["solution"]}' for shot in shots]
    return '\n\n'.join([*solved, example['context']])


def few_shot_prompt(example, pool, shots, tokenizer, room):
    """Build a few-shot prompt; -> (text, ids, number of solved examples).

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
    """Return the messages of a question, with a system message that permits tools.

    tools: a setting of toolbox().
    """
    tools = toolbox(tools)
    system = [{'role': 'system', 'content': tools.system}] if tools else []
    return system + example['messages']


def chat_prompt(example, template, tokenizer, room, tools=False):
    """Return the ids that an assistant answers. Raises UserError beyond `room` ids."""
    ids = render(chat_messages(example, tools), template, tokenizer)
    if len(ids) > room:
        raise too_long(example, ids, room)
    return ids


def too_long(example, ids, room):
    """Return the UserError for a question that leaves its answer too little room."""
    return UserError(f'a question has {len(ids):,} tokens, and the context has room for {room:,} '
                     f'beside the answer: {example["context"][:60]!r}; lower --max_new_tokens')


@dataclass(frozen=True)
class Answering:
    """Hold the settings with which a model answers the questions of a task."""

    template: str | None = None  # the chat template; None: plain text
    tools: bool | str = False  # those that the model may call, see toolbox()
    shots: int = 0  # solved examples of `pool` before the question, as plain text
    pool: tuple | list = ()
    max_new_tokens: int = 128
    temperature: float = 1.0
    num_samples: int = 1  # answers to each question, of which the most frequent counts
    seed: int = 1337
    batch_size: int = 64  # answers at once
    rate: Callable | None = None  # (example, texts) -> scores: the best answer counts instead
    progress: Callable = lambda n: None  # called with the number of questions done
    world: World = field(default_factory=World)  # processes that share the questions


def answer(model, tokenizer, prompts, how):
    """Answer prompts, lists of ids; -> texts, `num_samples` in a row for each prompt.

    In a chat the template's endings end an answer; in plain text a blank line or a new question.
    Each of several processes answers every how.world.size-th prompt, and returns those texts.
    """
    stop_ids, stops = find_endings(how.template, tokenizer)
    if how.template is None:
        stops = ['\n\n', '\nQ:', '\nQuestion:']
    texts, at_once = [], max(1, how.batch_size // how.num_samples)
    of_process = range(len(prompts))[how.world.rank :: how.world.size]
    for first in range(0, len(of_process), at_once):
        numbers, samples = of_process[first : first + at_once], range(how.num_samples)
        batch = [prompts[number] for number in numbers]
        if how.tools:
            sampling = Sampling(how.max_new_tokens, how.temperature, stop_ids=stop_ids)
            u = torch.stack([uniforms(how.seed, number, sample, how.max_new_tokens)
                             for number in numbers for sample in samples])
            repeated = [ids for ids in batch for _ in samples]
            for ids in toolbox(how.tools).generate(model, tokenizer, repeated, sampling, u)[0]:
                text = tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids)
                ends = [text.find(stop) for stop in stops if stop in text]
                texts.append(text[: min(ends, default=None)])
        else:
            sampling = Sampling(how.max_new_tokens, how.temperature, stop_ids=stop_ids, stops=stops,
                                num_samples=how.num_samples, seed=how.seed)
            *_, drawn = generate_texts(model, tokenizer, batch, sampling, numbers)
            texts += [sample.text for sample in drawn]
        how.progress(len(batch))
    return texts


# Accuracies ---------------------------------------------------------------------------------------

def encode_questions(examples, block_size, tokenizer, how):
    """Build the prompts; -> [(text or None, ids, number of solved examples), ...].

    how: Answering, with a template or shots. Raises UserError for a question that leaves its
    answer too little room.
    """
    is_choice = 'choices' in examples[0]
    room = block_size if is_choice else max(1, block_size - how.max_new_tokens)
    if how.template:
        return [(None, chat_prompt(example, how.template, tokenizer, room, how.tools), 0)
                for example in examples]
    return [few_shot_prompt(example, how.pool, how.shots, tokenizer, room) for example in examples]


def measure(task, examples, model, tokenizer, how):
    """Measure a model's accuracy on examples of a task. how: Answering.

    Multiple choice is decided by likelihood, all else by answer(). -> {'kinds': of accuracies(),
    'shots': mean number of solved examples, 'others': {name: accuracy}}. The others are, of
    multiple choice, 'accuracy_norm', by log-probability per character; of several samples,
    'accuracy_of_one', their mean, and 'accuracy_of_any', of questions with at least one right
    answer; with rate, 'accuracy_of_majority'.
    """
    how = replace(how, template=None) if how.shots else how
    encoded = encode_questions(examples, model.config.block_size, tokenizer, how)
    contexts, prompts, n_shots = zip(*encoded, strict=True)
    is_choice = 'choices' in examples[0]
    of_process = slice(how.world.rank, None, how.world.size)  # the questions of this process
    asked = examples[of_process]
    with shares.together(how.world):
        if is_choice:
            pairs = [pair for each in zip(asked, contexts[of_process], prompts[of_process],
                                          strict=True) for pair in choice_prompts(*each, tokenizer)]
            logprobs = iter(loglikelihoods(model, pairs, how.batch_size))
            outcomes = choose(asked, logprobs, by_letter=bool(how.template))
            how.progress(len(asked))
        else:
            outcomes = vote(task, asked, answer(model, tokenizer, prompts, how), how)
    rights, counts = zip(*shares.gather(outcomes, how.world), strict=True)
    others = {name: sum(of[name][0] for of in counts) / sum(of[name][1] for of in counts)
              for name in counts[0]}
    return {'kinds': accuracies([example['kind'] for example in examples], rights),
            'shots': sum(n_shots) / len(examples), 'others': others}


def choose(examples, logprobs, by_letter):
    """Compare the likeliest choices with the labels; -> outcomes of the questions.

    An outcome is (whether it is right, {another accuracy: (number right, number of all)}).
    logprobs: iterator over those of all choices. by_letter: the continuations were letters, which
    are equally long.
    """
    outcomes = []
    for example in examples:
        scores = list(itertools.islice(logprobs, len(example['choices'])))
        lengths = [1 if by_letter else len(choice) for choice in example['choices']]
        means = [score / length for score, length in zip(scores, lengths, strict=True)]
        of_means = means.index(max(means)) == example['label']
        outcomes.append((scores.index(max(scores)) == example['label'],
                         {'accuracy_norm': (of_means, 1)}))
    return outcomes


def vote(task, examples, texts, how):
    """Evaluate the answer that counts for each question; -> outcomes, as choose()."""
    outcomes, n = [], how.num_samples
    for i, example in enumerate(examples):
        samples, counts = texts[i * n : (i + 1) * n], {}
        of_samples = [bool(task.evaluate(example, text)) for text in samples]
        of_majority = bool(task.evaluate(example, majority_text(task, samples)))
        if n > 1:
            counts = {'accuracy_of_one': (sum(of_samples), n),
                      'accuracy_of_any': (any(of_samples), 1)}
        if how.rate:
            counts['accuracy_of_majority'] = of_majority, 1
        scores = how.rate(example, samples) if how.rate else []
        right = of_samples[scores.index(max(scores))] if scores else of_majority
        outcomes.append((right, counts))
    return outcomes


def majority_text(task, texts):
    """Return the first text whose answer is the most frequent one.

    Texts without an answer do not vote; if none has one, the first text is returned.
    """
    answers = [task.extract(text) for text in texts]
    answers = ['' if extracted is None else str(extracted) for extracted in answers]
    votes = majority(answers, r'(?s).+')
    return texts[answers.index(votes[0][0])] if votes else texts[0]


def wilson(n_right, n, z=1.959964):
    """Return Wilson's interval (low, high) of an accuracy, 95% for this z.

    Unlike p +- z sd it stays in [0, 1] and is wide at 0 and 1 ("Probable Inference, the Law of
    Succession, and Statistical Inference", Wilson 1927).
    """
    p, spread = n_right / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return 0.0 if n_right == 0 else centre - half, 1.0 if n_right == n else centre + half


def accuracies(kinds, rights):
    """Return {kind: {'n', 'right', 'accuracy', 'low', 'high'}}, and 'all' last.

    kinds, rights: of each question.
    """
    groups, report = {kind: [] for kind in sorted(set(kinds))}, {}
    for kind, right in zip(kinds, rights, strict=True):
        groups[kind].append(right)
    for kind, group in {**groups, 'all': rights}.items():
        low, high = wilson(sum(group), len(group))
        report[kind] = {'n': len(group), 'right': sum(group), 'accuracy': sum(group) / len(group),
                        'low': low, 'high': high}
    return report
