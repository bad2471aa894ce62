"""
Let a model think, call tools and read their outputs; and let it keep a list of tasks.

    $ python -m lab.react                   # about two minutes; its models take 12 minutes, once
    $ python -m lab.react --share=0.05 --questions=8 --goals=4 --out=out-tiny   # a check

The questions are about people and towns of lab/facts.py that the model has never read. "In which
town does the friend of Zolin live?" takes two calls of lookup, "How much older is Zolin than Maru?"
two and one of the calculator. The agent is the reader of lab.retrieval, finetuned on trajectories
about other names: a thought, a call, its output, and so on (ReAct). The same model also answers
without tools: closed book, with the passages that a search finds for the question, and with the
right passages. Then it keeps a list of tasks (as AutoGPT does): a loop presents a goal of several
questions and the tasks that are done, the model names the next task, and the loop solves it with
tools, until the model writes "Finished.".

Measured, 20 questions of each kind, of two calls: 98.8% right with tools (93 to 100), 70.0% with
the right passages and no tools, 0 with the passages of one search or closed book.

Sources: "ReAct: Synergizing Reasoning and Acting in Language Models", Yao et al. 2023; AutoGPT,
Richards 2023; "State of GPT", Karpathy 2023. Needs '.[lab]'.
"""

import random
import re
from collections import Counter

import numpy as np
import torch

from bench.common import table
from configurator import Count, Positive, Seed, UserError, override
from flatgpt.generate import Sampling
from lab import common, facts, store
from lab.course import Course
from lab.reader import gain, make_reader, open_model, percent, read, show
from posttrain.tools import tool, toolbox
from tokenizer.chat import PYTHON, PYTHON_END, TEMPLATE, find_endings, render

# Settings -----------------------------------------------------------------------------------------
questions: Count = 40  # of each kind
goals: Count = 20  # of each number of parts
parts: Count = 5  # most questions in a goal; the agent was trained on goals of 1 to 3
share: Positive = 1.0  # of the steps of the course's models
seed: Seed = 1  # of the store and the questions
out = 'out-lab'  # folder of the picture and the numbers; the models are in its folder state_of_gpt
config = override(globals())
# --------------------------------------------------------------------------------------------------

PEOPLE, TOWNS = 800, 200  # in the store, as in lab.retrieval
TALKS, STEPS = 5_000, 600  # conversations and steps of finetuning the agent, for share=1
BLOCK_SIZE = 960  # tokens: the tools, a question and three calls with their outputs
METHODS = {'tools': common.GREEN, 'right passages': common.BLUE, 'passages found': common.SKY,
           'closed book': common.RED}
CALL = re.compile(f'{re.escape(PYTHON)}(.*?){re.escape(PYTHON_END)}', re.DOTALL)

# The tools ----------------------------------------------------------------------------------------

opened = {}  # 'world' and 'store' that the tools read


@tool
def lookup(title: str) -> str:
    """Return an article."""
    if title not in opened['world']:
        raise UserError(f'there is no article {title!r}')
    return ' '.join(text for _, text in facts.article(title, opened['world'][title]))


@tool
def search(query: str) -> str:
    """Return a passage."""
    return opened['store'].texts[opened['store'].by_words([query], 1)[0, 0]]


def open_world(world):
    """Make the tools read a world."""
    opened.update(world=world, store=store.Store(world))


# The agent ----------------------------------------------------------------------------------------

def make_agent(course, tools):
    """Finetune the reader to call tools; -> the agent, (model, tokenizer)."""
    make_reader(course)
    world = facts.make_world(4000, 800, 'train', course.seed + 1)
    open_world(world)
    talks = facts.acting_talks(course.scaled(TALKS), course.seed, world, tools)
    return open_model(course.finetune('agent', start='reader', talks=talks, block_size=BLOCK_SIZE,
                                      batch_size=4, max_iters=STEPS, eval_interval=150))


