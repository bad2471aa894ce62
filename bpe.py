"""Byte pair encoding: the algorithm behind GPT-2's and GPT-4's tokens.

Start with the 256 bytes. Find the pair of neighbours that occurs most often, give it an id of its own, write that id
wherever the pair stood, and begin again: a compression scheme of Gage (1994), for words by Sennrich et al. (2016), on
bytes by GPT-2 (Radford et al. 2019). What has been learnt is the list of merges. A new text is encoded by the same
joins in the same order.

    count_pieces(texts, pattern, ...)   text -> {piece: how often}, on all cores
    learn(counts, n)                    {piece: how often} -> n merges
    Merges(pairs).join(piece)           the bytes of one piece -> ids
    recover_merges(ranks)               the merges behind a vocabulary that has only ids, as tiktoken's files do

A piece is what the pattern cuts out of the text, about a word; merges never cross its ends. Inside this file ids are
plain: 0 to 255 the bytes, 256 + i the i-th merge. tokenizer.py has the face to the rest of the program.
"""

import contextlib
import difflib
import functools
import heapq
import importlib.util
import itertools
import math
import os
import sys
import tempfile
import unicodedata
from array import array
from collections import Counter, defaultdict

import numpy as np
import regex
from tqdm import tqdm

from workers import Workers, core_count

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

BATCH_CHARS = 1 << 21  # of text that a process counts in one go


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


