"""
Rank models by pairwise judgements, as Chatbot Arena does; measure the judges.

    $ python -m lab.arena                          # with the models of lab.state_of_gpt made
    $ python -m lab.arena --judge=person --questions=70   # judge yourself; keys 1, 2, = and q
    $ python -m posttrain.reward --init_from=out-lab/state_of_gpt/sft \\
        --data=out-lab/arena_pairs.jsonl --val_fraction=0.3   # learn from your judgements

Eight contestants, models of the course and ways to use them, answer the same held-out questions. A
battle shows a judge one question and the answers of two contestants. The judges are

    checker   the task's program: a right answer wins against a wrong one, all else is a tie
    reward    the course's reward model: the higher score wins
    GPT       the finetuned model itself: "Which answer is better, 1 or 2?", by likelihood;
              and the mean of its log-odds over both orders
    a person  at the terminal; models are hidden, the order is random

The scores are those of Bradley and Terry, fitted by maximum likelihood, on Elo's scale: 400 more
points mean odds of 10 to 1. Ties count as half a win. Intervals are 95% bootstraps over the
questions. All judges get the same battles in both orders: a judge has a position bias if it favours
an answer for being first. A person's judgements are written as pairs for posttrain.reward.

Measured on a busy machine (350 questions, accuracies of 33 to 94%): the checker's order agrees with
the accuracies with Spearman 1.00, the reward model's with 0.74: it ranks the best of 8 first, which
it chose itself, and the calculator last. GPT prefers the first answer in 99.8% of verdicts. Over
both orders it agrees with the checker in 68% (60 to 74), its order with the accuracies with 0.74.

Sources: "Chatbot Arena", Chiang et al. 2024; "Rank Analysis of Incomplete Block Designs", Bradley
and Terry 1952; position bias, "Judging LLM-as-a-Judge", Zheng et al. 2023. Needs '.[lab]'.
"""

import os
import random
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

import tokenizer as tokenizers
from bench.common import table
from configurator import Count, Positive, Range, Seed, override
from flatgpt import jsonl
from flatgpt.pretrained import open_model
from lab import common
from lab.course import Course
from posttrain import judges
from posttrain.reward_model import open_reward_model, ratings_of
from posttrain.tasks import common as tasks
from posttrain.tasks import tiny_chat
from posttrain.tasks.common import wilson
from tokenizer.chat import render

# Settings -----------------------------------------------------------------------------------------
judge: Literal['models', 'person'] = 'models'  # models: checker, reward model and GPT
questions: Annotated[int, Range(least=7)] = 350  # held-out, a seventh of each kind
battles: Annotated[int, Range(least=8)] = 4000  # of two contestants on a question
gpt_battles: Count = 600  # those that the GPT judges
num_samples: Count = 8  # of SFT, for the vote and the best by the reward model
bootstraps: Count = 300
seed: Seed = 1  # of questions, answers and battles
share: Positive = 1.0  # of the steps of the course's models
out = 'out-lab'  # folder of the picture, the numbers and the models
config = override(globals())
# --------------------------------------------------------------------------------------------------

JUDGES = {'checker': common.GREEN, 'reward': common.ORANGE, 'GPT': common.PURPLE,
          'GPT, both orders': common.SKY}


# Contestants --------------------------------------------------------------------------------------

def answer_all(folders, examples):
    """Return {contestant: its answers}, the opened SFT model, and how answers rate."""
    opened = {name: open_model('resume', folders[name]) for name in ('base', 'sft', 'ppo', 'grpo')}
    _, tokenizer, template, _ = opened['sft']
    critic, _ = open_reward_model(folders['reward'], tokenizer, template)
    chat = tasks.Answering(template, temperature=0.0, seed=seed, batch_size=256)
    pool = tasks.solved_examples(tiny_chat, tasks.Questions('test', questions, seed))

    def ask(name, how):
        model = opened[name][0]
        prompts = [ids for _, ids, _ in tasks.encode_questions(
            examples, model.config.block_size, tokenizer, how)]
        print(f'{name} answers {how.num_samples} x {len(prompts)} questions', flush=True)
        return tasks.answer(model, tokenizer, prompts, how)

    def rate(example, texts):
        return ratings_of(critic, example['messages'], texts, template, tokenizer)

    drawn = ask('sft', replace(chat, temperature=1.0, num_samples=num_samples))
    samples = [drawn[i : i + num_samples] for i in range(0, len(drawn), num_samples)]
    contestants = {
        'base, 4 examples': ask('base', replace(chat, template=None, shots=4, pool=pool,
                                                max_new_tokens=40)),
        'SFT': ask('sft', chat),
        'SFT, one sample': [texts[0] for texts in samples],
        f'SFT, vote of {num_samples}': [tasks.majority_text(tiny_chat, texts) for texts in samples],
        f'SFT, best of {num_samples}': [
            texts[int(np.argmax(rate(example, texts)))]
            for example, texts in zip(examples, samples, strict=True)],
        'SFT, calculator': ask('sft', replace(chat, tools=True, max_new_tokens=112)),
        'PPO': ask('ppo', chat), 'GRPO': ask('grpo', chat)}
    return contestants, opened['sft'], rate


