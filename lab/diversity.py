"""
Let base, SFT, PPO and GRPO continue a list of names; measure how varied the names are.

    $ python -m lab.diversity                     # with the models of lab.state_of_gpt made
    $ python -m lab.diversity --temperature=1.5   # does a higher temperature bring variety back?

The talk advises base models where many different outputs are wanted: they give "more things that
look like" the examples, while models after reinforcement learning have lost entropy. A list is
seven made-up words, one a line, of the kind that the course's texts contain. Each model continues
each list with its next name, many times. A name is lower-case letters up to the next other token;
anything else is no name. Per list the script measures

    names         share of the continuations that are names
    distinct      number of different names / number of continuations
    new           the same without names of the list and words of the dictionary
    distinct of 8 expected share of different ones in 8 of the names: variety apart from form
    self-BLEU     BLEU of a name's letters against the list's other names; high: alike (0 to 100)
    entropy       of a continuation, in nats: the sum of its tokens' exact entropies

It then draws several answers to each of the task's questions, in chat (the base model continues
"Q: ... A:"), and measures right and distinct answers and the entropy of an answer. Intervals are
95% bootstraps over the lists, or over the questions. Differences are paired: all models get the
same lists and random numbers.

Measured on a busy machine: different names, in % of the continuations, base 87, SFT 26, PPO 43,
GRPO 26; GRPO against base -60 (-66 to -54), against SFT +0.2 (-6 to +5): on lists SFT loses the
variety, since it forgets how a list goes on. In chat GRPO against SFT loses 0.7 nats an answer (0.5
to 1.0), and half of the different answers.

Sources: "State of GPT", Karpathy 2023; self-BLEU, Zhu et al. 2018 (Texygen), by sacrebleu (Post
2018); "Understanding the Effects of RLHF on LLM Generalisation and Diversity", Kirk et al. 2024.
Needs '.[lab]'.
"""

import math
import random
import re
from collections import Counter

import numpy as np
import torch

from bench.common import table
from configurator import Count, NonNegative, Positive, Seed, override
from flatgpt.generate import Sampling, uniforms
from flatgpt.pretrained import open_model
from lab import common
from lab.course import Course
from posttrain.rollouts import draw_answers, logprobs_of, to_rows
from posttrain.tasks import common as tasks
from posttrain.tasks import tiny_chat
from tokenizer.chat import find_endings

# Settings -----------------------------------------------------------------------------------------
lists: Count = 32  # of seven names each
names: Count = 32  # continuations of each list
questions: Count = 42  # of the task
answers: Count = 16  # to each question
temperature: NonNegative = 1.0
seed: Seed = 1  # of the lists and of what is drawn
share: Positive = 1.0  # of the steps of the course's models
out = 'out-lab'  # folder of the picture, the numbers and the models
config = override(globals())
# --------------------------------------------------------------------------------------------------

EXAMPLES, LONGEST = 7, 14  # names of a list; tokens of a continuation
FEW, AT_ONCE = 8, 256  # names for `distinct of 8`; samples at once
MODELS = {'base': common.BLACK, 'sft': common.BLUE, 'ppo': common.ORANGE, 'grpo': common.GREEN}
TITLES = {'base': 'base', 'sft': 'SFT', 'ppo': 'PPO', 'grpo': 'GRPO'}
# measures, those in percent with a %
NAMES = ('names, %', 'distinct, %', 'new, %', 'distinct of 8, %', 'self-BLEU', 'entropy')
CHAT = ('right, %', 'distinct answers, %', 'entropy of an answer')
WORDS = set(tiny_chat.WORDS)


def draw_lists(n, rng):
    """Return n lists of EXAMPLES different made-up words."""
    drawn = []
    while len(drawn) < n:
        words = {word for word in (tiny_chat.word(rng) for _ in range(8 * EXAMPLES))
                 if word not in WORDS}
        drawn.append(rng.sample(sorted(words), EXAMPLES))
    return drawn


