"""Shuffle epochs as a pure function of (seed, step), without a permutation."""

import numpy as np

FEW = 16  # items


def mix(x, key):
    """Scramble uint64 numbers x under keys, as SplitMix64 does (Steele et al. 2014)."""
    with np.errstate(over='ignore'):  # arithmetic modulo 2**64
        x = x + ((key << np.uint64(1)) | np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def shuffled(i, n, key):
    """Return the places of indices i in an order of 0..n-1 that (n, key) fixes.

    i, key: uint64 arrays of one shape, (m,). A Feistel network permutes the smallest even number of
    bits that hold n. It is applied again where it leaves the range (Black & Rogaway 2002). So no
    permutation of a billion windows is stored. Few items, where the network's permutations are not
    equally frequent, are sorted by scrambled numbers.
    """
    if n <= FEW:
        scrambled = mix(np.arange(n, dtype=np.uint64)[None], key[:, None])  # (m, n)
        places = np.argsort(scrambled, axis=1)[np.arange(len(i)), i.astype(np.int64)]
        return places.astype(np.uint64)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    i, outside = i.copy(), np.ones(len(i), dtype=bool)
    while outside.any():  # the bits hold less than 4 n numbers: under 4 rounds on average
        left, right = i[outside] >> half, i[outside] & low
        for round in range(4):
            left, right = right, left ^ (mix(right, key[outside] + np.uint64(round)) & low)
        i[outside] = (left << half) | right
        outside = i >= np.uint64(n)
    return i


def epoch_places(first, n, per_epoch, seed):
    """Return the places of n items in shuffled epochs, and the epochs' keys.

    first: how many items were drawn before. Each epoch visits its per_epoch items once each in an
    order of its own. -> uint64 (n,), (n,)
    """
    index = np.uint64(first) + np.arange(n, dtype=np.uint64)
    epoch, place = index // np.uint64(per_epoch), index % np.uint64(per_epoch)
    key = mix(epoch, np.full_like(epoch, seed % 2**64))
    return shuffled(place, per_epoch, key), key


def train_items(first, n, n_items, seed):
    """Return the next n item numbers, (n,); every epoch visits each of n_items once."""
    return epoch_places(first, n, n_items, seed)[0].astype(np.int64)
