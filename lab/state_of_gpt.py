"""
Train an assistant in one command, from pretraining to reinforcement learning.

    $ python -m lab.state_of_gpt                 # half an hour on two cores; resumes if killed
    $ python -m lab.state_of_gpt --share=0.02    # a check that all stages run
    $ python -m posttrain.chat --out_dir=out-lab/state_of_gpt/grpo

Each stage is a command of this repository, printed before it runs:

    data         questions with checkable answers: texts, conversations, pairs of answers; a byte
                 is a token, since the questions are about letters and digits
    base         pretraining: a GPT continues texts that spell words and add numbers
    sft          supervised finetuning: the same model answers in conversations
    reward       a reward model learns from pairs which of two answers is better
    ppo          reinforcement learning from the reward model's scores, right or wrong
    grpo         reinforcement learning from a program that checks the answers
    chat         three questions to the last model

All models then answer the same held-out questions. The finetuned model is also measured with
methods that need no training: the vote of several answers (self-consistency), the answer with the
highest reward (best of n), and a calculator.

Expected (two cores of an AMD EPYC), of 700 questions: base 24%, with 4 examples 35%, SFT 87%, one
of its samples 81%, a vote of 8 91%, the best of 8 91%, with a calculator 89%, PPO 96%, GRPO 97%.

Source: "State of GPT", Karpathy 2023. Needs '.[lab]'.
"""

import os
from typing import Annotated

from bench.common import table as aligned
from configurator import Count, Positive, Range, Seed, override
from flatgpt import jsonl
from lab import common
from lab.course import Course
from posttrain.tasks.common import wilson

# Settings -----------------------------------------------------------------------------------------
seed: Seed = 1  # of weights, batches and answers; the questions do not depend on it
out = 'out-lab'  # folder of the picture and the numbers; the rest is in its folder state_of_gpt
n: Annotated[int, Range(least=7)] = 700  # held-out questions, a seventh of each kind
num_samples: Annotated[int, Range(least=2)] = 8  # answers per question for the vote and best of n
share: Positive = 1.0  # of the steps of every stage; below 1 also of its data
n_layer: Count | None = None  # of the model; None: that of config/tiny_web.py, as for n_embd
n_embd: Count | None = None
config = override(globals())
# --------------------------------------------------------------------------------------------------


def rows_of(done):
    """Return [(title, right, asked, {kind: accuracy}), ...] in the stages' order."""
    def row(title, stage, key='accuracy', kinds=True):
        result = done[stage]['found']
        by_kind = {kind: of['accuracy'] for kind, of in result['kinds'].items()} if kinds else {}
        return title, round(result[key] * result['n']), result['n'], by_kind

    k = num_samples
    return [row('base', 'ask base'), row('base, 4 examples', 'ask base, 4 shots'),
            row('SFT', 'ask sft'),
            row('SFT, one sample', 'ask sft, samples', 'accuracy_of_one', False),
            row(f'SFT, vote of {k}', 'ask sft, samples', 'accuracy_of_majority', False),
            row(f'SFT, best of {k}', 'ask sft, samples'),
            row('SFT, calculator', 'ask sft, calculator'),
            row('PPO', 'ask ppo'), row('GRPO', 'ask grpo')]


def curve(home, name, key):
    """Return the steps and the values of a key in a run's log."""
    records = jsonl.read_objects(os.path.join(home, name, 'log.jsonl')).values()
    return zip(*((record['step'], record[key]) for record in records if key in record), strict=True)


def draw(rows, home):
    """Draw the accuracy of each row, and the curves of reinforcement learning."""
    plt = common.pyplot()
    figure = plt.figure(figsize=(10, 5))
    bars, accuracy, entropy = figure.subplot_mosaic(
        [['bars', 'accuracy'], ['bars', 'entropy']], width_ratios=[5, 4]).values()
    colors = {'base': common.BLACK, 'SFT': common.BLUE, 'PPO': common.ORANGE, 'GRPO': common.GREEN}
    for y, (title, right, n_asked, _) in enumerate(rows):
        low, high = (100 * end for end in wilson(right, n_asked))
        value = 100 * right / n_asked
        bars.barh(y, value, color=colors[title.split(',')[0]], alpha=0.85, height=0.7)
        bars.errorbar(value, y, xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                      color='black', lw=1)
        bars.text(high + 1.5, y, f'{value:.0f}%', va='center')
    bars.set(yticks=range(len(rows)), yticklabels=[title for title, *_ in rows], xlim=(0, 112),
             xlabel='held-out questions answered right, %', title='The same questions to all')
    bars.invert_yaxis()
    bars.grid(False, axis='y')
    for name in ('ppo', 'grpo'):
        color = colors[name.upper()]
        steps, values = curve(home, name, 'val_accuracy')
        accuracy.plot(steps, [100 * value for value in values], 'o-', ms=3, color=color)
        accuracy.annotate(name.upper(), (steps[-1], 100 * values[-1]), xytext=(4, 0), color=color,
                          textcoords='offset points', va='center')
        steps, values = curve(home, name, 'entropy')
        entropy.plot(steps, values, color=color)
    accuracy.set(title='Reinforcement learning', ylabel='val questions right, %')
    entropy.set(xlabel='step', ylabel='entropy, nats a token', ylim=(0, None))
    common.save(figure, out, 'state_of_gpt')


def main():
    common.pyplot()  # raises before half an hour of work if matplotlib is missing
    course = Course(**config)
    home = course.home
    common.start(home)

    # run the stages
    done = course.run_stages(course.stages())

    # report
    rows = rows_of(done)
    kinds = [kind for kind in done['ask sft']['found']['kinds'] if kind != 'all']
    seconds = sum(record['seconds'] for record in done.values())
    _, entropies = curve(home, 'grpo', 'entropy')
    before, after = (sum(part) / len(part) for part in (entropies[:10], entropies[-10:]))
    _, reward = curve(home, 'reward', 'val_accuracy')
    cells = [['', 'all', '95%', *(kind[:5] for kind in kinds)]]
    for title, right, n_asked, by_kind in rows:
        interval = '-'.join(f'{100 * end:.0f}' for end in wilson(right, n_asked))
        cells.append([title, f'{100 * right / n_asked:.1f}', interval,
                      *(f'{100 * by_kind[kind]:.0f}' if by_kind else '' for kind in kinds)])
    print(f'\n{n} held-out questions, right in %\n\n{aligned(cells)}')
    print(f'\nThe reward model prefers the right answer in {reward[-1]:.1%} of held-out pairs.\n'
          f'Entropy under GRPO: {before:.3f} to {after:.3f} nats per token. All stages: '
          f'{seconds / 60:.1f} minutes.\n')
    common.record(out, 'state_of_gpt', rows=[row[:3] for row in rows], reward_accuracy=reward[-1],
                  entropies=entropies,
                  seconds={name: record['seconds'] for name, record in done.items()})
    draw(rows, home)
    print(f'talk to it:\n  python -m posttrain.chat --out_dir={os.path.join(home, "grpo")}')


if __name__ == '__main__':
    main()
