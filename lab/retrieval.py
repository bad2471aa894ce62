"""
Answer from passages that a model has never read, found by words or by embeddings.

    $ python -m lab.retrieval                   # about a minute; the reader takes 5, once
    $ python -m lab.retrieval --share=0.05 --questions=50 --out=out-tiny    # a check that all runs

A store holds 4,600 facts about invented people and towns (lab/facts.py), in articles of four or six
sentences that are cut into passages of two. The reader is the course's SFT model, finetuned on
conversations about other names: passages and questions, then answers, or that a value is not known.
It is measured closed book, with the right passage, with the best 1, 2 and 4 passages of a search,
and with wrong passages. Searches are BM25 on words, the mean hidden state of the base model, and
both.

Measured on a busy machine, of 400 questions: closed book 0% right, with the right passage 100%,
with the best 4 passages of BM25 96% (95%: 94 to 98). The right one is among BM25's best 4 always,
among those of the mean hidden state in 4%. With a wrong passage of the same name the reader writes
in 97% that the value is not known, with one of another name in 82%.

Sources: "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", Lewis et al. 2020; "The
Probabilistic Relevance Framework: BM25 and Beyond", Robertson and Zaragoza 2009; "Dense Passage
Retrieval for Open-Domain Question Answering", Karpukhin et al. 2020; "State of GPT", Karpathy 2023.
Needs '.[lab]'.
"""

import random
import time
from collections import Counter
from typing import Annotated

import numpy as np

from bench.common import table
from configurator import Positive, Range, Seed, override
from lab import common, facts, store
from lab.course import Course
from lab.reader import gain, make_reader, open_model, percent, read, show

# Settings -----------------------------------------------------------------------------------------
people: Annotated[int, Range(least=10)] = 800  # articles of people in the store
towns: Annotated[int, Range(least=5)] = 200
questions: Annotated[int, Range(least=10)] = 400  # to answer
share: Positive = 1.0  # of the steps of the course's models
seed: Seed = 1  # of the store and the questions
out = 'out-lab'  # folder of the picture and the numbers; the models are in its folder state_of_gpt
config = override(globals())
# --------------------------------------------------------------------------------------------------

DEPTHS = (1, 2, 4, 8)  # k of recall@k
READ = (1, 2, 4)  # passages that the reader gets
COLORS = {'words (BM25)': common.BLUE, 'embeddings': common.RED, 'both': common.GREEN}


def draw_questions(world, n):
    """Return n questions about different facts, [(text, name, relation), ...]."""
    rng = random.Random(f'questions {seed}')
    pairs = rng.sample([(name, relation) for name in world for relation in world[name]], n)
    return [(facts.question(relation, name, rng), name, relation) for name, relation in pairs]


def wrong_passages(world, asked, rng):
    """Return a passage for each question of the same name, and one of another name.

    The first lacks the relation that is asked for; the second has it.
    """
    same, other = [], []
    for _, name, relation in asked:
        own = [text for _, text, relations in facts.passages_of(world, [name])
               if relation not in relations]
        stranger = rng.choice([key for key in world if key != name and relation in world[key]])
        same.append([rng.choice(own)])
        other.append([facts.passage_with(world, stranger, relation)])
    return same, other


def shares(world, asked, answers):
    """Return which answers are right and which say not known, two arrays of bool."""
    right = [facts.value_in(text) == world[name][relation]
             for text, (_, name, relation) in zip(answers, asked, strict=True)]
    return np.array(right), np.array([text.endswith(f'{facts.UNKNOWN}.') for text in answers])


def guess(world, asked):
    """Return which questions a relation's most frequent value answers, (n,) of bool."""
    counts = {}
    for values in world.values():
        for relation, value in values.items():
            counts.setdefault(relation, Counter())[value] += 1
    return np.array([world[name][relation] == counts[relation].most_common(1)[0][0]
                     for _, name, relation in asked])


def search_time(n, width, repeats=20):
    """Return the milliseconds of numpy's search for a query among n random vectors."""
    vectors = np.random.default_rng(0).standard_normal((n, width), np.float32)
    times = []
    for query in vectors[:repeats, None]:
        started = time.perf_counter()
        store.nearest(query, vectors, 8)
        times.append(1e3 * (time.perf_counter() - started))
    return float(np.median(times))


