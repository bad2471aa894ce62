"""
Encode by byte pairs: the algorithm behind GPT-2's and GPT-4's tokens.

Training starts with the 256 bytes. It finds the most frequent pair of neighbours, gives it a new
id, writes that id in place of the pair, and repeats. The result is the list of merges; new text
is encoded by the same merges in the same order. Gage (1994) compressed files like this, Sennrich et
al. (2016) cut words into subwords, and GPT-2 (Radford et al. 2019) worked on bytes.

    count_pieces(texts, pattern)       text -> {piece: count}, on all cores
    learn(counts, n_merges)            {piece: count} -> merges
    Merges(pairs).join(piece)          the bytes of one piece -> ids
    recover_merges(ranks)              {token: rank}, as in tiktoken's files -> merges

A piece is about a word: split() cuts text into pieces, and no merge crosses their ends. Ids in this
file: 0 to 255 are the bytes, 256 + i is the token of the i-th merge.
"""

import functools
import heapq
import itertools
import math
from array import array
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

from tokenizer.patterns import batches, split, split_specials
from tokenizer.workers import Workers, core_count

BATCH_CHARS = 1 << 21  # characters that a process counts at a time


def count_pieces(texts, pattern: str | None, special_tokens=(), workers=None) -> Counter:
    """Count the pieces of texts, an iterable of strings.

    No piece crosses the end of a text or a special token; special tokens are not counted. Memory
    holds the distinct pieces, about 100 bytes each. workers: processes (None: one per core); their
    number does not change the result.
    """
    count = functools.partial(count_batch, pattern=pattern, special_tokens=tuple(special_tokens))
    total = Counter()
    bar = tqdm(desc='counting', unit='char', unit_scale=True, disable=None, leave=False,
               dynamic_ncols=True)
    with bar, Workers(workers or core_count()) as pool:
        parts = batches(texts, BATCH_CHARS)
        # the first part is counted here: a short text needs no processes
        alone = parts if pool.count == 1 else itertools.islice(parts, 1)
        counted = itertools.chain(((part, count(part)) for part in alone), pool.map(count, parts))
        for part, counts in counted:
            total.update(counts)
            bar.update(sum(map(len, part)))
    return total


def count_batch(texts: list[str], pattern, special_tokens) -> Counter:
    """Count the pieces of a few texts."""
    counts = Counter()
    for text in texts:
        for part in split_specials(text, special_tokens)[::2]:
            counts.update(split(part, pattern))
    return counts


def utf8_of(piece: str) -> bytes:
    """Spell a piece as bytes."""
    return piece.encode('utf-8')


def learn(counts: dict[str, int], n_merges: int, spell=utf8_of,
          n_symbols: int = 256) -> list[tuple[int, int]]:
    """Learn n_merges merges from {piece: count}; fewer when every piece is one id.

    Returns pairs (left id, right id); the i-th makes the id n_symbols + i. Of equally frequent
    pairs the one with the smaller left id is merged first, then the smaller right id.
    spell(piece): its symbols, ids below n_symbols; no merge crosses a negative one.

    Cost: the places of each pair are kept in a list, so a merge touches only its own places. In
    all, merges touch at most as many places as the distinct pieces have bytes.
    """
    # All pieces end to end, with END behind each, as a linked list: a merge writes the new id over
    # the left of its two places and takes the right one out.
    END, GONE = -1, -2
    ids, weight = array('i'), array('q')  # weight: the count of the piece around a place
    for piece, count in counts.items():
        symbols = spell(piece)
        ids.extend(symbols)
        ids.append(END)
        weight.extend([count] * (len(symbols) + 1))
    ids.append(END)  # place -1, the left neighbour of the first place
    previous = array('i', range(-1, len(ids) - 1))
    following = array('i', range(1, len(ids) + 1))

    pair_count, places = defaultdict(int), defaultdict(lambda: array('i'))
    for i in range(len(weight)):
        left, right = ids[i], ids[i + 1]
        if left >= 0 and right >= 0:
            pair_count[left, right] += weight[i]
            places[left, right].append(i)

    # The most frequent pair is on top of the heap. Once entered, a pair's count only falls, as its
    # ids are merged away: an outdated entry comes up too early and is put back with its true count.
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    merges = []
    bar = tqdm(desc='merging', total=n_merges, disable=None, leave=False, dynamic_ncols=True)
    while heap and len(merges) < n_merges:
        negative_count, pair = heapq.heappop(heap)
        count = pair_count[pair]
        if count == 0:
            continue
        if count != -negative_count:
            heapq.heappush(heap, (-count, pair))
            continue
        left, right = pair
        new = n_symbols + len(merges)
        merges.append(pair)
        changed = set()
        for i in sorted(places.pop(pair)):  # from left to right: aaa becomes (aa)a
            j = following[i]
            if ids[i] != left or ids[j] != right:  # an earlier merge has taken one of them
                continue
            before, after = previous[i], following[j]
            if ids[before] >= 0:  # (before, left) becomes (before, new)
                pair_count[ids[before], left] -= weight[i]
                pair_count[ids[before], new] += weight[i]
                places[ids[before], new].append(before)
                changed.add((ids[before], new))
            if ids[after] >= 0:  # (right, after) becomes (new, after)
                pair_count[right, ids[after]] -= weight[i]
                pair_count[new, ids[after]] += weight[i]
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


NO_MERGE = 1 << 60  # greater than every id
LONG = 1000         # bytes; join() is faster up to here, join_long() beyond
MOST_SQUARES = 10**8  # of the lengths of all tokens; published vocabularies have 2 * 10**7


