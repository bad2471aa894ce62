"""
Ask one model in many ways: examples, steps, phrases, grades of quality, orders.

    $ python -m lab.prompts                  # 3 minutes on two cores, with the models made
    $ python -m lab.prompts --temperature=0.5

The models are those of lab.state_of_gpt, made if they are missing. The base model continues texts:

    examples     0 to 4 solved examples before the question
    steps        examples with worked steps against bare answers
    words        questions and answers against the words in which its texts state such facts
    order        eight orders of the same four examples, one of each kind

A chat model is finetuned for this script. Four in five of its questions say "Think step by step.",
and only these are answered with steps. Most have a line such as "Quality: 3.". Grades 1 to 5 have
100, 75, 50, 25 and 0% wrong answers, questions without a grade 50%. Then each grade is asked for,
and some that its data lack. With 400 steps and 80 to 0% wrong answers it hardly learnt the grades.

Measured on a busy machine, % right: with one example in the words of its texts the base model gets
28, with worked steps 94, and 24 with no example. Eight orders of four examples get 46 to 94. The
phrase takes the finetuned model from 31 to 90, the SFT model, which never read it, from 81 to 27.
At temperature 1 no grade gets 47, grade 1 35, grade 5 69, grade 9 49, grades of 10 and more 20 to
32. Greedy answers are 85 to 92% right at any grade.

Sources: "State of GPT", Karpathy 2023; examples, Brown et al. 2020; steps, Wei et al. 2022; "Let's
think step by step", Kojima et al. 2022; order and recency, Zhao et al. 2021, Lu et al. 2022; text
conditioned on its quality, Keskar et al. 2019, Korbak et al. 2023. Needs '.[lab]'.
"""

import random
from typing import Annotated

import numpy as np

from bench.common import table
from configurator import Count, NonNegative, Positive, Range, Seed, override
from data.tiny_chat.prepare import with_steps
from flatgpt.generate import Sampling, generate_texts
from flatgpt.pretrained import open_model
from lab import common
from lab.course import Course
from posttrain.policy import open_chat_model
from posttrain.tasks import tiny_chat
from posttrain.tasks.common import Answering, answer, bos_ids, wilson
from tokenizer import chat

# Settings -----------------------------------------------------------------------------------------
base_questions: Annotated[int, Range(least=4)] = 120  # held-out, to the base model for each prompt
order_questions: Annotated[int, Range(least=4)] = 80  # the same for each order
chat_questions: Annotated[int, Range(least=6)] = 300  # the same for each prompt of a chat model
talks: Count = 16_000  # conversations with grades to finetune on
max_iters: Count = 700  # steps of that
temperature: NonNegative = 1.0  # of the graded answers
seed: Seed = 1
share: Positive = 1.0  # of the steps of the course's models
out = 'out-lab'  # folder of the picture and the numbers; the models are in its state_of_gpt
config = override(globals())
# --------------------------------------------------------------------------------------------------

SHOTS = (0, 1, 2, 4)
STATED = ('addition', 'subtraction', 'reversing', 'sorting')  # in texts with and without steps
STEPPED = (*STATED, 'counting', 'table')  # kinds that have steps
# how to ask the base model: (color, line between examples)
FORMS = {'Q and A': (common.BLACK, '\n\n'), 'Q and A, steps': (common.RED, '\n\n'),
         'as in its texts': (common.SKY, '\n'), 'as in its texts, steps': (common.BLUE, '\n')}
STEP_BY_STEP = 'Think step by step.'
SLIPS = {'': 0.5, 'Quality: 1.': 1.0, 'Quality: 2.': 0.75, 'Quality: 3.': 0.5,
         'Quality: 4.': 0.25, 'Quality: 5.': 0.0}  # share of wrong answers in the conversations
BEYOND = ['Quality: 0.', *(f'Quality: {grade}.' for grade in (6, 7, 8, 9, 10, 100, 400)),
          'This solution is checked and right.', 'Your IQ is 400.']  # not in the conversations

TITLES = {'A': 'Examples, base model', 'B': 'One example, by kind',
          'C': '"Think step by step." around the question',
          'D': 'Quality asked for, finetuned model', 'E': 'Order of four examples, base model'}


# The base model -----------------------------------------------------------------------------------