# Battles and scores -------------------------------------------------------------------------------

def draw_battles(n, n_questions, n_contestants, rng):
    """Return n random battles (n, 3): the question and two different contestants."""
    first = rng.integers(n_contestants, size=n)
    second = (first + rng.integers(1, n_contestants, size=n)) % n_contestants
    return np.stack([rng.integers(n_questions, size=n), first, second], 1)


def bradley_terry(wins):
    """Return the scores (C,) of maximum likelihood on Elo's scale, of mean 1000.

    wins: (C, C), how often the row's contestant won against the column's. A contestant that won or
    lost every battle would have an infinite score; scores end 2,000 from the first's.
    """
    from scipy.optimize import minimize

    n = len(wins)

    def loss(strengths):
        gaps = strengths[:, None] - strengths[None]
        shares = 1 / (1 + np.exp(gaps))  # the probability that the row loses
        gradient = (wins.T * shares.T - wins * shares).sum(1)
        return (wins * np.logaddexp(0, -gaps)).sum(), gradient

    limit = 2000 * np.log(10) / 400
    bounds = [(0, 0), *[(-limit, limit)] * (n - 1)]
    strengths = minimize(loss, np.zeros(n), jac=True, method='L-BFGS-B', bounds=bounds).x
    return 1000 + 400 / np.log(10) * (strengths - strengths.mean())


def scores_of(played, points, n_contestants):
    """Score the contestants; -> (C, 3): score, low and high end.

    The intervals are 95% bootstraps over questions. played: battles (n, 3). points: (n,), 1 where
    the first contestant won, 0.5 for a tie.
    """
    def fit(weights):
        wins = np.zeros((n_contestants, n_contestants))
        np.add.at(wins, (played[:, 1], played[:, 2]), weights * points)
        np.add.at(wins, (played[:, 2], played[:, 1]), weights * (1 - points))
        return bradley_terry(wins)

    rng, (names, numbers) = np.random.default_rng(0), np.unique(played[:, 0], return_inverse=True)
    drawn = [fit(rng.multinomial(len(names), [1 / len(names)] * len(names))[numbers])
             for _ in range(bootstraps)]
    return np.column_stack([fit(np.ones(len(played))), *np.quantile(drawn, (0.025, 0.975), axis=0)])


# Judges -------------------------------------------------------------------------------------------

def by_scores(scores):
    """Return a judge from {(question, text): score}.

    A judge is a function (questions, firsts, seconds) -> (n,), above 0 where it prefers the first.
    """
    def margins(asked, firsts, seconds):
        rated = [(scores[i, first], scores[i, second])
                 for i, first, second in zip(asked, firsts, seconds, strict=True)]
        return np.array([float(one > two) - float(one < two) for one, two in rated])
    return margins


def points_of(margins):
    """Return 1 where a judge prefers the first, 0.5 for a tie, 0 for the second."""
    return (np.sign(margins) + 1) / 2


def gpt_judge(opened, examples):
    """Return a judge: the log-odds of "The answer is 1." against "The answer is 2."."""
    model, tokenizer, template, _ = opened

    def margins(asked, firsts, seconds):
        pairs = []
        for i, first, second in zip(asked, firsts, seconds, strict=True):
            content = (f'{examples[i]["messages"][0]["content"]}\n1: {first}\n2: {second}\n'
                       f'Which answer is better, 1 or 2?')
            prompt = render([{'role': 'user', 'content': content}], template, tokenizer)
            pairs += [(prompt, tokenizer.encode(f'{tiny_chat.FORM} {number}.'))
                      for number in '12']
        one, two = np.array(tasks.loglikelihoods(model, pairs)).reshape(-1, 2).T
        return one - two
    return margins