def act(agent, asked, tools):
    """Return the trajectories of questions: thoughts, calls, outputs and the answer."""
    model, tokenizer = agent
    system = {'role': 'system', 'content': tools.system}
    prompts = [render([system, *facts.messages(text)], TEMPLATE, tokenizer) for text in asked]
    stop_ids, _ = find_endings(TEMPLATE, tokenizer)
    room = model.config.block_size - max(map(len, prompts), default=0)
    sampling = Sampling(room, temperature=0.0, stop_ids=stop_ids)
    order, texts = sorted(range(len(asked)), key=lambda i: len(prompts[i])), [''] * len(asked)
    for batch in (order[i : i + 64] for i in range(0, len(order), 64)):
        answers, _ = tools.generate(model, tokenizer, [prompts[i] for i in batch], sampling,
                                    torch.zeros(len(batch), room))
        for i, ids in zip(batch, answers, strict=True):
            has_ended = ids[-1] in stop_ids
            texts[i] = tokenizer.decode(ids[:-1]) if has_ended else tokenizer.decode(ids) + PYTHON
    return texts


def fault(example, text, world):
    """Return why a trajectory is wrong, or None for a right answer.

    The first wrong call counts: its name was miscopied if there is no such article.
    """
    if is_right(example, text):
        return None
    calls, needed = CALL.findall(text), [call for _, call, _ in example['steps']]
    for call, expected in zip(calls, needed, strict=False):
        if call != expected:
            name = call.removeprefix('lookup: ')
            return 'name miscopied' if name != call and name not in world else 'wrong call'
    if text.endswith(PYTHON) or len(calls) > len(needed):
        return 'no end'
    return 'too few calls' if len(calls) < len(needed) else 'wrong last step'


def is_right(example, text):
    """Return whether a text ends with the answer."""
    return facts.value_in(text) == example['answer']


# The list of tasks --------------------------------------------------------------------------------

def work_off(agent, jobs, tools):
    """Let the agent name and solve tasks; -> [[(task, trajectory), ...], ...].

    jobs: goals, lists of examples. A list of twice as many tasks as the goal has ends the loop.
    """
    done, going = [[] for _ in jobs], list(range(len(jobs)))
    while going:
        asked = [facts.plan([part['question'] for part in jobs[i]],
                            [(task, facts.value_in(text)) for task, text in done[i]])
                 for i in going]
        named = {i: text.removeprefix('Next: ') for i, text in
                 zip(going, read(agent, asked), strict=True) if text.startswith('Next: ')}
        for i, text in zip(named, act(agent, list(named.values()), tools), strict=True):
            done[i].append((named[i], text))
        going = [i for i in named if len(done[i]) < 2 * len(jobs[i])]
    return done


def list_fault(job, done):
    """Return why a goal was not reached, or None.

    job: examples. done: [(task, text), ...]. A fault of the list counts before one of a task.
    """
    tasks, expected = [task for task, _ in done], [part['question'] for part in job]
    if set(tasks) - set(expected):
        return 'task miscopied'
    if set(expected) - set(tasks):
        return 'task forgotten'
    if len(tasks) > len(expected):
        return 'task repeated'
    texts = dict(done)
    return None if all(is_right(part, texts[part['question']]) for part in job) else 'task failed'


# Results ------------------------------------------------------------------------------------------

def picture(results, faults, lists):
    """Draw accuracy by calls, faults, and goals by their number of questions."""
    figure, (left, middle, right) = common.pyplot().subplots(
        1, 3, figsize=(12, 4.4), width_ratios=[5, 4, 4])
    for i, (method, by_calls) in enumerate(results.items()):
        for n, (mean, low, high) in by_calls.items():
            x = n + 0.2 * i - 0.3
            left.bar(x, mean, 0.18, color=METHODS[method], label=method if n == 1 else None)
            left.errorbar(x, mean, [[max(0, mean - low)], [max(0, high - mean)]], color='black',
                          lw=1)
    left.set(xticks=list(by_calls), xlabel='calls that a question takes', ylim=(0, 125),
             yticks=range(0, 101, 20), ylabel='right answers, %', title='With and without tools')
    left.legend(ncols=2, loc='upper center')
    names, counts = zip(*(faults.most_common() or [('none', 0)]), strict=True)
    middle.barh(names, counts, color=common.ORANGE)
    middle.set(xlabel='trajectories', title='Where trajectories go wrong')
    middle.invert_yaxis()
    means, lows, highs, expected = np.array([row[:4] for row in lists.values()]).T
    right.errorbar(list(lists), means, [np.maximum(0, means - lows), np.maximum(0, highs - means)],
                   color=common.GREEN, marker='o', capsize=3, label='goals reached')
    right.plot(list(lists), expected, color='gray', linestyle=':',
               label='if only tasks failed')
    right.axvspan(0.5, 3.5, color='gray', alpha=0.08)
    right.annotate('trained on 1 to 3', (0.6, 3), color='gray')
    right.set(xticks=list(lists), xlim=(0.5, max(lists) + 0.5), xlabel='questions in a goal',
              ylim=(0, 105), ylabel='%', title='With a list of tasks')
    right.legend(loc='center right', bbox_to_anchor=(1.02, 0.6), handlelength=1, fontsize=9)
    return figure


