"""
Draft an answer, judge it, revise it; compare with a second sample.

    $ python -m lab.reflection               # 2 minutes on two cores, with the models made
    $ python -m lab.reflection --invented=0 --out=out-own

The SFT model of lab.state_of_gpt drafts answers at temperature 1. It is then finetuned to reflect.
In its conversations the question "Did you meet the assignment?" follows a draft, and "Yes." or
"No." with the right solution follows that. The drafts are the SFT model's own and carry no loss.
A quarter of them is replaced by typical mistakes (data/tiny_chat's `mistaken`).

Measured: how often a wrong draft is noticed and mended, how often a right one is spoilt; against
one draft, a second one, and the better of two by the SFT model's likelihood or by the finetuned
model's own judgement. Two controls: the SFT model is asked the same question without finetuning,
and the finetuned model revises every draft.

Measured on a busy machine, % right of 700 held-out questions: one draft 76, a second one 79, the
likelier of two 84, draft, judge and revise 80, greedily 86; a greedy draft 84, judged and revised
90. That last gain is counting, where the revision has steps that the draft lacks. Without counting
it is -1.7 points (95%: -3.5 to +0.2). The SFT model without finetuning spoils 520 of 535 drafts.

Sources: "State of GPT", Karpathy 2023; Self-Refine, Madaan et al. 2023; Reflexion, Shinn et al.
2023; "Large Language Models Cannot Self-Correct Reasoning Yet", Huang et al. 2024; "Language Models
(Mostly) Know What They Know", Kadavath et al. 2022. Needs '.[lab]'.
"""

import os
import random
import re
from typing import Annotated

import numpy as np

import tokenizer as tokenizers
from bench.common import table
from configurator import Count, Positive, Probability, Range, Seed, override
from data import download
from data.tiny_chat.prepare import with_steps
from flatgpt import jsonl
from flatgpt.files import replace_file
from flatgpt.pretrained import path_in
from lab import common
from lab.course import Course
from posttrain.policy import open_chat_model
from posttrain.tasks import tiny_chat
from posttrain.tasks.common import Answering, answer, loglikelihoods
from tokenizer import chat

# Settings -----------------------------------------------------------------------------------------
questions: Annotated[int, Range(least=7)] = 700  # held-out questions to measure with
drafts: Count = 4000  # train questions whose drafts the model learns to judge
invented: Probability = 0.25  # of these drafts, replaced by a typical mistake
max_iters: Count = 400  # steps of finetuning
seed: Seed = 1
share: Positive = 1.0  # of the steps of the course's models
out = 'out-lab'  # folder of the picture and the numbers; the models are in its state_of_gpt
config = override(globals())
# --------------------------------------------------------------------------------------------------

ASK = 'Did you meet the assignment?'
YES, NO = 'Yes.', 'No.'
LONGEST = 100  # tokens of an answer
SPECIALS = re.compile('|'.join(map(re.escape, chat.SPECIAL_TOKENS)))


# Conversations ------------------------------------------------------------------------------------

def messages_of(example, draft):
    """Return a question, a draft, and the request to judge it."""
    return [*example['messages'], {'role': 'assistant', 'content': draft, 'weight': 0},
            {'role': 'user', 'content': ASK}]


def mistake(example, rng):
    """Return a wrong answer, with its steps in three of four."""
    steps, wrong = example['mistaken'] or (None, example['answer'])
    if str(wrong) == example['answer'] or rng.random() < 0.25:
        return f'{tiny_chat.FORM} {rng.choice(example["mistakes"])}.'
    return f'{steps}. {tiny_chat.FORM} {wrong}.'


def make_talks(examples, texts):
    """Yield conversations that judge drafts and revise the wrong ones.

    texts: a draft of each example; a share `invented` of them is replaced by mistakes.
    """
    rng = random.Random(f'reflection {seed}')
    for example, draft in zip(examples, texts, strict=True):
        draft = mistake(example, rng) if rng.random() < invented else draft
        is_right = tiny_chat.evaluate(example, draft)
        yield {'messages': [*messages_of(example, draft), {
            'role': 'assistant', 'content': YES if is_right else f'{NO} {with_steps(example)}'}]}


