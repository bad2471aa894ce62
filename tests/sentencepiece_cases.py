"""Texts and SentencePiece models that the tests of tokenizer/sentencepiece.py share."""

import functools
import io
import random

from tokenizer_cases import CODE, HARD, PROSE, readable

import tokenizer
from tokenizer.__main__ import SAMPLES

TRAINING = [*SAMPLES.values(), *map(readable, HARD), CODE[:30_000], PROSE]
# that normalization or joining treats differently
NASTY = [*' \t\n\r\x00\x01\x0b\x1c\x7f\x85\xa0\u2028\u3000\u200b\u200d\ufeff▁', '  ', '   ', ' ▁', '\r\n',
         *'aeiknotAB09é٣½²ﬁ①Ａｱﾞが\u0301\u0308\u0327\u3099각中日語ि🙂🇩', '\u1100\u1161\u11a8', '가', 'the', ' the',
         'ing', 'tion', '<unk>', '<s>', '</s>', '<0x41>', '<|endoftext|>', 'aaaa', 'abab', '\ufffd', '\U0010ffff']


@functools.cache
def many_texts(n=10_000):
    """n texts: words, code and characters of many scripts in random order; the first are HARD."""
    rng, pool = random.Random(0), ''.join(TRAINING)
    ranges = [(0x20, 0x7f), (0, 0x300), (0x300, 0x600), (0x900, 0xe80), (0x1100, 0x1200), (0x2000, 0x2c00),
              (0x3000, 0x3200), (0x4e00, 0x9fff), (0xac00, 0xd7a4), (0xf900, 0xffff), (0x1f000, 0x1fb00), (0, 0xd800),
              (0xe000, 0x110000)]

    def make():
        kind = rng.randrange(4)
        if kind == 0:
            start = rng.randrange(len(pool))
            return pool[start:start + rng.randrange(80)]
        if kind == 1:
            return ''.join(rng.choices(NASTY, k=rng.randrange(12)))
        if kind == 2:
            first, last = rng.choice(ranges)
            return ''.join(chr(rng.randrange(first, last)) for _ in range(rng.randrange(20)))
        return ' ' * rng.randrange(3) + '  '.join(rng.choices(pool.split(), k=rng.randrange(9))) + ' ' * rng.randrange(3)

    return [*map(readable, HARD), *(readable(make()) for _ in range(n - len(HARD)))]


@functools.cache
def trained_by_package(**options):
    """The content of a tokenizer.model that the package sentencepiece trained."""
    import sentencepiece
    lines = [line for text in TRAINING for line in text.replace('\0', ' ').split('\n') if line]
    settings = {'model_type': 'bpe', 'byte_fallback': True, 'vocab_size': 900, 'normalization_rule_name': 'identity',
                'minloglevel': 2, 'num_threads': 1, 'character_coverage': 0.98, **options}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()


@functools.cache
def trained_here(vocab_size=900):
    return tokenizer.SentencePieceTokenizer.train(TRAINING, vocab_size, ['<|endoftext|>'], workers=1)