def person_judge(contestants, examples, played):
    """Let the person judge battles until q; -> (battles, points) judged so far.

    The judgements are kept in out/arena_pairs.jsonl.part, the pairs in out/arena_pairs.jsonl.
    """
    texts = list(contestants.values())
    shown = [(texts[first][q], texts[second][q]) for q, first, second in played]
    results = jsonl.Results(os.path.join(out, 'arena_pairs.jsonl'), tokenizers.digest(shown))
    lines = []
    try:
        for number, (q, _, _) in enumerate(played):
            if number not in results.done and shown[number][0] != shown[number][1]:
                better = judges.ask_person(f'battle {number + 1} of {len(played)}',
                                           examples[q]['messages'], shown[number],
                                           random.Random(f'{seed} {number}'))
                results.add(number, {'better': better})
    except judges.Quit:
        pass
    for number, result in sorted(results.done.items()):
        if (better := result['better']) is not None:
            example = examples[played[number][0]]
            lines.append(judges.pair_of(example['messages'], shown[number][better],
                                        shown[number][1 - better], example['content']))
    if lines:
        results.write(b''.join(map(jsonl.to_line, lines)))
        print(f'{results.out}: {len(lines)} pairs; the same command goes on')
    numbers = sorted(results.done)
    points = {0: 1.0, 1: 0.0, None: 0.5}
    return played[numbers], np.array([points[results.done[i]['better']] for i in numbers])


def measure_judge(points, swapped, truth):
    """Measure a judge's points in both orders, (n,) each, for the first contestant.

    truth: the checker's points. -> {'first': (share of the verdicts that favour the answer shown
    first, low, high), 'flips': share of battles whose winner depends on the order, 'agrees': (share
    of the checker's decisions that the judge makes too, low, high)}.
    """
    is_first = np.concatenate([points, 1 - swapped])  # ties count half
    decided = truth != 0.5
    agreed = (points[decided] + swapped[decided]) / 2
    agreed = np.where(truth[decided] == 1, agreed, 1 - agreed)
    return {'first': (is_first.mean(), *wilson(is_first.sum(), len(is_first))),
            'flips': np.mean(points != swapped),
            'agrees': (agreed.sum() / max(1, len(agreed)),
                       *wilson(agreed.sum(), max(1, len(agreed))))}


# Results ------------------------------------------------------------------------------------------

def picture(accuracy, scores, measures):
    """Draw the scores by each judge, and the judges' position bias."""
    figure, (left, right) = common.pyplot().subplots(1, 2, figsize=(11, 4.6), width_ratios=[3, 2])
    order = sorted(range(len(accuracy)), key=list(accuracy.values()).__getitem__)
    y = np.arange(len(order))
    for k, (name, rows) in enumerate(scores.items()):
        score, low, high = rows[order].T
        left.errorbar(score, y + 0.18 * (k - 1.5), xerr=np.maximum(0, [score - low, high - score]),
                      fmt='o', ms=5, color=JUDGES[name], label=name, lw=1.2)
    labels = [f'{name}  {100 * value:.1f}%' for name, value in accuracy.items()]
    left.set(yticks=y, yticklabels=[labels[i] for i in order], xlabel="score on Elo's scale",
             title='In order of true accuracy')
    left.legend(title='judge', loc='upper left')
    for k, (name, of_judge) in enumerate(measures.items()):
        mean, low, high = (100 * value for value in of_judge['first'])
        flips = 100 * of_judge['flips']
        right.barh(k - 0.2, mean, height=0.36, color=JUDGES[name])
        right.errorbar(mean, k - 0.2, xerr=np.maximum(0, [[mean - low], [high - mean]]),
                       color='black', lw=1)
        right.text(2, k - 0.2, f'for the first: {mean:.0f}%', va='center', color='white')
        right.barh(k + 0.2, flips, height=0.36, color=JUDGES[name], alpha=0.4)
        right.text(2, k + 0.2, f'change with the order: {flips:.0f}%', va='center')
    right.axvline(50, color='gray', linestyle=':')
    right.set(yticks=range(len(measures)), yticklabels=measures, xlim=(0, 100),
              title='Position bias', xlabel='verdicts, %; without bias 50 and 0')
    right.invert_yaxis()
    right.grid(False, axis='y')
    return figure


