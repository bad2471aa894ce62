"""Find documents that share most of their runs of five words, for data.clean --near.

    near = NearDuplicates(0.8)
    like = near.find(signature(text), number)  # None, or a kept document and the similarity

MinHash signatures of the runs of five words, as FineWeb makes them (arXiv 2406.17557: 112 hashes,
five words). The share of equal numbers in two signatures estimates the Jaccard similarity of the
two sets of runs, to 0.04.
"""

import functools
import re
import zlib

import numpy as np

from configurator import UserError

HASHES = 112
SHINGLE_WORDS = 5
RECALL = 0.9       # least chance that two documents of exactly the threshold share a bucket
BUCKET_SIZE = 100  # most documents of a bucket that a new one is compared with
# Scripts without spaces between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese): every
# character is a word.
SPACELESS = ('\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff'
             '\U00020000-\U0003ffff')
WORD = re.compile(rf'[{SPACELESS}]|[^\W{SPACELESS}]+')
# odd factors lose no bits; RandomState draws the same in every version of NumPy
FACTORS = np.random.RandomState(1).randint(0, 2**63, SHINGLE_WORDS + HASHES, np.uint64) * 2 + 1


@functools.cache
def load_minhash():
    """Return a MinHash of datasketch, whose own buckets take 5.4 kB a document."""
    try:
        from datasketch import MinHash
    except ImportError:
        raise UserError("--near needs datasketch: pip install -e '.[clean]'") from None
    return MinHash(HASHES, seed=1, hashfunc=int, scheme='affine32')


def hash_words(text: str) -> np.ndarray:
    """Hash the words of a text, without case and punctuation, to uint64 numbers of 32 bits."""
    return np.array([zlib.crc32(word.encode()) for word in WORD.findall(text.lower())],
                    dtype=np.uint64)


def hash_runs(hashes: np.ndarray, n_words: int) -> np.ndarray:
    """Hash each run of n_words words to 64 bits; fewer words are one run, none are no run.

    The hash of a run is the sum of its words' hashes, each times the factor of its place, so that
    words are hashed once, not n_words times.
    """
    n_words = min(n_words, len(hashes))
    n_runs = len(hashes) - n_words + 1
    return (sum(hashes[i:i + n_runs] * factor for i, factor in enumerate(FACTORS[:n_words]))
            if n_words else hashes)


def signature(text: str) -> np.ndarray | None:
    """Return the signature, (HASHES,) uint32, of a text; None if it has no words."""
    shingles = hash_runs(hash_words(text), SHINGLE_WORDS)
    if not len(shingles):
        return None
    shingles = shingles >> np.uint64(32)
    minhash = load_minhash()
    minhash.clear()
    for i in range(0, len(shingles), 2048):  # 2048 * HASHES * 4 bytes fit into a core's cache
        minhash.update_batch(shingles[i:i + 2048])
    return minhash.digest()


class NearDuplicates:
    """Keep documents unless they resemble one that is kept.

    A new document is compared with those that share a bucket: `rows` numbers of the signature at
    one place. There are as many buckets as fit; more rows give fewer chance meetings. At 0.8 that
    is FineWeb's 14 buckets of 8. Only kept documents are in the table, so every removed document
    resembles one that stays, unlike in methods that join pairs to chains.

    A new document is compared with at most BUCKET_SIZE documents per bucket. A longer bucket holds
    text that pages of one template share; copies of a page also meet in other buckets. Without the
    bound, n pages just below the threshold would take n * n comparisons.

    Memory per kept document: 0.5 kB of signature and 0.11 kB per bucket: 2 kB at 0.8, 4.6 at 0.5.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.rows = max(rows for rows in range(1, HASHES + 1)
                        if 1 - (1 - threshold**rows)**(HASHES // rows) >= RECALL)
        self.bands = HASHES // self.rows
        self.factors = FACTORS[SHINGLE_WORDS:][:self.bands * self.rows].reshape(self.bands, -1)
        self.numbers, self.buckets = [], {}
        self.signatures = np.empty((1024, HASHES), dtype=np.uint32)  # grows before it is full

    def find(self, new: np.ndarray, number: int) -> tuple[int, float] | None:
        """Return the first kept document that is similar, and the similarity.

        -> None when there is none; then the new document is kept under its number.
        """
        # key of a bucket: 64 bits of its numbers, mixed with factors of its own
        bands = new[:self.factors.size].reshape(self.factors.shape)
        keys = (bands * self.factors).sum(axis=1).tolist()
        candidates = self.candidates(keys)
        similarity = np.mean(self.signatures[candidates] == new, axis=1)
        if (similarity >= self.threshold).any():
            first = int(np.argmax(similarity >= self.threshold))
            return self.numbers[candidates[first]], float(similarity[first])
        if len(self.numbers) == len(self.signatures):  # by an eighth, to waste little memory
            self.signatures.resize((len(self.signatures) * 9 // 8, HASHES), refcheck=False)
        self.signatures[len(self.numbers)] = new
        alone = (len(self.numbers),)  # one tuple for all buckets in which it is the first
        for key in keys:
            if len(bucket := self.buckets.get(key, ())) < BUCKET_SIZE:
                self.buckets[key] = bucket + alone if bucket else alone
        self.numbers.append(number)
        return None

    def candidates(self, keys) -> list[int]:
        """Return the indices of the kept documents in the buckets of these keys, sorted."""
        return sorted({i for key in keys for i in self.buckets.get(key, ())})
