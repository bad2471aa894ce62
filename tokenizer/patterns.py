"""
Cut text into pieces: split patterns, Unicode versions, special tokens.

    split(text, PATTERNS['gpt4'])      -> pieces that no merge crosses
    split_specials(text, tokens)       -> text, special token, text, ...
    printable(b' the')                 -> 'Ġthe', as tokens stand in files
"""

import functools
import itertools
import math
import unicodedata

import numpy as np
import regex

from configurator import UserError, nearest

# The patterns of published vocabularies. tiktoken writes OpenAI's differently, for the same pieces.
# gpt2: words, numbers and punctuation apart, each with the space before it.
# gpt4 (cl100k_base, Llama 3): numbers of at most three digits; line ends and indentation in runs.
# o200k: words end where a capital follows a small letter.
# qwen2 (Qwen3 too) is gpt4, and smollm2 is gpt2, with every digit apart.
PATTERNS = {
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    'gpt4': (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    'o200k': (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
              r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    'qwen2': (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    # white space before a digit is one piece: there the digit is cut off first
    'smollm2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"}

# SentencePiece trains on such pieces: a space stands only in front, a digit alone.
SENTENCEPIECE = (r' ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+| +(?= (?![\s\p{N}]))'
                 r'| +|\n+|\s')

LINEAR = frozenset([*PATTERNS.values(), SENTENCEPIECE])
LONGEST_PATTERN = 20_000  # characters, with counts written out
PATIENCE, SLOWEST = 5, 500_000  # seconds, and characters a second, for a pattern of your own

# The names of special tokens, where a file does not mark them: <s>, <|im_end|>, [PAD].
SPECIAL = regex.compile(r'<.*\p{L}.*>|\[.*\p{L}.*\]', regex.DOTALL)

# GPT-2's alphabet: every byte as a printable character (Ġ is the space), for tokens in text files.
PRINTABLE = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1),
             *range(ord('®'), ord('ÿ') + 1)]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE}
BYTE_TO_CHAR |= {byte: chr(256 + i)
                 for i, byte in enumerate(byte for byte in range(256) if byte not in BYTE_TO_CHAR)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def printable(token: bytes) -> str:
    """Write a token in GPT-2's alphabet: b' the' -> 'Ġthe'."""
    return ''.join(BYTE_TO_CHAR[byte] for byte in token)


def from_printable(chars: str) -> bytes:
    """Reverse printable(). Raises KeyError for a character outside the alphabet."""
    return bytes(CHAR_TO_BYTE[char] for char in chars)


def to_utf8(text: str) -> bytes:
    """Encode text; half a surrogate pair ("\\ud800") becomes U+FFFD, as in tiktoken."""
    try:
        return text.encode('utf-8')
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode('utf-8')


def code_points(ranges: str) -> list[int]:
    """Return the code points of ranges in hexadecimal, such as '558 58b-58c'."""
    points = []
    for ends in ranges.split():
        first, _, last = ends.partition('-')
        points += range(int(first, 16), int(last or first, 16) + 1)
    return points


# The additions of Unicode 17 and 18. The package regex classifies them as letters, marks, ...;
# tiktoken's engine is at Unicode 16, where they are unassigned. Pieces are cut as there, so that
# ids agree: each counts as U+10FFFF. Unicode 17 also took ʕ from the small letters; it counts as ɐ.
SINCE_UNICODE_16 = """
    558 58b-58c 5c8-5c9 88f b53-b54 c5c cdc 1acf-1af0 208f 209d-209f 20c1-20c4 2b96 2e60-2e63
    a7ce-a7cf a7d2 a7d4 a7dd a7e2 a7f1 ab6c-ab6d fbc3-fbd2 fd90-fd91 fdc8-fdce 107bb-107bf
    10940-10959 10ec5-10ec7 10ec9-10eee 10ef0-10efb 11b0a 11b60-11b67 11db0-11ddb 11de0-11de9
    11df0-11df1 1246f 12475-1247f 12550-12686 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff
    18cd6-18cda 18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1ccfa-1ccfc
    1ceba-1ced0 1ced2-1ced4 1cedd-1cefd 1d127-1d128 1d1eb-1d1ff 1d250-1d281 1d6a6 1db00-1db1c
    1df1f-1df24 1df2b-1df81 1df90-1df96 1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff 1f1ae
    1f6d8-1f6d9 1f777-1f77a 1f7da-1f7db 1f7f1-1f7ff 1f8d0-1f8d8 1fa54-1fa57 1fa8a-1fa8e 1fac8
    1facc-1facd 1fadd 1faea-1faeb 1faef 1faf9-1fafa 1fbfa 2b73a-2b73f 2b81e 2cea2-2cead
    323b0-33479 3d000-3fc3f
"""
AS_IN_UNICODE_16 = dict.fromkeys(code_points(SINCE_UNICODE_16), 0x10FFFF) | {ord('ʕ'): ord('ɐ')}
IS_NEWER = np.zeros(0x110000, dtype=bool)  # by code point
IS_NEWER[list(AS_IN_UNICODE_16)] = True


def has_newer(text: str) -> bool:
    """Return whether text has characters that Unicode 16 classifies differently."""
    if text.isascii():
        return False
    codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
    return bool(IS_NEWER[codes].any())


# Characters that NFC needs and Hugging Face's normalizer, at Unicode 9, lacks: combining
# marks, parts of new compositions, some whole blocks. There such a character neither moves nor
# composes.
SINCE_UNICODE_9 = """
    5c8-5c9 7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba ece 1715 1abf-1af0 1df6-1dfa a82c 105d2 105da
    10d24-10d27 10d69-10d6d 10eab-10eac 10ecb-10ecf 10ef0-10efb 10efc-10eff 10f46-10f50
    10f82-10f85 11070 1133b 11380-113ff 1145e 11839-1183a 11930 11935 1193d-1193e 11943 119e0
    11a34 11a47 11a99 11d42 11d44-11d45 11d97 11f41-11f42 1611e-1612f 16d63-16d6a 16ff0-16ff1
    1d127-1d128 1d250-1d252 1d25b-1d25c 1d25f 1d280-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef
    1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5
"""
LONG_MARKS = regex.compile(r'\p{M}{100,}')
NOT_NORMALIZED = regex.compile(f'([{"".join(map(chr, code_points(SINCE_UNICODE_9)))}])')


def normalize(text: str, form: str | None) -> str:
    """Return text in the normal form 'NFC' of Hugging Face, or None: as it is."""
    if text.isascii():
        return text
    text = to_utf8(text).decode('utf-8')
    if form is None or unicodedata.is_normalized(form, text):
        return text
    return ''.join(map(nfc, NOT_NORMALIZED.split(text)))


def nfc(text: str) -> str:
    """Return text in the normal form NFC. unicodedata alone takes n^2 to sort n marks."""
    return unicodedata.normalize('NFC', LONG_MARKS.sub(sort_marks, text))


def sort_marks(match) -> str:
    """Decompose a match of LONG_MARKS, and bring its marks into their canonical order."""
    chars = ''.join(unicodedata.normalize('NFD', char) for char in match[0])
    runs = itertools.groupby(chars, lambda char: unicodedata.combining(char) > 0)
    return ''.join(char for _, run in runs for char in sorted(run, key=unicodedata.combining))


def find_pattern(pattern: str | None) -> str | None:
    """Return the regular expression of a name in PATTERNS, or `pattern` itself.

    Raises UserError for an unknown name and for text that is no regular expression.
    """
    if pattern is None or pattern in PATTERNS:
        return PATTERNS.get(pattern)
    if isinstance(pattern, str) and regex.fullmatch(r'[\w.-]*', pattern):
        raise UserError(f'unknown split pattern {pattern!r}; expected one of '
                        f'{", ".join(PATTERNS)}, none, or a regular expression'
                        f'{nearest(pattern, PATTERNS)}')
    compile_pattern(pattern)
    return pattern


@functools.cache
def compile_pattern(pattern: str):
    """Compile a split pattern. Raises UserError."""
    try:
        # a{1000} is compiled as a thousand parts
        counts = regex.findall(r'\{\s*(\d{1,9})', pattern)
        size = len(pattern) * math.prod(int(n) or 1 for n in counts)
        if size > LONGEST_PATTERN:
            fault = (f'takes {size:,} characters without its counts, such as {{2}}; expected '
                     f'{LONGEST_PATTERN:,} or fewer')
        elif regex.search(r'\(\?(?:R|[+-]?\d|&|P>)', pattern):
            fault = 'calls itself or a group of its own'
        else:
            compiled = regex.compile(pattern)
            if not compiled.flags & regex.REVERSE:
                return compiled
            fault = 'reads text backwards (flag r)'
    except (regex.error, TypeError, ValueError, RecursionError) as error:
        fault = f'is not a regular expression: {error}'
    raise bad_pattern(pattern, fault)


def bad_pattern(pattern, fault) -> UserError:
    """Return the error for a split pattern."""
    shown = repr(pattern if len(str(pattern)) <= 300 else f'{pattern[:300]}...')
    return UserError(f'the split pattern {shown} {fault}. Expected one of {", ".join(PATTERNS)}, '
                     f'none, or a pattern of the package regex')


def split(text: str, pattern: str | None) -> list[str]:
    """Cut text into pieces, which joined are the text again. pattern None: one piece.

    Text between the matches of a pattern becomes pieces too, so that nothing is lost. Raises
    UserError where a pattern takes exponential time, as (a|a)*b does.
    """
    if pattern is None:
        return [text] if text else []
    compiled, newer = compile_pattern(pattern), has_newer(text)
    # a time limit makes cutting three times slower; the patterns above need none
    seconds = None if pattern in LINEAR else PATIENCE + len(text) / SLOWEST
    try:
        if not newer:
            pieces = compiled.findall(text, timeout=seconds)
            if compiled.groups == 0 and sum(map(len, pieces)) == len(text) and '' not in pieces:
                return pieces  # always so with the patterns above
        ends = [0]
        for match in compiled.finditer(text.translate(AS_IN_UNICODE_16) if newer else text,
                                       timeout=seconds):
            ends += match.span()
    except TimeoutError:
        raise bad_pattern(pattern, f'took over {seconds:.3g} s to cut {len(text):,} characters; it '
                                   f'tries too many ways') from None
    ends.append(len(text))
    return [text[start:end] for start, end in itertools.pairwise(ends) if start < end]


def split_specials(text: str, special_tokens) -> list[str]:
    """Cut text at its special tokens, the odd elements; of two at a place the longer one."""
    if not special_tokens:
        return [text]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.split('(' + '|'.join(map(regex.escape, longest_first)) + ')', text)


def batches(items, enough: int, length=len):
    """Yield lists of items; each but the last has a total length of `enough`."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += length(item)
        if size >= enough:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