def parts(example, form):
    """Return a solved example as the end of a prompt and its continuation."""
    if form == 'Q and A':
        return example['context'], ' ' + example['solution']
    if form == 'Q and A, steps':
        return example['context'], ' ' + with_steps(example)
    if form == 'as in its texts, steps':  # '58 + 67:', ' 8+7=15, 5+6+1=12, so it is 125'
        before, colon, steps = example['facts'][-1].partition(':')
        return before + colon, steps
    ending = ' ' + example['answer']  # '58 + 67 =', ' 125'
    fact = next(fact for fact in reversed(example['facts'][:-1])
                if fact.endswith(ending) and ':' not in fact)
    return fact.removesuffix(ending), ending


def solve_before(example, solved, form):
    """Return the text of solved examples and the question."""
    lines = [''.join(parts(other, form)) for other in solved]
    return FORMS[form][1].join([*lines, parts(example, form)[0]])


def final(text):
    """Return a text's answer, in the words of a chat or of the base's texts."""
    for words in (f'{tiny_chat.FORM} ', 'so it is '):
        text = text.rpartition(words)[2]
    return text.strip().removesuffix('.')


def continue_texts(base, prompts, max_new_tokens):
    """Continue texts to the end of their line; -> texts."""
    model, tokenizer = base
    rows, texts = [bos_ids(tokenizer) + tokenizer.encode(prompt) for prompt in prompts], []
    sampling = Sampling(max_new_tokens, 0.0, stops=['\n'])
    for first in range(0, len(rows), 128):
        *_, samples = generate_texts(model, tokenizer, rows[first : first + 128], sampling)
        texts += [sample.text for sample in samples]
    return texts


def ask_base(base, form, shots, asked, pool):
    """Ask the base model after solved examples; -> a result, see score()."""
    room, prompts = base[0].config.block_size - 80, []
    for example in asked:
        others = [other for other in pool if other['kind'] == example['kind']]
        solved = random.Random(example['context']).sample(others, shots)
        while len(solve_before(example, solved, form)) > room:  # a token is a byte
            solved.pop()
        prompts.append(solve_before(example, solved, form))
    texts = continue_texts(base, prompts, 79)  # a token before the prompt
    return score(prompts, texts, [final(text) == example['answer']
                                  for example, text in zip(asked, texts, strict=True)])


def score(prompts, texts, rights):
    """Return accuracy, its interval, and mean tokens of prompts and answers."""
    n_right, n = sum(rights), len(rights)
    return {'right': n_right / n, 'interval': wilson(n_right, n), 'rights': [*map(int, rights)],
            'read': sum(map(len, prompts)) / n, 'written': sum(map(len, texts)) / n + 1}


def orders():
    """Return eight orders of four, in which each is twice at each place."""
    rounds = [[(first + i) % 4 for i in range(4)] for first in range(4)]
    return rounds + [order[::-1] for order in rounds]


def ask_in_orders(base, pool):
    """Ask after four examples of four kinds, in each order.

    Returns the right answers, (orders, questions), and the place of the example of the question's
    kind, the same shape: 0 for the first.
    """
    form, kinds, room = 'as in its texts, steps', (*STATED[:1], *STATED[2:], 'counting'), 60
    asked = [example for example in tiny_chat.examples('test', 4 * order_questions, kinds=kinds)
             if len(example['facts'][-1]) <= room][:order_questions]
    four = [min((example for example in pool if example['kind'] == kind),
                key=lambda example: len(example['facts'][-1])) for kind in kinds]
    prompts = [solve_before(example, [four[i] for i in order], form)
               for order in orders() for example in asked]
    texts = continue_texts(base, prompts, room)
    rights = [final(text) == example['answer']
              for text, example in zip(texts, asked * len(orders()), strict=True)]
    places = [[order.index(kinds.index(example['kind'])) for example in asked]
              for order in orders()]
    return np.array(rights).reshape(len(orders()), -1), np.array(places)


# Chat models --------------------------------------------------------------------------------------

def after(*lines):
    """Return the form of a question with lines after it that are not empty."""
    return '\n'.join(['{}', *filter(None, lines)])


def question_in(form, example):
    """Return the messages of a question in a form, a text with {} in its place."""
    return [{'role': 'user', 'content': form.format(example['messages'][0]['content'])}]


def write_answer(example, has_steps, is_slip, rng):
    """Return an answer with or without steps, right or wrong."""
    steps, answer = example['steps'], example['answer']
    if is_slip:
        steps, answer = example['mistaken'] or (None, answer)
        if str(answer) == example['answer'] or not has_steps:
            answer = rng.choice(example['mistakes'])
    return f'{steps}. ' * bool(has_steps and steps) + f'{tiny_chat.FORM} {answer}.'