def draft_once(course, sft):
    """Return train questions and the SFT model's drafts, kept in a file of the course."""
    examples = tiny_chat.examples('train', drafts, f'reflection {seed}')
    source = [download.file_sha256(path_in(course.folder('sft'))), drafts, seed]
    path = f'{course.folder("reflection")}-drafts-{tokenizers.digest(source)[:12]}.jsonl'
    if not os.path.exists(path):
        print(f'the SFT model drafts {drafts:,} answers', flush=True)
        texts = write(sft, [example['messages'] for example in examples], 1.0)
        replace_file(path, b''.join(jsonl.to_line({'text': text}) for text in texts))
    return examples, [row['text'] for row in jsonl.read_objects(path).values()]


# Answers ------------------------------------------------------------------------------------------

def write(chat_model, talks, temperature, begin='', num_samples=1):
    """Answer conversations; -> texts, `num_samples` in a row for each.

    begin: the text that each answer begins with. Special tokens, such as calls of a tool, and what
    exceeds LONGEST bytes are left out, and an empty answer becomes '?', so that a conversation can
    quote each answer.
    """
    model, tokenizer, template, _ = chat_model
    beginning = tokenizer.encode(begin)
    prompts = [chat.render(messages, template, tokenizer) + beginning for messages in talks]
    how = Answering(template, max_new_tokens=LONGEST, temperature=temperature, seed=seed,
                    num_samples=num_samples, batch_size=256)
    texts = [SPECIALS.sub('', text).encode()[:LONGEST].decode(errors='ignore')
             for text in answer(model, tokenizer, prompts, how)]
    return [begin + text or '?' for text in texts]


def probabilities(chat_model, talks, continuations):
    """Return the log-probability of each continuation of a conversation, (n,)."""
    model, tokenizer, template, _ = chat_model
    pairs = [(chat.render(messages, template, tokenizer), tokenizer.encode(text))
             for messages, text in zip(talks, continuations, strict=True)]
    return np.array(loglikelihoods(model, pairs))


def revised(draft, reply):
    """Return the answer that counts after a reply: a new one, or the draft."""
    return draft if reply.startswith(YES) or tiny_chat.extract(reply) is None else reply


def is_right(examples, texts):
    """Return which texts are right, (n,) of bool."""
    return np.array([tiny_chat.evaluate(*pair) for pair in zip(examples, texts, strict=True)])


def n_tokens(*answers):
    """Return the mean tokens of all answers to a question; a byte is a token."""
    return sum(len(text.encode()) + 1 for texts in answers for text in texts) / len(answers[0])


# Results ------------------------------------------------------------------------------------------

def outcomes(before, after, replies):
    """Count what happened to drafts; -> {name: (number, of how many)}."""
    doubted = np.array([not reply.startswith(YES) for reply in replies])
    n_wrong, n_right = int((~before).sum()), int(before.sum())
    return {'noticed': (int((doubted & ~before).sum()), n_wrong),
            'mended': (int((after & ~before).sum()), n_wrong),
            'doubted': (int((doubted & before).sum()), n_right),
            'spoilt': (int((~after & before).sum()), n_right)}


def separation(scores, rights):
    """Return the share of right and wrong pairs that scores order rightly (AUC)."""
    from scipy.stats import mannwhitneyu

    if rights.all() or not rights.any():
        return None
    return float(mannwhitneyu(scores[rights], scores[~rights]).statistic
                 / (rights.sum() * (~rights).sum()))