class Merges:
    """Encode by merges: pairs[i] = (left id, right id) makes the id 256 + i."""

    def __init__(self, pairs):
        self.pairs = list(pairs)
        self.id_of_pair = {pair: 256 + i for i, pair in enumerate(self.pairs)}

    def join(self, piece: bytes) -> list[int]:
        """Encode one piece: join the pair that was learnt first, and repeat.

        It looks at all pairs for each join. That is quadratic, and fastest for the few bytes of a
        word; long pieces take join_long().
        """
        if len(piece) > LONG:
            return self.join_long(piece)
        ids = list(piece)
        new_ids = [self.id_of_pair.get(pair, NO_MERGE) for pair in itertools.pairwise(ids)]
        while new_ids and (first := min(new_ids)) != NO_MERGE:
            i = new_ids.index(first)
            ids[i:i + 2] = [first]
            del new_ids[i]
            if i > 0:
                new_ids[i - 1] = self.id_of_pair.get((ids[i - 1], first), NO_MERGE)
            if i < len(new_ids):
                new_ids[i] = self.id_of_pair.get((first, ids[i + 1]), NO_MERGE)
        return ids

    @functools.cached_property
    def sorted_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs as ascending numbers left << 32 | right, and their ids."""
        keys = np.array([left << 32 | right for left, right in self.pairs], dtype=np.int64)
        order = np.argsort(keys)
        return keys[order], 256 + order

    def join_long(self, piece: bytes) -> list[int]:
        """Encode a long piece in time n log n.

        It does one merge at a time, in the order they were learnt, at all places at once. A heap
        holds the merges whose pair stands in the piece; joins add to it.
        """
        n = len(piece)
        keys, key_ids = self.sorted_pairs
        # A linked list of places. Place n, behind the last, and joined places have the id -1, which
        # no pair has.
        ids = np.append(np.frombuffer(piece, dtype=np.uint8).astype(np.int64), -1)
        previous, following = np.arange(-1, n), np.append(np.arange(1, n + 1), n)
        places, heap = {}, []  # new id -> arrays of the places where its pair begins

        def enter(starts):
            """Sort the pairs that begin at these places under the merges that join them."""
            pair_keys = ids[starts] << 32 | ids[following[starts]]
            rows = np.minimum(np.searchsorted(keys, pair_keys), len(keys) - 1)
            is_pair = keys[rows] == pair_keys
            starts, new_ids = starts[is_pair], key_ids[rows[is_pair]]
            order = np.argsort(new_ids, kind='stable')
            starts, new_ids = starts[order], new_ids[order]
            bounds = [*np.flatnonzero(np.diff(new_ids, prepend=-1)).tolist(), len(new_ids)]
            for begin, end in itertools.pairwise(bounds):
                new = int(new_ids[begin])
                if new not in places:
                    places[new] = []
                    heapq.heappush(heap, new)
                places[new].append(starts[begin:end])

        if len(keys):
            enter(np.arange(n))
        while heap:
            new = heapq.heappop(heap)
            left, right = self.pairs[new - 256]
            starts = np.sort(np.concatenate(places.pop(new)))
            # earlier merges have taken some of these pairs apart
            starts = starts[(ids[starts] == left) & (ids[following[starts]] == right)]
            if left == right:  # in a run like aaaaa: the first two, the next two, ...
                index = np.arange(len(starts))
                continues = np.append(-1, following[starts[:-1]]) == starts
                run_start = np.maximum.accumulate(np.where(continues, 0, index))
                starts = starts[(index - run_start) % 2 == 0]
            gone = following[starts]
            after = following[gone]
            ids[starts], ids[gone] = new, -1
            following[starts], previous[after] = after, starts
            before = previous[starts]
            enter(np.concatenate([starts, before[(before >= 0) & (ids[before] != new)]]))
        return ids[ids >= 0].tolist()


def token_bytes(pairs) -> list[bytes]:
    """Return the bytes of every id: the 256 bytes, then the tokens of the merges."""
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in pairs:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def in_bytes(pairs) -> list[tuple[bytes, bytes]]:
    """Turn merges of ids into merges of bytes."""
    tokens = token_bytes(pairs)
    return [(tokens[left], tokens[right]) for left, right in pairs]


def final_parts(token: bytes, rank) -> list[bytes]:
    """Join the bytes of a token until two parts are left; return the parts.

    rank(left, right): the order of joins, the lowest first; math.inf: no such join. More than two
    parts are left where no join applies.
    """
    parts = [token[i:i + 1] for i in range(len(token))]
    ranks = [rank(left, right) for left, right in itertools.pairwise(parts)]
    while len(parts) > 2 and (first := min(ranks)) < math.inf:
        i = ranks.index(first)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del ranks[i]
        if i > 0:
            ranks[i - 1] = rank(parts[i - 1], parts[i])
        if i < len(ranks):
            ranks[i] = rank(parts[i], parts[i + 1])
    return parts


def are_long(tokens) -> bool:
    """Return whether final_parts(), quadratic in time, takes too long."""
    return sum(len(token) ** 2 for token in tokens) > MOST_SQUARES


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recover the merges of a vocabulary {token: rank}, such as tiktoken's.

    tiktoken joins any two neighbours that together are a token, the lowest rank first. A token's
    merge joins the two parts that its own bytes end as. A token whose bytes never end as two
    parts is only ever taken as a whole piece, and has no merge.
    """
    def rank(left, right):
        return ranks.get(left + right, math.inf)

    tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    return [tuple(parts) for parts in (final_parts(token, rank) for token in tokens)
            if len(parts) == 2]
