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

BATCH_CHARS = 1 << 21  # of text that a process counts in one go


# ----------------------------------------------------------------------------------------------------------------------
# text into pieces


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