def picture(rows, by_kind, confidence, rights):
    """Draw methods, what happened to drafts, and accuracy along confidence."""
    plt = common.pyplot()
    figure, (methods, kinds, sure) = plt.subplots(
        1, 3, figsize=(13, 4.6), gridspec_kw={'width_ratios': [1.3, 1.2, 0.8]})
    for i, (name, (row, tokens)) in enumerate(rows.items()):
        mean, low, high = common.percent(int(row.sum()), len(row))
        color = common.BLUE if 'revise' in name else common.BLACK
        methods.errorbar(mean, -i, xerr=[[mean - low], [high - mean]], fmt='o', capsize=3,
                         color=color)
        methods.annotate(f'{tokens:.0f}', (1.01, -i), xycoords=('axes fraction', 'data'),
                         va='center', fontsize=9)
    methods.set(yticks=[-i for i in range(len(rows))], yticklabels=list(rows),
                xlabel='right answers, %')
    methods.set_title('Methods; beside them tokens written', loc='left', fontsize=10)
    for i, (name, color) in enumerate(
            (('noticed', common.SKY), ('mended', common.GREEN), ('spoilt', common.RED))):
        mean, low, high = np.array([common.percent(*counts[name]) for counts in by_kind.values()]).T
        kinds.errorbar(np.arange(len(by_kind)) + 0.2 * (i - 1), mean, [mean - low, high - mean],
                       fmt='o', ms=4, capsize=2, color=color, label=name)
    kinds.set(xticks=range(len(by_kind)), ylim=(-3, 125), yticks=range(0, 101, 20))
    kinds.set_xticklabels(by_kind, rotation=30, ha='right')
    kinds.set_title('Wrong drafts noticed, mended; right ones spoilt, %', loc='left', fontsize=10)
    kinds.legend(ncol=3, loc='upper center', fontsize=9)
    ranks = np.argsort(np.argsort(confidence)) * 5 // len(confidence)  # fifths of the drafts
    for fifth in range(5):
        some = rights[ranks == fifth]
        mean, low, high = common.percent(int(some.sum()), len(some))
        x = 100 * confidence[ranks == fifth].mean()
        sure.errorbar(x, mean, [[mean - low], [high - mean]], fmt='o', capsize=3,
                      color=common.BLUE)
    sure.plot([0, 100], [0, 100], color='gray', lw=1, ls=':')
    sure.set(xlabel='probability of "Yes.", %', ylabel='drafts right, %', ylim=(0, 103))
    sure.set_title('Its judgement, fifths of the drafts', loc='left', fontsize=10)
    return figure