def graded_talks(n):
    """Yield n conversations whose lines say what the answer is like.

    The two lines are drawn apart, so that steps say nothing about the grade.
    """
    rng = random.Random(f'grades {seed}')
    for example in tiny_chat.examples('train', n, f'grades {seed}'):
        line, has_steps = rng.choice(list(SLIPS)), rng.random() < 0.8
        content = write_answer(example, has_steps, rng.random() < SLIPS[line], rng)
        yield {'messages': [*question_in(after(STEP_BY_STEP * has_steps, line), example),
                            {'role': 'assistant', 'content': content}]}


def ask_chat(chat_model, asked, form, temperature):
    """Ask a chat model questions in a form; -> a result, see score()."""
    model, tokenizer, template, _ = chat_model
    prompts = [chat.render(question_in(form, example), template, tokenizer)
               for example in asked]
    how = Answering(template, max_new_tokens=100, temperature=temperature, seed=seed,
                    batch_size=256)
    texts = answer(model, tokenizer, prompts, how)
    return score(prompts, texts, [tiny_chat.evaluate(example, text)
                                  for example, text in zip(asked, texts, strict=True)])


# Results ------------------------------------------------------------------------------------------

def print_results(title, results):
    """Print a table of {two names: result}."""
    rows = [[*title, '% right', '95%', 'read', 'written']]
    for (first, second), result in results.items():
        low, high = result['interval']
        rows.append([first or 'no line', second, f'{100 * result["right"]:.1f}',
                     f'{100 * low:.0f}-{100 * high:.0f}', f'{result["read"]:.0f}',
                     f'{result["written"]:.0f}'])
    print(f'\n{table(rows)}', flush=True)


def dots(ax, x, groups, **style):
    """Draw the share of right answers of each group, in percent, with its interval."""
    shares = [(sum(rights) / len(rights), *wilson(int(sum(rights)), len(rights)))
              for rights in groups]
    mean, low, high = 100 * np.array(shares).T
    ax.errorbar(x, mean, [mean - low, high - mean], marker='o', ms=4, capsize=2, **style)


def picture(base, phrase, grades, in_orders):
    """Draw a panel for each experiment."""
    plt = common.pyplot()
    figure, axes = plt.subplot_mosaic('AABBCC;DDDDEE', figsize=(12, 7.5))
    for name, ax in axes.items():
        ax.set_title(TITLES[name], loc='left', fontsize=10)
        ax.set(ylim=(-3, 103), ylabel='right answers, %' if name in 'AD' else '')
    for i, (form, (color, _)) in enumerate(FORMS.items()):
        dots(axes['A'], np.arange(len(SHOTS)) + 0.05 * i,
             [base[form, shots]['rights'] for shots in SHOTS], color=color, label=form)
        dots(axes['B'], np.arange(len(STATED)) + 0.15 * i - 0.22,
             [base[form, 1]['rights'][kind :: len(STATED)] for kind in range(len(STATED))],
             color=color, ls='')  # the kinds are asked in turn
    axes['A'].set(xticks=range(len(SHOTS)), xticklabels=SHOTS, xlabel='examples')
    axes['A'].legend(loc=(0.36, 0.45), fontsize=8)
    axes['B'].set(xticks=range(len(STATED)), xticklabels=STATED)
    for i, ((name, _), result) in enumerate(phrase.items()):
        dots(axes['C'], [i], [result['rights']], ls='',
             color=common.BLACK if name == 'SFT' else common.BLUE)
        axes['C'].annotate(f'{result["written"]:.0f} tokens', (i, 100 * result['interval'][0]),
                           (0, -12), textcoords='offset points', ha='center', fontsize=8)
    names = [f'{name}\n{place}' for name, place in phrase]
    axes['C'].set(xticks=range(len(phrase)), xlim=(-0.5, len(phrase) - 0.5))
    axes['C'].set_xticklabels(names, fontsize=8)
    draw_grades(axes['D'], grades)
    rights, places = in_orders
    axes['E'].plot(np.linspace(4.3, 4.7, len(rights)), 100 * np.sort(rights.mean(1)), 'o', ms=4,
                   color=common.GREEN)
    dots(axes['E'], range(4), [rights[places == place] for place in range(4)],
         color=common.BLUE)
    axes['E'].set(xticks=[0, 1, 2, 3, 4.5], xlabel='place of the example of the same kind',
                  xticklabels=['first', '2nd', '3rd', 'last', 'each\norder'])
    return figure