def picture(recalls, answers):
    """Draw recall@k of each search, and the answers by what the reader gets."""
    plt = common.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=[4, 5])
    for name, points in recalls.items():
        means, lows, highs = np.array(points).T
        left.plot(DEPTHS, means, color=COLORS[name], marker='o', markersize=5, label=name)
        left.fill_between(DEPTHS, lows, highs, color=COLORS[name], alpha=0.15)
    left.set(xscale='log', xticks=DEPTHS, xticklabels=DEPTHS, xlabel='passages found, k',
             ylabel='recall@k, %', ylim=(-2, 102), title='Is the right passage found?')
    left.minorticks_off()
    left.legend(loc='lower right', bbox_to_anchor=(1.0, 0.14))
    for y, (known, unknown) in enumerate(answers.values()):  # shares with intervals
        right.barh(y, known[0], color=common.GREEN, alpha=0.85)
        right.barh(y, unknown[0], left=known[0], color='lightgray')
        right.barh(y, 100 - known[0] - unknown[0], left=known[0] + unknown[0], color=common.RED,
                   alpha=0.7)
        right.errorbar(known[0], y, xerr=[[max(0, known[0] - known[1])],
                                          [max(0, known[2] - known[0])]], color='black', lw=1)
    right.set(yticks=range(len(answers)), yticklabels=list(answers), xlim=(0, 100),
              xlabel='answers, %', title='Right (green), does not know (grey), wrong (orange)')
    right.invert_yaxis()
    right.grid(False, axis='y')
    return figure


def main():
    # make the models
    common.pyplot()
    common.library('bm25s')
    course = Course(out=out, share=share)
    common.start(course.home)
    course.make('base')
    base, reader = open_model(course.folder('base')), make_reader(course)

    # fill the store
    world = facts.make_world(people, towns, 'test', seed)
    asked = draw_questions(world, questions)
    texts = [text for text, *_ in asked]
    passages = store.Store(world)
    numbers = np.array([passages.numbers[name, relation] for _, name, relation in asked])
    print(f'\n{sum(map(len, world.values())):,} facts in {len(world):,} articles, '
          f'{len(passages.texts):,} passages, such as\n  {passages.texts[numbers[0]]}\n'
          f'questions, such as\n  {texts[0]}\n', flush=True)

    # search
    by_words = passages.by_words(texts, 50)
    queries, vectors = (store.embed(*base, some) for some in (texts, passages.texts))
    by_embedding = store.nearest(queries, vectors, 50)
    ranked = {'words (BM25)': by_words, 'embeddings': by_embedding,
              'both': store.fuse([by_words, by_embedding], DEPTHS[-1])}
    recalls = {name: [percent((numbers_found[:, :k] == numbers[:, None]).any(1)) for k in DEPTHS]
               for name, numbers_found in ranked.items()}
    print('recall@k, %, with 95% intervals\n')
    print(table([['k', *DEPTHS],
                 *([name, *map(show, points)] for name, points in recalls.items())]))
    times = {n: search_time(n, vectors.shape[1]) for n in (len(vectors), 30_000, 300_000)}
    print('\na search by numpy: ' + ', '.join(f'{ms:.2f} ms of {n:,}' for n, ms in times.items()))

    # read
    rng = random.Random(f'wrong {seed}')
    same, other = wrong_passages(world, asked, rng)
    chosen = {'closed book': [[] for _ in asked],
              'right passage': [[passages.texts[i]] for i in numbers],
              **{f'best {k} by words': [[passages.texts[i] for i in row[:k]] for row in by_words]
                 for k in READ},
              'best 4 by embeddings': [[passages.texts[i] for i in row[:4]]
                                       for row in by_embedding],
              'wrong: same name': same, 'wrong: another name': other}
    answers = {name: read(reader, list(map(facts.messages, texts, some)))
               for name, some in chosen.items()}
    rights = {name: shares(world, asked, some) for name, some in answers.items()}
    rights = {'closed book': rights['closed book'],
              'most frequent value': (guess(world, asked), np.zeros(questions, bool)), **rights}
    results = {name: [percent(flags) for flags in both] for name, both in rights.items()}
    rows = [['the reader gets', 'right, %', 'does not know, %', 'wrong, %']]
    for name, (known, unknown) in results.items():
        rows.append([name, show(known), show(unknown), f'{100 - known[0] - unknown[0]:.1f}'])
    print(f'\n{questions} questions about facts of the store\n\n{table(rows)}')
    best = f'best {READ[-1]} by words'
    gains = {name: gain(rights[best][0], rights[name][0])
             for name in ('closed book', 'most frequent value')}
    for name, values in gains.items():
        print('{} - {}: {:+.1f} points ({:+.1f} to {:+.1f})'.format(best, name, *values))
    example = list(zip(texts, chosen[best], answers[best], strict=True))[0]
    print('\nfor example:', *example[1], example[0], f'-> {example[2]}\n', sep='\n  ')
    common.save(picture(recalls, results), out, 'retrieval')
    common.record(out, 'retrieval', recalls=recalls, answers=results, gains=gains, search_ms=times)


if __name__ == '__main__':
    main()
