"""
Make the course's reader of passages, and measure its answers.

    model, tokenizer = reader = make_reader(Course(out='out-lab'))
    answers = read(reader, [facts.messages('Where does Zolin live?', passages)])

The reader is the course's SFT model, finetuned on lab/facts.py's conversations about other names.
lab.retrieval, lab.react and lab.guardrails share it.
"""

import numpy as np

from flatgpt import pretrained
from lab import facts
from posttrain.tasks.common import Answering, answer, wilson
from tokenizer.chat import TEMPLATE, render

TALKS, STEPS = 14_000, 1000  # conversations and steps of finetuning, for share=1
BLOCK_SIZE = 400  # tokens: four passages, three questions and their answers


def make_reader(course):
    """Finetune the reader, if it is not there; -> (model, tokenizer)."""
    folder = course.finetune(
        'reader', start='sft', block_size=BLOCK_SIZE, batch_size=10, max_iters=STEPS,
        eval_interval=200, talks=facts.reading_talks(scaled(TALKS, course), course.seed))
    return open_model(folder)


def scaled(amount, course):
    """Return the number of conversations for a course's share."""
    return max(400, round(min(1, course.share) * amount))


def open_model(folder):
    """Open a model of the course; -> (model, tokenizer)."""
    return pretrained.open_model('resume', folder)[:2]


def read(reader, conversations, begun=()):
    """Return a model's likeliest answers to lists of messages. reader: (model, tokenizer).

    begun: the beginnings of the answers, so that the model has to guess.
    """
    tokenizer = reader[1]
    prompts = [render(messages, TEMPLATE, tokenizer) for messages in conversations]
    if begun:
        prompts = [ids + tokenizer.encode(text) for ids, text in zip(prompts, begun, strict=True)]
    return read_ids(reader, prompts)


def read_ids(reader, prompts):
    """Return a model's likeliest answers to lists of ids; similar lengths run together."""
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [''] * len(prompts)
    how = Answering(TEMPLATE, max_new_tokens=128, temperature=0)
    for i, text in zip(order, answer(*reader, [prompts[i] for i in order], how), strict=True):
        texts[i] = text
    return texts


def percent(flags):
    """Return a share of flags in percent, and the ends of Wilson's 95% interval."""
    n_right = int(np.sum(flags))
    return [100 * n_right / len(flags), *(100 * end for end in wilson(n_right, len(flags)))]


def show(share):
    """Write a share with its interval."""
    return '{:.1f} ({:.0f}-{:.0f})'.format(*share)


def gain(right, baseline):
    """Return the mean paired difference in points, and a 95% interval by a bootstrap."""
    rng, gains = np.random.default_rng(0), 100.0 * np.array(right) - 100.0 * np.array(baseline)
    means = gains[rng.integers(len(gains), size=(2000, len(gains)))].mean(1)
    return [float(value) for value in (gains.mean(), *np.quantile(means, [0.025, 0.975]))]
