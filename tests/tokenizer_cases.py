"""Texts and tokenizers that the tests of tokenizer/ share."""

import functools
import random
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st

import tokenizer
from tokenizer import BPETokenizer

MIXED = 'Hello, wörld!\n\t日本語 🙂 e\u0301 <|endoftext|> \x00 end'
CODE = ''.join(path.read_text(encoding='utf-8')
               for path in sorted(Path(tokenizer.__file__).parent.glob('*.py')))[:80_000]
PROSE = ('Ein Zaun, l’été, can’t: 12 345 Äpfel; the cat, the hat, the rat; to be or not to be. '
         'Ein Zaun! ')
# the second has a space in it, at which text could be cut
EOT, USER = '<|endoftext|>', '<|user says|>'
HARD = [
    '', ' ', '\n', 'Hello world', "I'll, I'LL, it'ſ, we'Ve, THEY'RE, '\u212a'K, l'été, 's 'Ll '",
    'a' * 3000,
    ' ' * 2000 + 'x', 'a\r\nb\rc\n\n\n  \n d \t\t e  \r\n\r\n', '1234567890 12 3٣٤٥ Ⅷ ½ ² 3.14',
    '안녕하세요 세계! \u1100\u1161\u11a8 각', '日本語のテキスト、中文文本。', 'Здравствуй, мир',
    'שָׁלוֹם עולם',
    'नमस्ते दुनिया', 'e\u0301 ﬁ ß İ ŉ ǅ ʕ ʔ', '\u1c89\ua7ce\U0001fac8 \u088f',
    '🙂👩\u200d👩\u200d👧\u200d👦 🇩🇪🏳️\u200d🌈',
    '\x00\x01\x0b\x0c\x1c\x1f\x7f\x85\xa0\u2028\u3000\ufeff\uffff \u200b x', '\U0010ffff\ue000',
    'HTTPServer CamelCase snake_case __init__ !!!...???///\n/', 'a\ud800b\udc00', MIXED,
    CODE[:20_000],
]
# characters at which pieces end or go on, and what is special
BORDERS = [*" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000'’sſStTeEvVdDK09٣½²aAéÉßǅʰªЖжʕ",
           *'中각ि́🙂_-/.!<|>\ua7ce', '\r\n', '  ', 'the', ' the', EOT, USER, '<|endof', 'says|>',
           '<|user ']
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(BORDERS),
                                                 max_size=60).map(''.join))
many = settings(database=None, derandomize=True, deadline=None)  # the same examples everywhere


def train(pattern, vocab_size=600):
    texts = [CODE, *map(readable, HARD)]
    return BPETokenizer.train(texts, vocab_size, pattern, [EOT, USER], workers=1)


@functools.cache
def make_trained():
    """A BPE tokenizer of every sort, by name."""
    toks = {name: train(name) for name in ('gpt2', 'gpt4', 'o200k', None)}
    # with groups, and text in between that it does not match
    toks['own pattern'] = train(r'\w+|(\d)(\s)', 500)
    values = toks['gpt4'].to_dict()
    shuffled = random.Random(0).sample(range(1000), len(values['merges']) + 258)
    toks['other ids'] = tokenizer.from_dict({
        **values, 'byte_ids': shuffled[:256], 'merge_ids': shuffled[258:],
        'special_tokens': {EOT: shuffled[256], USER: shuffled[257]}})
    toks['whole pieces'] = tokenizer.from_dict({**values, 'ignore_merges': True})
    toks['no merges'] = BPETokenizer([])
    return toks


def readable(text):
    """text with U+FFFD for half surrogates, which UTF-8 does not have."""
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def same_everywhere(tok, text):
    """encode, encode_array and both decodes agree with each other, and with the text."""
    ids = tok.encode(text, 'none')
    assert isinstance(ids, list) and all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
    array = tok.encode_array(text)
    assert array.dtype == tokenizer.id_dtype(tok.vocab_size)
    assert array.tolist() == ids
    assert tok.decode(ids) == tok.decode(array) == readable(text)
    assert tok.decode_bytes(ids) == readable(text).encode()