def draw(model, tokenizer, prompts, stop_ids, size):
    """Continue each prompt; size: (samples of each, tokens of each).

    -> for each prompt [(text without its end, sum of its tokens' entropies), ...].
    """
    n, most = size
    sampling = Sampling(most, temperature, n_ids=tokenizer.vocab_size, stop_ids=stop_ids)
    rows, drawn = [(number, sample) for number in range(len(prompts)) for sample in range(n)], []
    for batch in (rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)):
        u = torch.stack([uniforms(seed, *row, most) for row in batch])
        asked = [prompts[number] for number, _ in batch]
        given = draw_answers(model, asked, sampling, u)
        idx, mask = to_rows([(ids + new, [0] * len(ids) + [1] * len(new))
                             for ids, new in zip(asked, given, strict=True)], 'cpu')
        with torch.no_grad():
            _, entropies = logprobs_of(model, idx, mask, tokenizer.vocab_size, temperature or 1.0)
        drawn += [(tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids), float(entropy))
                  for ids, entropy in zip(given, entropies.sum(1), strict=True)]
    return [drawn[i : i + n] for i in range(0, len(drawn), n)]


def self_bleu(texts):
    """Return the mean BLEU of each text's letters against the other texts, 0 to 100."""
    BLEU = common.library('sacrebleu.metrics').BLEU
    bleu = BLEU(tokenize='char', effective_order=True)  # names shorter than four letters count too
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score
              for i, text in enumerate(texts) if len(texts) > 1]
    return float(np.mean(scores)) if scores else np.nan


def distinct_of(texts, m):
    """Return the expected share of distinct ones among m random texts."""
    n = len(texts)
    if n < m:
        return np.nan
    missed = [math.comb(n - count, m) / math.comb(n, m) for count in Counter(texts).values()]
    return (len(missed) - sum(missed)) / m


def measure_names(given, drawn):
    """Measure a list's continuations, [(text, entropy), ...]; -> numbers of NAMES."""
    made = [text for text, _ in drawn if is_name(text)]
    new = set(made) - set(given) - WORDS
    return (len(made) / len(drawn), len(set(made)) / len(drawn), len(new) / len(drawn),
            distinct_of(made, FEW), self_bleu(made), np.mean([entropy for _, entropy in drawn]))


def is_name(text):
    """Return whether a continuation is a name that ended in time."""
    return re.fullmatch(f'[a-z]{{2,{LONGEST - 1}}}', text) is not None


def measure_answers(example, drawn):
    """Measure the answers to a question, [(text, entropy), ...]; -> numbers of CHAT."""
    texts = [text.strip() for text, _ in drawn]
    return (np.mean([tiny_chat.evaluate(example, text) for text in texts]),
            len(set(texts)) / len(texts), np.mean([entropy for _, entropy in drawn]))


def measure(folders, given, examples):
    """Return {model: (measures of lists (n, 6), of questions (n, 3))}, and names."""
    measures, samples = {}, {}
    for name, folder in folders.items():
        model, tokenizer, template, _ = open_model('resume', folder)
        prompts = [tokenizer.encode('\n'.join(words) + '\n') for words in given]
        letters = {tokenizer.encode(char)[0] for char in 'abcdefghijklmnopqrstuvwxyz'}
        others = set(range(tokenizer.vocab_size)) - letters
        drawn = draw(model, tokenizer, prompts, others, (names, LONGEST))
        of_lists = np.array(list(map(measure_names, given, drawn)))
        samples[name] = [text if is_name(text) else '-' for part in drawn for text, _ in part]

        # the task's questions
        if template:
            stop_ids, _ = find_endings(template, tokenizer)
            prompts = [tasks.chat_prompt(example, template, tokenizer, 128) for example in examples]
        else:
            stop_ids = {tokenizer.encode('\n')[0]}
            prompts = [tokenizer.encode(example['context'] + ' ') for example in examples]
        drawn = draw(model, tokenizer, prompts, stop_ids, (answers, 128))
        measures[name] = of_lists, np.array(list(map(measure_answers, examples, drawn)))
        print(f'{TITLES[name]}: {", ".join(samples[name][:8])}', flush=True)
    return measures, samples


