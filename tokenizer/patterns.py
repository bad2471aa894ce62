import difflib
import functools
import itertools
import unicodedata

import numpy as np
import regex

from configurator import UserError

# The patterns of OpenAI's vocabularies; tiktoken spells them in another way, for the same pieces. gpt2 keeps words
# apart from numbers and from punctuation, with the space before each; gpt4 (cl100k_base, Llama 3) also cuts numbers
# after three digits, and takes runs of line ends and of indentation whole; o200k cuts words where capitals follow small
# letters. Of others: qwen2 (and Qwen3) is gpt4 with every digit apart, smollm2 is gpt2 with every digit apart.
PATTERNS = {
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    'gpt4': (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
    'o200k': (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    'qwen2': (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"),
    # white space before a digit is one piece, as the digit is cut off before the rest is looked at
    'smollm2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
# Every byte as a printable character, so that tokens can stand in a text file: GPT-2's alphabet, with Ġ for a space.
PRINTABLE = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE}
BYTE_TO_CHAR |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_utf8(text: str) -> bytes:
    """UTF-8 bytes of text. Half a surrogate pair (JSON's "\\ud800") has none and becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode('utf-8')
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode('utf-8')


def printable(token: bytes) -> str:
    """A token in GPT-2's alphabet: b' the' -> 'Ġthe'."""
    return ''.join(BYTE_TO_CHAR[byte] for byte in token)


def from_printable(chars: str) -> bytes:
    """The reverse of printable(); KeyError for a character that stands for no byte."""
    return bytes(CHAR_TO_BYTE[char] for char in chars)


# What came with Unicode 17 and 18, in ranges. `regex` learns each new Unicode at once, tiktoken's engine is at 16, to
# which these are no letters; so that ids agree, pieces are cut as if they were U+10FFFF, which is unassigned. And ʕ,
# which Unicode 17 moved from the small letters to those without case, is cut as another small one.
SINCE_UNICODE_16 = """
    558 58b-58c 5c8-5c9 88f b53-b54 c5c cdc 1acf-1af0 208f 209d-209f 20c1-20c4 2b96 2e60-2e63 a7ce-a7cf a7d2 a7d4 a7dd
    a7e2 a7f1 ab6c-ab6d fbc3-fbd2 fd90-fd91 fdc8-fdce 107bb-107bf 10940-10959 10ec5-10ec7 10ec9-10eee 10ef0-10efb 11b0a
    11b60-11b67 11db0-11ddb 11de0-11de9 11df0-11df1 1246f 12475-1247f 12550-12686 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6
    187f8-187ff 18cd6-18cda 18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1ccfa-1ccfc 1ceba-1ced0
    1ced2-1ced4 1cedd-1cefd 1d127-1d128 1d1eb-1d1ff 1d250-1d281 1d6a6 1db00-1db1c 1df1f-1df24 1df2b-1df81 1df90-1df96
    1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff 1f1ae 1f6d8-1f6d9 1f777-1f77a 1f7da-1f7db 1f7f1-1f7ff 1f8d0-1f8d8
    1fa54-1fa57 1fa8a-1fa8e 1fac8 1facc-1facd 1fadd 1faea-1faeb 1faef 1faf9-1fafa 1fbfa 2b73a-2b73f 2b81e 2cea2-2cead
    323b0-33479 3d000-3fc3f
""".split()


def char_class(ranges: list[str]) -> str:
    """A regular expression for one of the characters in ranges of code points, such as 558 or 58b-58c."""
    return '[' + ''.join('-'.join(rf'\U{int(end, 16):08x}' for end in ends.split('-')) for ends in ranges) + ']'


NEWER = regex.compile(char_class(SINCE_UNICODE_16))
IS_NEWER = np.zeros(0x110000, dtype=bool)  # by code point, ʕ too
for ends in [*SINCE_UNICODE_16, '295']:
    IS_NEWER[int(ends.split('-')[0], 16):int(ends.split('-')[-1], 16) + 1] = True


def has_newer(text: str) -> bool:
    """Whether text has characters that other versions of Unicode cut otherwise; 300 times as fast as NEWER.search()."""
    return not text.isascii() and bool(
        IS_NEWER[np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')].any())


# What matters to NFC and came after Unicode 9, with which Hugging Face's libraries normalize: combining marks, the
# parts of new compositions and, where these are many, their blocks. There such a character neither moves nor composes.
SINCE_UNICODE_9 = """
    5c8-5c9 7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba ece 1715 1abf-1af0 1df6-1dfa a82c 105d2 105da 10d24-10d27
    10d69-10d6d 10eab-10eac 10ecb-10ecf 10ef0-10efb 10efc-10eff 10f46-10f50 10f82-10f85 11070 1133b 11380-113ff 1145e
    11839-1183a 11930 11935 1193d-1193e 11943 119e0 11a34 11a47 11a99 11d42 11d44-11d45 11d97 11f41-11f42 1611e-1612f
    16d63-16d6a 16ff0-16ff1 1d127-1d128 1d250-1d252 1d25b-1d25c 1d25f 1d280-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef
    1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5
""".split()
NOT_NORMALIZED = regex.compile(f'({char_class(SINCE_UNICODE_9)})')


def normalize(text: str, form: str | None) -> str:
    """text in the normal form 'NFC', in which é is one character; None: as it is. Whatever Unicode this Python knows,
    the result is that of Hugging Face's libraries."""
    if form is None or text.isascii() or unicodedata.is_normalized(form, text):
        return text
    return ''.join(unicodedata.normalize(form, part) for part in NOT_NORMALIZED.split(text))


def find_pattern(pattern: str | None) -> str | None:
    """The regular expression that pattern is, or is the name of; None stays None. ValueError when it is neither."""
    if isinstance(pattern, str) and pattern not in PATTERNS and regex.fullmatch(r'[\w.-]*', pattern):
        near = difflib.get_close_matches(pattern, PATTERNS, n=1, cutoff=0.5)
        raise UserError(f'unknown split pattern {pattern!r}; expected one of {", ".join(PATTERNS)}, none, or a '
                         f'regular expression' + (f' (did you mean {near[0]}?)' if near else ''))
    pattern = PATTERNS.get(pattern, pattern)
    if pattern is not None:
        compile_pattern(pattern)
    return pattern


@functools.cache
def compile_pattern(pattern: str):
    """The compiled pattern; ValueError when it is not a regular expression, or one that finds the last piece first."""
    try:
        compiled = regex.compile(pattern)
        wrong = 'reads text backwards, by its flag r' if compiled.flags & regex.REVERSE else None
    except (regex.error, TypeError) as error:
        wrong = f'is not a regular expression: {error}'
    if wrong:
        raise UserError(f'the split pattern {pattern!r} {wrong}. Expected one of {", ".join(PATTERNS)}, none, or a '
                         f'pattern of the package regex')
    return compiled


def split(text: str, pattern: str | None) -> list[str]:
    """The pieces of text, which joined are the text again; None: all of it is one piece.

    Text that a pattern of one's own does not match becomes pieces too, so that nothing is lost.
    """
    if pattern is None:
        return [text] if text else []
    compiled = compile_pattern(pattern)
    places = NEWER.sub('\U0010ffff', text).replace('\u0295', '\u0250') if has_newer(text) else text
    if places is text:
        pieces = compiled.findall(text)
        if compiled.groups == 0 and sum(map(len, pieces)) == len(text) and '' not in pieces:
            return pieces  # always so with the patterns above
    ends = [0]
    for match in compiled.finditer(places):
        ends += [match.start(), match.end()]
    ends.append(len(text))
    return [text[start:end] for start, end in itertools.pairwise(ends) if start < end]


def split_specials(text: str, special_tokens) -> list[str]:
    """Cut text at its special tokens: odd elements are special tokens, even ones the (maybe empty) text between them.

    Where two could start at the same place, the longer one is taken.
    """
    if not special_tokens:
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split('(' + '|'.join(map(regex.escape, longest_first)) + ')', text)


def batches(items, enough: int, length=len):
    """Yield lists of items, in order, whose lengths together are at least `enough` (of the last list, maybe less)."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += length(item)
        if size >= enough:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
