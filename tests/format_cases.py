"""Texts, vocabularies and files that the tests of tokenizer/formats.py share."""

import base64
import functools
import json
from pathlib import Path

import tiktoken
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tokenizer import bpe, formats, patterns, vocabulary

TEXTS = [
    '', ' ', 'Hello world', "I'll say: it's, IT'S, we'Ve, they'RE, l'été, 'ſ 'Ll '", 'a' * 300,
    ' ' * 90 + 'x',
    'def f(x):\n\treturn {"a": [1, 2.5e-10]}\r\n\r\n    # done\n', 'a\r\nb\rc\n\n\n  \n d \t\t e  ',
    '123456 12 3٣٤ Ⅷ ½ ²', '안녕하세요 세계! \u1100\u1161\u11a8 각', '日本語のテキスト、中文文本。',
    'Здравствуй, мир',
    'שָׁלוֹם עולם', 'नमस्ते दुनिया', 'e\u0301 ﬁ ß İ ŉ ǅ ʕ', '🙂👩\u200d👩\u200d👧\u200d👦 🇩🇪🏳️\u200d🌈',
    '\x00\x01\x0b\x0c\x1c\x1f\x7f\x85\xa0\u2028\u3000\ufeff\uffff \u200b x',
    'HTTPServer CamelCase snake_case __init__ <|endoftext|> <|fim_prefix|>',
    '\U0010ffff\ue000 !!!...???///\n/',
]
# characters from which a random text is mostly made of pattern's borders
NASTY = ['\r\n', '  ', *" \t\n\r\x0b\x0c\x85\xa0\u2028\u3000'’sStTſrReEvVlLmMdDK09٣½²",
         *'aAéÉßǅʰªЖжﬁ中각ि́🙂_-/.!<|>']
nasty_text = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(NASTY),
                                                      max_size=60).map(''.join))
# every character but those of the planes without scripts, and Han and Hangul syllables, which are
# many and alike
SCRIPTS = ''.join(map(chr, [*range(0x3500), *range(0x9f00, 0xad00), *range(0xd700, 0xd800),
                            *range(0xf900, 0x20100)]))
# for all examples of a test
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def make_small():
    """A vocabulary of 600 tokens, as a description."""
    specials = {'<|endoftext|>': 700}
    return vocabulary.Vocabulary('small', *learnt(), specials).describe(patterns.PATTERNS['gpt4'])


OWN_TEXT = ''.join(Path(path).read_text(encoding='utf-8') for path in (__file__, formats.__file__))


def learnt(n=344):
    """{token: id} and merges of a vocabulary learnt from TEXTS and this file."""
    texts = [*TEXTS, OWN_TEXT]
    pairs = bpe.learn(bpe.count_pieces(texts, patterns.PATTERNS['gpt4'], workers=1), n)
    tokens = bpe.token_bytes(pairs)
    return {token: i for i, token in enumerate(tokens)}, [(tokens[left], tokens[right])
                                                          for left, right in pairs]


def encode_plainly(values, text):
    """What a description says, step by step."""
    printable_ids = dict(zip(map(patterns.BYTE_TO_CHAR.get, range(256)),
                             values['byte_ids'] or range(256), strict=True))
    merges = [tuple(merge.split(' ')) for merge in values['merges']]
    merge_ids = values['merge_ids'] or range(256, 256 + len(merges))
    printable_ids |= {''.join(merge): i for merge, i in zip(merges, merge_ids, strict=True)}
    ids = []
    for piece in patterns.split(text, values['pattern']):
        parts = [patterns.BYTE_TO_CHAR[byte] for byte in piece.encode()]
        if values['ignore_merges'] and ''.join(parts) in printable_ids:
            parts = [''.join(parts)]
        while set(pairs := list(zip(parts, parts[1:], strict=False))) & set(merges):
            i = pairs.index(next(merge for merge in merges if merge in pairs))
            parts[i:i + 2] = [''.join(parts[i:i + 2])]
        ids += [printable_ids[part] for part in parts]
    return ids


def hf_ids(hf, text):
    return hf.encode(text, add_special_tokens=False).ids


def tiktoken_of(path, pattern):
    """tiktoken's own encoding with the ranks of a file."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split,
                                                                       Path(path).read_text().splitlines())}
    # tiktoken needs some pattern; this one takes all of a text
    return tiktoken.Encoding('test', pat_str=pattern or r'[\s\S]+', mergeable_ranks=ranks,
                             special_tokens={})


def byte_level_file(merges, more_tokens=(), /, **model):
    """The content of a tokenizer.json without pattern: the bytes have the ids 0 to 255, then the
    merges' tokens."""
    vocab = {char: byte for byte, char in patterns.BYTE_TO_CHAR.items()}
    for token in [*(merge.replace(' ', '') for merge in merges), *more_tokens]:
        vocab.setdefault(token, len(vocab))
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                  'use_regex': False}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [],
            'normalizer': None,
            'pre_tokenizer': byte_level, 'post_processor': None, 'decoder': byte_level,
            'model': {'type': 'BPE', 'dropout': None, 'unk_token': None,
                      'continuing_subword_prefix': None,
                      'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
                      'ignore_merges': False,
                      'vocab': vocab, 'merges': list(merges), **model}}


def read_file(tmp_path, content):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    return formats.read_tokenizer_json(tmp_path / 'tokenizer.json')