def picture(results, samples):
    """Draw the distinct names and the entropies of each model, and its first names."""
    figure, axes = common.pyplot().subplots(1, 4, figsize=(11, 3.6), sharey=True)
    panels = {'distinct, %': 'different names, %', 'entropy': 'entropy of a name, nats',
              'distinct answers, %': 'chat: different answers, %',
              'entropy of an answer': 'chat: entropy of an answer, nats'}
    for ax, (key, label) in zip(axes, panels.items(), strict=True):
        for y, name in enumerate(results):
            mean, low, high = results[name][key]
            ax.barh(y, mean, color=MODELS[name], alpha=0.85, height=0.5)
            ax.errorbar(mean, y, xerr=np.maximum(0, [[mean - low], [high - mean]]), color='gray',
                        lw=1.5)
            ax.text(high, y, f' {mean:.0f}' if '%' in key else f' {mean:.1f}', va='center')
        ax.set(xlabel=label, xlim=(0, 1.2 * max(of[key][2] for of in results.values())))
        ax.grid(False, axis='y')
    axes[0].set(yticks=range(len(results)), yticklabels=[TITLES[name] for name in results],
                ylim=(len(results) - 0.3, -0.5))
    for y, name in enumerate(results):
        shown = ', '.join(dict.fromkeys(text for text in samples[name] if text != '-'))
        axes[0].text(0, y + 0.42, shown[:36].rpartition(',')[0], fontsize=7, va='center')
    return figure


def summary(parts, others):
    """Return {measure: [mean, low, high]} of measures less other ones, see measure()."""
    values = {key: common.interval(column) for part, other, keys in zip(
        parts, others, (NAMES, CHAT), strict=True)
        for key, column in zip(keys, (part - other).T, strict=True)}
    return {key: [100 * value for value in three] if '%' in key else three
            for key, three in values.items()}


def main():
    common.pyplot()  # raises before the models are made if a library is missing
    common.library('sacrebleu')
    common.start(out)
    folders = Course(out=out, share=share).make(*MODELS)
    given = draw_lists(lists, random.Random(seed))
    examples = tasks.examples_of(tiny_chat, tasks.Questions('test', questions, seed))
    measures, samples = measure(folders, given, examples)

    # the means, and the differences from base and SFT, with intervals
    results = {name: summary(parts, [0, 0]) for name, parts in measures.items()}
    against = {other: {name: summary(parts, measures[other]) for name, parts in measures.items()}
               for other in ('base', 'sft')}

    # report
    for title, keys in ((f'{lists} lists, {names} continuations of each', NAMES),
                        (f'chat: {questions} questions, {answers} answers to each', CHAT)):
        rows = [['', *(TITLES[name] for name in results)]]
        rows += [[key, *(('{:.0f} ({:.0f}-{:.0f})' if '%' in key else '{:.1f} ({:.1f}-{:.1f})')
                         .format(*results[name][key]) for name in results)] for key in keys]
        print(f'\n{title}, with 95% intervals\n\n{table(rows)}')
    for other, keys in (('base', ('distinct, %', 'entropy')), ('sft', ('distinct, %', 'entropy')),
                        ('sft', ('distinct answers, %', 'entropy of an answer'))):
        print(f'\n{"chat: " * (keys[0] in CHAT)}against {TITLES[other]}, paired')
        for name in list(results)[1 + (other == 'sft') :]:
            print(f'  {TITLES[name]}: ' + f'\n  {" " * len(TITLES[name])}  '.join(
                '{} {:+.1f} ({:+.1f} to {:+.1f})'.format(key, *against[other][name][key])
                for key in keys))
    print('\nthe most frequent (-: no name)')
    most = {name: Counter(texts).most_common(5) for name, texts in samples.items()}
    for name, counts in most.items():
        print(f'  {TITLES[name]}: ' + ', '.join(f'{text} {count}' for text, count in counts))
    print()
    common.save(picture(results, samples), out, 'diversity')
    common.record(out, 'diversity', results=results, against=against, most=most)


if __name__ == '__main__':
    main()
