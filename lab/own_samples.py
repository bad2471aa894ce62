"""
Finetune an assistant on its own right answers; measure what one round is worth.

    $ python -m lab.own_samples                     # with the models of lab.state_of_gpt made
    $ python -m lab.own_samples --seeds=1 --prompts=2000
    $ python -m lab.own_samples --keep=hard --per_prompt=2

The finetuned model answers each of some hundred new questions several times. The task's program
checks the answers, and the model is finetuned on right ones: rejection sampling, or one step of
expert iteration. A question gives one right answer, the first of those drawn, so that easy
questions, whose answers are all right, do not drown hard ones. Each seed has its own questions,
answers and batches. The steps are commands of this repository,

    python -m posttrain.pairs --write=sft ...; python data/chat/prepare.py ...; python train.py ...

printed before they run, and cached as the course's models are. Then the model from before and those
of all seeds answer the same held-out questions. The difference is paired; its 95% interval over the
seeds is Student's t, and another one resamples seeds and questions.

Measured on a busy machine, 6 minutes of one core: SFT is right in 84.4% of 700 questions, the three
rounds in 87.9, 87.4 and 87.9%: +3.3 points (+2.7 to +3.9; over seeds and questions +1.3 to +5.5).
Counting rises from 39 to 60%, sorting falls from 94 to 92%.

Sources: "STaR", Zelikman et al. 2022; "Scaling Relationship on Learning Mathematical Reasoning",
Yuan et al. 2023 (rejection sampling); "Beyond Human Data", Singh et al. 2023. Needs '.[lab]'.
"""

import os
from typing import Annotated, Literal

import numpy as np

from bench.common import table
from configurator import Count, Positive, Range, Seed, override
from flatgpt import jsonl
from flatgpt.pretrained import open_model
from lab import common
from lab.course import Course
from posttrain.tasks import common as tasks
from posttrain.tasks import tiny_chat

# Settings -----------------------------------------------------------------------------------------
seeds: Annotated[int, Range(least=1)] = 3  # rounds, each with its own questions
prompts: Annotated[int, Range(least=7)] = 840  # questions of train to each
num_samples: Annotated[int, Range(least=2)] = 4  # answers to each question
per_prompt: Count = 1  # right answers kept of a question
keep: Literal['hard', 'all'] = 'all'  # hard: of questions with right and wrong answers alone
max_iters: Count = 30  # steps of finetuning
batch_size: Count = 16  # rows of 256 tokens in a step
rate: Positive = 0.5  # learning rates, of those of config/sft_tiny_chat.py
n: Annotated[int, Range(least=7)] = 700  # held-out questions to measure with
seed: Seed = 1
share: Positive = 1.0  # of the steps of the course's models
out = 'out-lab'  # folder of the picture, the numbers and the models
config = override(globals())
# --------------------------------------------------------------------------------------------------

RATES = {'muon_lr': 0.01, 'embedding_lr': 0.01, 'learning_rate': 0.002}  # sft_tiny_chat.py's


def make(course, number):
    """Make the model of a round; -> (its folder, number of conversations)."""
    name = f'own-{number}'
    path = os.path.join(course.home, f'{name}-answers', 'talks.jsonl')
    os.makedirs(os.path.dirname(path), exist_ok=True)
    answers = course.script(
        'posttrain.pairs', init_from=course.folder('sft'), task='tiny_chat', write='sft', out=path,
        n=prompts, num_samples=num_samples, per_prompt=per_prompt, skip_equal=keep == 'hard',
        seed=seed + 1000 * number)
    course.run_stages([*course.needed(['sft']), (f'{name}-answers', answers)])
    talks = list(jsonl.read_objects(path).values())
    rates = {key: rate * value for key, value in RATES.items()}
    return course.finetune(name, 'sft', talks, max_iters=max_iters, batch_size=batch_size,
                           eval_interval=max_iters, **rates), len(talks)


def answer(folder, examples):
    """Return whether a model's greedy answer to each question is right, (n,)."""
    model, tokenizer, template, line = open_model('resume', folder)
    print(line, flush=True)
    how = tasks.Answering(template, temperature=0.0, batch_size=256)
    asked = [ids for _, ids, _ in tasks.encode_questions(
        examples, model.config.block_size, tokenizer, how)]
    texts = tasks.answer(model, tokenizer, asked, how)
    return np.array([tiny_chat.evaluate(*pair) for pair in zip(examples, texts, strict=True)])


def over_seeds(gains):
    """Return the mean of the seeds' gains, and Student's 95% interval of it."""
    from scipy.stats import t as student

    gains = np.array(gains)
    half = (student.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains)**0.5
            if len(gains) > 1 else np.nan)
    return [float(value) for value in (gains.mean(), gains.mean() - half, gains.mean() + half)]


def bootstrap(differences):
    """Return a 95% interval of the mean of (seeds, questions), both resampled."""
    return common.interval_of_draws(differences, 2000)[1:]


def picture(kinds, before, after):
    """Draw the accuracy of each kind before and after, a point for each seed."""
    figure, ax = common.pyplot().subplots(figsize=(8, 4))
    names = ['all', *sorted(set(kinds))]
    for y, name in enumerate(names):
        rows = np.array([name in ('all', kind) for kind in kinds])
        start, ends = 100 * before[rows].mean(), 100 * after[:, rows].mean(1)
        ax.annotate('', (ends.mean(), y), (start, y),
                    arrowprops={'arrowstyle': '->', 'color': 'gray', 'lw': 1.5})
        ax.plot(start, y, 'o', color=common.BLACK, label='SFT' if y == 0 else None)
        ax.plot(ends, [y] * len(ends), '|', ms=14, mew=2, color=common.BLUE,
                label='after a round, each seed' if y == 0 else None)
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel='held-out questions right, %')
    ax.invert_yaxis()
    ax.legend(loc='lower left')
    return figure


def main():
    common.pyplot()  # raises before the models are made if matplotlib is missing
    common.start(out)
    course = Course(out=out, share=share, seed=seed)
    folder = course.make('sft')['sft']
    made = [make(course, number) for number in range(1, seeds + 1)]
    examples = tasks.examples_of(tiny_chat, tasks.Questions('test', n, seed))
    before = answer(folder, examples)
    after = np.array([answer(of_round, examples) for of_round, _ in made])

    # report
    kinds = [example['kind'] for example in examples]
    rows = [['', 'all', *(kind[:5] for kind in sorted(set(kinds)))]]
    for title, right in [('SFT', before), *((f'seed {i}', of) for i, of in enumerate(after, 1))]:
        reports = tasks.accuracies(kinds, right.tolist())
        rows.append([title, f'{100 * reports["all"]["accuracy"]:.1f}', *(
            f'{100 * reports[kind]["accuracy"]:.0f}' for kind in sorted(set(kinds)))])
    differences = 100 * (after.astype(float) - before)
    gain, both = over_seeds(differences.mean(1)), bootstrap(differences)
    print(f'\n{n} held-out questions, right in %; learned from '
          f'{", ".join(f"{n_talks:,}" for _, n_talks in made)} own answers\n\n{table(rows)}\n')
    print('one round: {:+.1f} points, 95% over {} seeds {:+.1f} to {:+.1f}'.format(
        gain[0], seeds, *gain[1:]))
    print('over seeds and questions {:+.1f} to {:+.1f}\n'.format(*both))
    common.save(picture(kinds, before, after), out, 'own_samples')
    common.record(out, 'own_samples', rows=rows, gain=gain, over_seeds_and_questions=both,
                  conversations=[n_talks for _, n_talks in made])


if __name__ == '__main__':
    main()