# ----------------------------------------------------------------------------------------------------------------------
# text into pieces

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
        raise ValueError(f'unknown split pattern {pattern!r}; expected one of {", ".join(PATTERNS)}, none, or a '
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
        raise ValueError(f'the split pattern {pattern!r} {wrong}. Expected one of {", ".join(PATTERNS)}, none, or a '
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


# ----------------------------------------------------------------------------------------------------------------------
# learning merges

def count_pieces(texts, pattern: str | None, special_tokens=(), workers: int | None = None) -> Counter:
    """How often each piece occurs in texts, an iterable of strings. No piece crosses the end of a text, or a special
    token, which itself is not counted.

    Memory is that of the distinct pieces (about 100 bytes each; without a pattern they are the texts themselves),
    however long the texts. Beyond a few MB, `workers` processes count (default: one per core); their number
    does not change the result.
    """
    count = functools.partial(count_batch, pattern=pattern, special_tokens=tuple(special_tokens))
    total = Counter()
    bar = tqdm(desc='counting', unit='char', unit_scale=True, disable=None, leave=False, dynamic_ncols=True)
    with bar, Workers(workers or core_count()) as pool:
        parts = batches(texts, BATCH_CHARS)
        alone = parts if pool.count == 1 else itertools.islice(parts, 1)  # a short text, before processes have started
        for part, counts in itertools.chain(((part, count(part)) for part in alone), pool.map(count, parts)):
            total.update(counts)
            bar.update(sum(map(len, part)))
    return total


def count_batch(texts: list[str], pattern, special_tokens) -> Counter:
    """The pieces of a few texts, counted."""
    counts = Counter()
    for text in texts:
        for part in split_specials(text, special_tokens)[::2]:
            counts.update(split(part, pattern))
    return counts


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


def learn(counts: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """The first n_merges merges for pieces that occur so often: (left id, right id); the i-th makes id 256 + i.

    Each merge joins the pair that occurs most often; of several, the one with the smallest left id, then right id. So
    the result depends on nothing but the counts. May be shorter, when all pieces have become one id each.

    Cost: a pair's places are kept in a list, so a merge touches only what it changes, and in all as many places as the
    distinct pieces have bytes, at most. Counting all pairs anew for each merge would read the whole text 8,000 times.
    """
    # All distinct pieces end to end, with an END behind each, as a linked list: a merge writes the new id over the left
    # of its two places and takes the right one out.
    END, GONE = -1, -2
    ids, weight = array('i'), array('q')  # weight: how often the piece occurs that this place is in
    for piece, count in counts.items():
        utf8 = piece.encode('utf-8')
        ids.extend(utf8)
        ids.append(END)
        weight.extend([count] * (len(utf8) + 1))
    ids.append(END)  # the left neighbour of the first place, -1, is this one
    previous = array('i', range(-1, len(ids) - 1))
    following = array('i', range(1, len(ids) + 1))

    pair_count, places = defaultdict(int), defaultdict(lambda: array('i'))
    for i in range(len(weight)):
        left, right = ids[i], ids[i + 1]
        if left >= 0 and right >= 0:
            pair_count[left, right] += weight[i]
            places[left, right].append(i)

    # The most frequent pair is on top. Once counted, a pair only ever becomes rarer (its ids are being merged away):
    # so an outdated entry promises too much, comes up too early, and is put back with its true count.
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    merges = []
    bar = tqdm(desc='merging', total=n_merges, disable=None, leave=False, dynamic_ncols=True)
    while heap and len(merges) < n_merges:
        promised, pair = heapq.heappop(heap)
        count = pair_count[pair]
        if count == 0:
            continue
        if count != -promised:
            heapq.heappush(heap, (-count, pair))
            continue
        left, right = pair
        new = 256 + len(merges)
        merges.append(pair)
        changed = set()
        for i in sorted(places.pop(pair)):  # from left to right: aaa becomes (aa)a
            j = following[i]
            if ids[i] != left or ids[j] != right:  # merged into something else since
                continue
            before, after = previous[i], following[j]
            n = weight[i]
            if ids[before] >= 0:  # (before, left) becomes (before, new)
                pair_count[ids[before], left] -= n
                pair_count[ids[before], new] += n
                places[ids[before], new].append(before)
                changed.add((ids[before], new))
            if ids[after] >= 0:
                pair_count[right, ids[after]] -= n
                pair_count[new, ids[after]] += n
                places[new, ids[after]].append(i)
                changed.add((new, ids[after]))
            ids[i], ids[j] = new, GONE
            following[i], previous[after] = after, i
        del pair_count[pair]
        for pair in changed:
            heapq.heappush(heap, (-pair_count[pair], pair))
        bar.update()
    bar.close()
    return merges


def has_gigatoken() -> bool:
    """True where the package gigatoken, the accelerator of training and encoding, is installed."""
    return importlib.util.find_spec('gigatoken') is not None


def learn_with_gigatoken(texts, n_merges: int, special_tokens=()) -> list[tuple[bytes, bytes]]:
    """count_pieces() with GPT-2's pattern, the only one gigatoken trains with, and learn(), in Rust: the same merges.

    texts go through a file in the folder for temporary ones (the variable TMPDIR), so that memory stays small. Where
    gigatoken (0.10) would find other merges, it is not asked: it is at Unicode 17; and when all pieces have become one
    id each, it goes on with pairs that occur nowhere, which cannot happen with more distinct pieces than merges and
    bytes.
    """
    import gigatoken
    separator = b'\xff'  # in no UTF-8 text
    pieces, enough, newer = set(), n_merges + 256, False
    bar = tqdm(desc='reading', unit='char', unit_scale=True, disable=None, leave=False, dynamic_ncols=True)
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, 'texts'), 'w+b') as file, bar:
        try:
            for text in texts:
                for part in split_specials(text, special_tokens)[::2]:
                    file.write(part.encode('utf-8') + separator)
                    newer = newer or has_newer(part)
                    if len(pieces) <= enough:
                        pieces.update(split(part, PATTERNS['gpt2']))
                bar.update(len(text))
            file.flush()
        except OSError as error:
            raise ValueError(f'the text to train on could not be written to {folder} ({error.strerror}); set TMPDIR to '
                             f'a folder on a larger disk') from None
        if newer or len(pieces) <= enough:
            file.seek(0)
            return in_bytes(learn(count_pieces(read_separated(file, separator), PATTERNS['gpt2']), n_merges))
        with silenced():
            source = gigatoken.TextFileSource([file.name], separator=separator)
            _, merges = gigatoken.train_bpe(source, 256 + n_merges, [], tie_breaking='raw_token_ids')
    return merges


def read_separated(file, separator: bytes):
    """Yield the texts of a file, each of which ends with the separator."""
    rest = b''
    while block := file.read(1 << 20):
        *texts, rest = (rest + block).split(separator)
        for text in texts:
            yield text.decode('utf-8')


@contextlib.contextmanager
def silenced():
    """Nothing from C or Rust reaches the terminal meanwhile; gigatoken tells what it does on stdout."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------------
# encoding

NO_MERGE = 1 << 60  # greater than every id
LONG = 1000         # bytes; up to here the plain way is faster


class Merges:
    """Learnt merges, ready to encode with: pairs[i] = (left id, right id) makes id 256 + i."""

    def __init__(self, pairs):
        self.pairs = list(pairs)
        self.id_of_pair = {pair: 256 + i for i, pair in enumerate(self.pairs)}

    def join(self, piece: bytes) -> list[int]:
        """The ids of one piece.

        Joins, again and again, the pair that was learnt first. Looking at all n pairs for each of up to n joins is
        quadratic, which for a word's few bytes is the fastest way; long pieces take join_long().
        """
        if len(piece) > LONG:
            return self.join_long(piece)
        ids = list(piece)
        joined = [self.id_of_pair.get(pair, NO_MERGE) for pair in itertools.pairwise(ids)]  # by ids[i], ids[i+1]
        while joined and (first := min(joined)) != NO_MERGE:
            i = joined.index(first)
            ids[i:i + 2] = [first]
            del joined[i]
            if i > 0:
                joined[i - 1] = self.id_of_pair.get((ids[i - 1], first), NO_MERGE)
            if i < len(joined):
                joined[i] = self.id_of_pair.get((first, ids[i + 1]), NO_MERGE)
        return ids

    @functools.cached_property
    def sorted_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The pairs as numbers left << 32 | right, ascending, and their ids: a table to look many pairs up at once."""
        keys = np.array([left << 32 | right for left, right in self.pairs], dtype=np.int64)
        order = np.argsort(keys)
        return keys[order], 256 + order

    def join_long(self, piece: bytes) -> list[int]:
        """join() for pieces of any length: time grows with the length (times its logarithm), not with its square.

        A merge at a time, in the order they were learnt, at all its places at once. Only merges whose pair stands
        somewhere in the piece are visited: a heap holds them, and joins bring new pairs about.
        """
        n = len(piece)
        keys, ids_of_keys = self.sorted_pairs
        # A linked list of places, with place n behind the last: its id is -1, which no pair has; so is a joined one's.
        ids = np.append(np.frombuffer(piece, dtype=np.uint8).astype(np.int64), -1)
        previous, following = np.arange(-1, n), np.append(np.arange(1, n + 1), n)
        places, heap = {}, []  # id that a merge makes -> arrays of the places where its pair begins

        def enter(at):
            """Sort the pairs that begin at these places under the merges that join them."""
            key = ids[at] << 32 | ids[following[at]]
            found = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            known = keys[found] == key  # never with an id -1: keys are positive
            at, new = at[known], ids_of_keys[found[known]]
            order = np.argsort(new, kind='stable')
            at, new = at[order], new[order]
            bounds = [*np.flatnonzero(np.diff(new, prepend=-1)).tolist(), len(new)]
            for start, end in itertools.pairwise(bounds):
                first = int(new[start])
                if first not in places:
                    places[first] = []
                    heapq.heappush(heap, first)
                places[first].append(at[start:end])

        if len(keys):
            enter(np.arange(n))
        while heap:
            new = heapq.heappop(heap)
            left, right = self.pairs[new - 256]
            at = np.sort(np.concatenate(places.pop(new)))
            at = at[(ids[at] == left) & (ids[following[at]] == right)]  # the others have been joined otherwise since
            if left == right:  # of a run like aaaaa: the first two, the next two, ...
                index = np.arange(len(at))
                run_start = np.maximum.accumulate(np.where(np.append(-1, following[at[:-1]]) == at, 0, index))
                at = at[(index - run_start) % 2 == 0]
            gone = following[at]
            after = following[gone]
            ids[at], ids[gone] = new, -1
            following[at], previous[after] = after, at
            before = previous[at]
            enter(np.concatenate([at, before[(before >= 0) & (ids[before] != new)]]))
        return ids[ids >= 0].tolist()


def token_bytes(pairs) -> list[bytes]:
    """The bytes of every id: of the 256 bytes, then of the merges."""
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in pairs:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def in_bytes(pairs) -> list[tuple[bytes, bytes]]:
    """Merges of ids as merges of the bytes that they stand for."""
    tokens = token_bytes(pairs)
    return [(tokens[left], tokens[right]) for left, right in pairs]


def final_parts(token: bytes, rank) -> list[bytes]:
    """What the bytes of token are joined to, before the last join that would make them the token.

    rank(left, right) orders the joins, the lowest first; math.inf: no such join.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    ranks = [rank(left, right) for left, right in itertools.pairwise(parts)]
    while len(parts) > 2:
        first = min(ranks)
        if first == math.inf:
            break
        i = ranks.index(first)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del ranks[i]
        if i > 0:
            ranks[i - 1] = rank(parts[i - 1], parts[i])
        if i < len(ranks):
            ranks[i] = rank(parts[i], parts[i + 1])
    return parts


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a vocabulary {token: rank}, such as tiktoken's, in their order.

    tiktoken joins any two neighbours that together are a token, the one of lowest rank first. So a token's merge joins
    the two that its own bytes have been joined to just before. A token whose bytes never come to that, because it
    is only ever taken as a whole piece, has no merge.
    """
    def rank(left, right):
        return ranks.get(left + right, math.inf)

    several = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    return [tuple(parts) for parts in (final_parts(token, rank) for token in several) if len(parts) == 2]