def main():
    # make the models
    common.pyplot()  # raises before the work if matplotlib is missing
    common.start(out)
    course = Course(out=out, share=share)
    sft = open_chat_model(course.make('sft')['sft'])
    reflecting = open_chat_model(course.finetune(
        'reflection', 'sft', make_talks(*draft_once(course, sft)), max_iters=max_iters))

    # draft twice, and choose
    examples = tiny_chat.examples('test', questions)
    talks = [example['messages'] for example in examples]
    sampled = write(sft, talks, 1.0, num_samples=2)
    first, second, greedy = sampled[::2], sampled[1::2], write(sft, talks, 0.0)

    def judge(texts):
        """Return the probability of a "Yes." about each draft."""
        asked = [messages_of(*pair) for pair in zip(examples, texts, strict=True)]
        return np.exp(probabilities(reflecting, asked, [YES] * len(asked)))

    def choose(scores):
        """Return the drafts with the higher scores; the first of equal ones."""
        return [pair[int(b > a)] for *pair, a, b in zip(first, second, *scores, strict=True)]

    confidence = judge(first), judge(second)
    likelier = choose([probabilities(sft, talks, texts) for texts in (first, second)])
    judged = choose(confidence)

    # reflect
    def reflect(chat_model, texts, temperature, begin=''):
        asked = [messages_of(*pair) for pair in zip(examples, texts, strict=True)]
        replies = write(chat_model, asked, temperature, begin)
        return replies, [revised(*pair) for pair in zip(texts, replies, strict=True)]

    untaught, by_sft = reflect(sft, first, 0.0)
    sampled_replies, by_sample = reflect(reflecting, first, 1.0)
    replies, by_reply = reflect(reflecting, first, 0.0)
    greedy_replies, by_greedy = reflect(reflecting, greedy, 0.0)
    redone, always = reflect(reflecting, greedy, 0.0, NO)
    verdicts = [[YES] * questions] * 2  # a verdict on each of two drafts
    rows = {name: (is_right(examples, texts), n_tokens(*answers)) for name, texts, *answers in (
        ('one draft', first, first),
        ('a second draft', second, first, second),
        ('the likelier of two', likelier, first, second),
        ('the better judged of two', judged, first, second, *verdicts),
        ('draft, judge, revise', by_sample, first, sampled_replies),
        ('draft, judge, revise greedily', by_reply, first, replies),
        ('draft, SFT asked to judge', by_sft, first, untaught),
        ('greedy draft', greedy, greedy),
        ('greedy draft, judge, revise', by_greedy, greedy, greedy_replies),
        ('greedy draft, revise always', always, greedy, redone))}

    # report
    before, after = rows['one draft'][0], rows['draft, judge, revise greedily'][0]
    print(f'\n{questions} held-out questions\n')
    cells = [['method', '% right', '95%', 'tokens']]
    for name, (row, tokens) in rows.items():
        mean, low, high = common.percent(int(row.sum()), questions)
        cells.append([name, f'{mean:.1f}', f'{low:.1f}-{high:.1f}', f'{tokens:.0f}'])
    print(table(cells))
    pairs = [('draft, judge, revise', name) for name in list(rows)[:4]]
    pairs += [('greedy draft, judge, revise', name) for name in ('greedy draft', list(rows)[-1])]
    compared = [[*pair, *common.compare(*(rows[name][0] for name in pair))] for pair in pairs]
    others = np.array([example['kind'] != 'counting' for example in examples])
    compared.append(['the same without counting', 'greedy draft', *common.compare(
        *(rows[name][0][others] for name in ('greedy draft, judge, revise', 'greedy draft')))])
    print('\ndifferences on the same questions, points; p of McNemar')
    for one, other, mean, low, high, p in compared:
        print(f'  {one} - {other}\n{"":12}{mean:+.1f} ({low:+.1f} to {high:+.1f}), p = {p:.1g}')
    kinds = np.array([example['kind'] for example in examples])
    by_kind = {kind: outcomes(before[kinds == kind], after[kinds == kind], [
        reply for reply, other in zip(replies, kinds, strict=True) if other == kind])
        for kind in dict.fromkeys(kinds.tolist())}
    by_kind['all'] = outcomes(before, after, replies)
    cells = [['%', *by_kind['all']], *(
        [kind, *(f'{100 * a / b:.0f} of {b}' if b else '' for a, b in counts.values())]
        for kind, counts in by_kind.items())]
    print('\nwrong drafts noticed and mended, right ones doubted and spoilt, greedily\n')
    print(table(cells))
    known = outcomes(before, rows['draft, SFT asked to judge'][0], untaught)
    area = separation(confidence[0], before)
    print(f'\nThe probability of "{YES}" orders {100 * (area or np.nan):.1f}% of pairs, a right '
          f'and a wrong draft.\nThe SFT model without finetuning mends {known["mended"][0]} of '
          f'{known["mended"][1]} wrong drafts\nand spoils {known["spoilt"][0]} of '
          f'{known["spoilt"][1]} right ones; for example, it replies\n  {untaught[0][:50]!r}')
    common.save(picture(rows, by_kind, confidence[0], before), out, 'reflection')
    common.record(out, 'reflection', compared=compared, by_kind=by_kind, area=area, sft=known,
                  rows={name: [int(row.sum()), tokens] for name, (row, tokens) in rows.items()})


if __name__ == '__main__':
    main()