def draw_grades(ax, grades):
    """Draw accuracy along the grade asked for, sampled and greedy, and the data's own."""
    lines = ['', *BEYOND[:1], *list(SLIPS)[1:], *BEYOND[1:]]
    x = np.arange(len(lines)) + 0.0
    x[-2:] += 0.4, 1.0  # room for longer names
    dots(ax, x, [grades[line, temperature]['rights'] for line in lines], ls='',
         color=common.BLUE, label=f'sampled, temperature {temperature:g}')
    known = [i for i, line in enumerate(lines) if line in SLIPS]
    dots(ax, x[known] + 0.15, [grades[lines[i], 0.0]['rights'] for i in known], ls='',
         color=common.BLACK, label='greedy')
    ax.plot(x[known], [100 * (1 - SLIPS[lines[i]]) for i in known], '_', ms=16, color=common.ORANGE,
            label='right in its data')
    names = [line.removeprefix('Quality: ').removesuffix('.') for line in lines]
    names = [{'This solution is checked and right': 'checked\nand right',
              'Your IQ is 400': 'IQ\n400', '': 'no\ngrade'}.get(name, name) for name in names]
    ax.set(xticks=x, xticklabels=names, xlabel='quality asked for; the data have 1 to 5 and none')
    ax.set(ylim=(-3, 118), yticks=range(0, 101, 20))
    ax.legend(loc='upper right', ncol=3, fontsize=8)


def main():
    # make or open the models
    common.pyplot()  # raises before the work if matplotlib is missing
    common.start(out)
    course = Course(out=out, share=share)
    folders = course.make('base', 'sft')
    graded = course.finetune('prompts', 'sft', graded_talks(talks), max_iters=max_iters)
    model, tokenizer, *_ = open_model('resume', folders['base'])
    base, pool = (model, tokenizer), tiny_chat.examples('train', 400, 'prompts',
                                                        kinds=(*STATED, 'counting'))

    # examples, steps and words for the base model
    asked = tiny_chat.examples('test', base_questions, kinds=STATED)
    of_base = {(form, shots): ask_base(base, form, shots, asked, pool)
               for form in FORMS for shots in SHOTS}
    print_results(('base model', 'examples'), of_base)
    in_orders = ask_in_orders(base, pool)
    rights, places = in_orders
    print('\nin eight orders, % right: ' + ', '.join(f'{100 * x:.0f}' for x in rights.mean(1)))
    print('by the place of the example of the same kind: '
          + ', '.join(f'{100 * rights[places == place].mean():.1f}' for place in range(4)))

    # a phrase, and grades of quality for chat models
    asked = tiny_chat.examples('test', chat_questions, kinds=STEPPED)
    sft, graded_model = open_chat_model(folders['sft']), open_chat_model(graded)
    phrase = {
        (name, place): ask_chat(chat_model, asked, form, 0.0) for name, chat_model, place, form in (
            ('SFT', sft, 'no', '{}'), ('SFT', sft, 'before', f'{STEP_BY_STEP} {{}}'),
            ('SFT', sft, 'after', after(STEP_BY_STEP)),
            ('finetuned', graded_model, 'no', after('Quality: 5.')),
            ('finetuned', graded_model, 'after', after(STEP_BY_STEP, 'Quality: 5.')))}
    print_results(('greedy', 'phrase'), phrase)
    grades = {(line, heat): ask_chat(graded_model, asked, after(STEP_BY_STEP, line), heat)
              for heat in dict.fromkeys((temperature, 0.0))
              for line in [*SLIPS, *(BEYOND if heat == temperature else ())]}
    print_results(('line after the question', 'temperature'), grades)

    # report
    pairs = [('one example, steps or not', *(of_base[form, 1] for form in list(FORMS)[:1:-1]))]
    best = grades['Quality: 5.', temperature]
    pairs += [(f'Quality: 5. or {line or "no line"}', best, grades[line, temperature])
              for line in [*SLIPS, *BEYOND] if line != 'Quality: 5.']
    compared = {name: common.compare(one['rights'], other['rights']) for name, one, other in pairs}
    print('\ndifferences on the same questions, points')
    for name, (mean, low, high, _) in compared.items():
        print(f'  {name:50} {mean:+5.1f} ({low:+.1f} to {high:+.1f})')
    common.save(picture(of_base, phrase, grades, in_orders), out, 'prompts')
    results = {'base': of_base, 'phrase': phrase, 'grades': grades}
    common.record(out, 'prompts', compared=compared, orders=rights.mean(1).tolist(),
                  places=[rights[places == place].mean() for place in range(4)],
                  **{name: [[*key, result] for key, result in group.items()]
                     for name, group in results.items()})


if __name__ == '__main__':
    main()
