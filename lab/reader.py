"""
Make the course's reader of passages, and measure its answers.

    model, tokenizer = reader = make_reader(Course(out='out-lab'))
    answers = read(reader, [facts.messages('Where does Zolin live?', passages)])

The reader is the course's SFT model, finetuned on lab/facts.py's conversations about other names.
lab.retrieval, lab.react and lab.guardrails share it.
"""

import numpy as np

from flatgpt import pretrained
from lab import common, facts
from posttrain.tasks.common import Answering, answer
from tokenizer.chat import TEMPLATE, render

TALKS, STEPS = 14_000, 1000  # conversations and steps of finetuning, for share=1
BLOCK_SIZE = 400  # tokens: four passages, three questions and their answers


def make_reader(course):
    """Finetune the reader, if it is not there; -> (model, tokenizer)."""
    folder = course.finetune(
        'reader', start='sft', block_size=BLOCK_SIZE, batch_size=10, max_iters=STEPS,
        eval_interval=200, talks=facts.reading_talks(course.scaled(TALKS), course.seed))
    return open_model(folder)


def open_model(folder):
    """Open a model of the course; -> (model, tokenizer)."""
    return pretrained.open_model('resume', folder)[:2]


def read(reader, conversations, begun=()):
    """Return a model's likeliest answers to lists of messages.

    reader: (model, tokenizer). begun: the beginnings of the answers, so that the model has to
    guess.
    """
    tokenizer = reader[1]
    prompts = [render(messages, TEMPLATE, tokenizer) for messages in conversations]
    if begun:
        prompts = [ids + tokenizer.encode(text) for ids, text in zip(prompts, begun, strict=True)]
    return read_ids(reader, prompts)


def read_ids(reader, prompts):
    """Return a model's likeliest answers to lists of ids, of similar lengths together."""
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [''] * len(prompts)
    how = Answering(TEMPLATE, max_new_tokens=128, temperature=0)
    for i, text in zip(order, answer(*reader, [prompts[i] for i in order], how), strict=True):
        texts[i] = text
    return texts


def percent(flags):
    """Return a share of flags in percent, and the ends of Wilson's 95% interval."""
    return common.percent(int(np.sum(flags)), len(flags))


def show(share):
    """Write a share with its interval."""
    return '{:.1f} ({:.0f}-{:.0f})'.format(*share)


def gain(right, baseline):
    """Return the mean paired difference in points, and a 95% interval by a bootstrap."""
    return common.interval(100.0 * np.array(right) - 100.0 * np.array(baseline))