def main():
    common.pyplot()  # raises before the models are made if matplotlib is missing
    common.start(out)
    folders = Course(out=out, share=share).make('base', 'sft', 'reward', 'ppo', 'grpo')
    examples = tasks.examples_of(tiny_chat, tasks.Questions('test', questions, seed))
    contestants, sft, rate = answer_all(folders, examples)
    names = list(contestants)
    rights = {name: np.array([tiny_chat.evaluate(example, text) for example, text in zip(
        examples, contestants[name], strict=True)]) for name in names}
    accuracy = {name: float(right.mean()) for name, right in rights.items()}
    played = draw_battles(battles, questions, len(names), np.random.default_rng(seed))
    if judge == 'person':
        judged, points = person_judge(contestants, examples, played)
        if len(judged):
            report(accuracy, {'person': scores_of(judged, points, len(names))}, {})
        return

    # judge, in both orders
    texts = np.array([contestants[name] for name in names], dtype=object)  # (C, questions)
    keys = [(i, text) for i in range(questions) for text in dict.fromkeys(texts[:, i])]
    right = {(i, text): float(tiny_chat.evaluate(examples[i], text)) for i, text in keys}
    rating = {}
    for i in range(questions):
        distinct = list(dict.fromkeys(texts[:, i]))
        rating |= {(i, text): score for text, score in zip(
            distinct, rate(examples[i], distinct), strict=True)}
    scores, measures, truth_of = {}, {}, by_scores(right)
    for name, margins_of in (('checker', truth_of), ('reward', by_scores(rating)),
                             ('GPT', gpt_judge(sft, examples))):
        some = played[:gpt_battles] if name == 'GPT' else played
        asked, first, second = some.T
        shown = texts[first, asked], texts[second, asked]
        truth = points_of(truth_of(asked, *shown))
        margins, swapped = margins_of(asked, *shown), -margins_of(asked, *shown[::-1])
        verdicts = {name: (points_of(margins), points_of(swapped))}
        if name == 'GPT':
            verdicts['GPT, both orders'] = (points_of(margins + swapped),) * 2
        for title, points in verdicts.items():
            scores[title] = scores_of(some, np.mean(points, 0), len(names))
            measures[title] = measure_judge(*points, truth)
        print(f'the {name} judged {len(some):,} battles in both orders', flush=True)
    report(accuracy, scores, measures)
    common.save(picture(accuracy, scores, measures), out, 'arena')


def report(accuracy, scores, measures):
    """Print and record scores and the measures of the judges."""
    from scipy.stats import spearmanr

    names = sorted(accuracy, key=accuracy.get)
    rows = [['', 'right, %', *scores]]  # half of an interval stands behind ±
    for name in names:
        i = list(accuracy).index(name)
        rows.append([name, f'{100 * accuracy[name]:.1f}',
                     *(f'{score:.0f} ±{(high - low) / 2:.0f}'
                       for score, low, high in (of[i] for of in scores.values()))])
    print(f'\nscores by judge, with 95% intervals; {questions} questions\n\n{table(rows)}\n')
    values = list(accuracy.values())
    order = {name: float(spearmanr(values, of[:, 0]).statistic) for name, of in scores.items()
             if np.ptp(values) > 0 and np.ptp(of[:, 0]) > 0.5}  # equal values have no order
    for name in scores:
        print(f'{name}: ' + (f'Spearman {order[name]:.2f} of its order with the accuracies'
                             if name in order else 'no order: all are equal'))
        if name in measures:
            of = measures[name]
            print('  favours the first in {:.1%} ({:.1%} to {:.1%}), the order decides '
                  '{:.1%}'.format(*of['first'], of['flips']))
            print('  agrees with the checker in {:.1%} ({:.1%} to {:.1%})'.format(*of['agrees']))
    common.record(out, 'arena' if measures else 'arena_person', accuracy=accuracy,
                  scores={name: of.tolist() for name, of in scores.items()}, spearman=order,
                  measures=measures)


if __name__ == '__main__':
    main()
