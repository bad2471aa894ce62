"""
Write one HTML page that shows the tokens of what a person types.

    write_page({'gpt2': tokenizer.load('gpt2')}, 'tokens.html')

The page holds up to three vocabularies and an encoder in JavaScript, page.html, which gives the ids
of encode(text, 'all'). It loads nothing from elsewhere.
"""

import base64
import json
from pathlib import Path

import numpy as np
import regex

from configurator import UserError
from tokenizer.base import write_file
from tokenizer.patterns import AS_IN_UNICODE_16, PATTERNS, SINCE_UNICODE_9, SINCE_UNICODE_16
from tokenizer.tokenizer_json import WORDS

TEMPLATE = Path(__file__).with_name('page.html')
MOST = 3  # vocabularies in a page
MARK = '/*VOCABULARIES*/'  # where page.html takes them


def write_page(named: dict, path):
    """Write the page of tokenizers {name: tokenizer} to path.

    Raises UserError for more than MOST, and for one that a browser would encode differently.
    """
    if not 1 <= len(named) <= MOST:
        raise UserError(f'a page shows 1 to {MOST} tokenizers, got {len(named)}: '
                        f'{", ".join(named) or "none"}; expected --tokenizer=gpt2 up to {MOST} '
                        f'times')
    content = {'vocabularies': [{'name': name, **describe(name, tok)}
                                for name, tok in named.items()],
               'as_in_unicode_16': newer_characters(), 'not_normalized': class_of(SINCE_UNICODE_9)}
    # in a script, the text of a token could end it: </script>
    text = json.dumps(content, ensure_ascii=True).replace('<', '\\u003c')
    page = TEMPLATE.read_text(encoding='utf-8')
    write_file(path, page.replace(MARK, text, 1))


def newer_characters() -> dict[str, str]:
    """Return the classes of characters that a browser knows and Unicode 16 does not."""
    others = {chr(code): chr(other) for code, other in AS_IN_UNICODE_16.items()
              if other != 0x10ffff}
    return {'newer': class_of(SINCE_UNICODE_16), 'others': others}


def class_of(ranges: str) -> str:
    """Write ranges such as '558 58b-58c' as a class of a JavaScript expression."""
    def escape(code):
        return f'\\u{{{code}}}'

    ends = (span.partition('-') for span in ranges.split())
    return '[' + ''.join(escape(first) + (f'-{escape(last)}' if last else '')
                         for first, _, last in ends) + ']'


def describe(name: str, tok) -> dict:
    """Return a tokenizer as page.html reads it. Raises UserError."""
    tok = tok.bpe if tok.kind == 'tiktoken' else tok
    values = {'kind': tok.kind, 'special_tokens': tok.special_tokens, 'size': tok.vocab_size}
    obstacle = ''
    if tok.kind == 'byte':
        return values
    if tok.kind in ('char', 'word'):
        pattern = r'[\s\S]' if tok.kind == 'char' else WORDS
        return {**values, 'tokens': tok.tokens, 'pattern': to_javascript(pattern)}
    if tok.kind == 'sentencepiece':
        if tok.precompiled_charsmap:
            obstacle = 'normalization rules (nfkc)'
        elif tok.added_tokens or tok.token_rules or tok.metaspace:
            obstacle = 'added tokens or Metaspace'
        values |= {key: getattr(tok, key) for key in (
            'pieces', 'ranks', 'user_defined_symbols', 'add_dummy_prefix',
            'remove_extra_whitespaces')}
    else:
        if tok.pattern is not None and tok.pattern not in PATTERNS.values():
            obstacle = 'a split pattern of its own'
        elif tok.added_tokens or tok.token_rules:
            obstacle = 'added tokens'
        values |= {'merges': packed([rank for pair in tok._merges.pairs for rank in pair]),
                   'ids': None if tok._ids is None else packed(tok._ids.tolist()),
                   'pattern': None if tok.pattern is None else to_javascript(tok.pattern),
                   'ignore_merges': tok.ignore_merges, 'normalizer': tok.normalizer}
    if obstacle:
        raise UserError(f'{name} has {obstacle}, which the page cannot show as encode() does; '
                        f'expected another tokenizer. In a terminal: python -m tokenizer '
                        f'--tokenizer={name} --text=...')
    return values


def packed(numbers: list[int]) -> str:
    """Write numbers below 2^24 as three bytes each, the lowest first, in base64."""
    in_bytes = np.array(numbers, '<u4').view('u1').reshape(-1, 4)[:, :3]
    return base64.b64encode(in_bytes.tobytes()).decode()


def to_javascript(pattern: str) -> str:
    """Write one of PATTERNS for a JavaScript regular expression with the flag u.

    There \\s has other characters, and older browsers have no (?i:...).
    """
    def spell_out(match):
        content, in_class = [], False
        for char in match[1]:
            in_class = (in_class or char == '[') and char != ']'
            both = {'s': 'sSſ', 'k': 'kKK'}.get(char, char + char.upper())
            content.append(char if not char.isalpha() else both if in_class else f'[{both}]')
        return f'(?:{"".join(content)})'

    pattern = regex.sub(r'\(\?i:([^()]*)\)', spell_out, pattern)
    return pattern.replace(r'\s', r'\p{White_Space}').replace(r'\S', r'\P{White_Space}')