def main():
    # make the models
    common.pyplot()
    course = Course(out=out, share=share)
    common.start(course.home)
    tools = toolbox('calculator,lookup,search')
    agent = make_agent(course, tools)

    # answer with and without tools
    world = facts.make_world(PEOPLE, TOWNS, 'test', seed)
    open_world(world)
    rng = random.Random(f'react {seed}')
    examples = [facts.make_example(world, kind, rng) for kind in facts.CALLS
                for _ in range(questions)]
    asked = [example['question'] for example in examples]
    found = [[opened['store'].texts[i] for i in row]
             for row in opened['store'].by_words(asked, 4)]
    needed = [facts.needed_passages(world, example) for example in examples]
    texts = {'tools': act(agent, asked, tools)}
    for method, passages in (('right passages', needed), ('passages found', found),
                             ('closed book', [()] * len(asked))):
        texts[method] = read(agent, list(map(facts.messages, asked, passages)))
    rights = {method: np.array([is_right(*pair) for pair in zip(examples, some, strict=True)])
              for method, some in texts.items()}
    n_calls = np.array([facts.CALLS[example['kind']] for example in examples])
    results = {method: {n: percent(right[n_calls == n]) for n in (1, 2, 3)}
               for method, right in rights.items()}
    example = examples[questions]
    print(f'\n{example["question"]}\n{texts["tools"][questions]}\n')
    print('right, %, by the calls that a question takes\n')
    print(table([['', '1 call', '2 calls', '3 calls'],
                 *([method, *map(show, by_calls.values())]
                   for method, by_calls in results.items())]))
    gains = {method: gain(rights['tools'][n_calls == 2], right[n_calls == 2])
             for method, right in rights.items() if method != 'tools'}
    print('\non questions of two calls, tools')
    for method, values in gains.items():
        print('  - {}: {:+.1f} points ({:+.1f} to {:+.1f})'.format(method, *values))
    by_kind = {kind: percent([right for right, example in zip(rights['tools'], examples,
                              strict=True) if example['kind'] == kind]) for kind in facts.CALLS}
    print('\nwith tools\n\n' + table([['kind', 'calls', 'right, %'], *(
        [kind, facts.CALLS[kind], show(values)] for kind, values in by_kind.items())]))
    faults = Counter(filter(None, (fault(example, text, world) for example, text in
                                   zip(examples, texts['tools'], strict=True))))
    print('\nfaults:', ', '.join(f'{name} {n}' for name, n in faults.most_common()) or 'none')

    # keep a list of tasks
    jobs = [[facts.make_example(world, rng.choice(list(facts.CALLS)), rng) for _ in range(n)]
            for n in range(1, parts + 1) for _ in range(goals)]
    reports = [list_fault(*pair) for pair in zip(jobs, work_off(agent, jobs, tools), strict=True)]
    rate = {kind: values[0] / 100 for kind, values in by_kind.items()}
    lists, rows = {}, [['questions', 'reached, %', 'if only tasks failed', 'faults']]
    for n in range(1, parts + 1):
        some = range((n - 1) * goals, n * goals)
        expected = 100 * np.mean([np.prod([rate[part['kind']] for part in jobs[i]]) for i in some])
        why = Counter(filter(None, (reports[i] for i in some)))
        lists[n] = [*percent([reports[i] is None for i in some]), float(expected), why]
        rows.append([n, show(lists[n]), f'{expected:.1f}',
                     ', '.join(f'{name} {count}' for name, count in why.most_common())])
    print(f'\n{goals} goals of each number of questions, with a list of tasks\n\n{table(rows)}\n')
    common.save(picture(results, faults, lists), out, 'react')
    common.record(out, 'react', results=results, gains=gains, by_kind=by_kind, faults=faults,
                  lists=lists)


if __name__ == '__main__':
    main()
