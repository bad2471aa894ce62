"""Prepare all sums of two numbers of up to 3 digits, one token per character.

It needs no network.

    python data/addition/prepare.py    # 123+456=0579
    python -m lab.addition             # the next step

With the units of the answers first, 123+456=9750, to train with train.py:

    python data/addition/prepare.py --order=reversed \\
        --out_dir=data/addition_reversed

Takes a second. Writes train.bin (11,700,091 tokens), val.bin (1,299,909) and
meta.json (13 characters) beside this script.
"""

import os
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from configurator import UserError
from data import documents, encode
from tokenizer import CharTokenizer

CHARS = '\n+0123456789='  # sorted, as every char vocabulary is


def split_pairs(digits, val_fraction, seed):
    """Split all pairs (a, b) in a random order; -> {'train': (n, 2), 'val': (n, 2)}.

    a + b and b + a are in the same split, because one gives the other away.
    """
    N = 10**digits
    # raw numbers of a bit generator are the same in all versions of numpy
    draws, places = np.random.Philox(key=seed).random_raw(2 * N * N).reshape(2, -1)
    a, b = np.divmod(np.arange(N * N), N)
    draws = draws[np.minimum(a, b) * N + np.maximum(a, b)]  # the same for (a, b) and (b, a)
    n_pairs = N * (N + 1) // 2
    n_val = min(n_pairs - 1, max(1, round(val_fraction * n_pairs)))
    is_val = draws < np.sort(draws[a <= b])[n_val]
    order = places.argsort(kind='stable')
    pairs, is_val = np.stack((a, b), axis=1)[order], is_val[order]
    return {'train': pairs[~is_val], 'val': pairs[is_val]}


def write_sums(pairs, digits, reverse):
    """Write (n, 2) numbers as lines 123+456=0579; reverse: units first, =9750."""
    def columns(numbers, n_digits):
        return numbers[:, None] // 10 ** np.arange(n_digits - 1, -1, -1) % 10 + ord('0')

    a, b = pairs.T
    answer = columns(a + b, digits + 1)[:, :: -1 if reverse else 1]
    plus, equals, end = (np.full((len(pairs), 1), ord(char)) for char in '+=\n')
    parts = [columns(a, digits), plus, columns(b, digits), equals, answer, end]
    return np.concatenate(parts, axis=1).astype(np.uint8).tobytes().decode('ascii')


def main():
    parser = encode.make_parser(__doc__)
    add = parser.add_argument
    # not 4: its 10**8 sums would take 3 GB of disk and show nothing new
    add('--digits', type=int, choices=(1, 2, 3), default=3, help='of each number (3)')
    add('--order', choices=('plain', 'reversed'), default='plain',
        help='of the digits of the answers; reversed: units first')
    add('--val_fraction', type=float, default=0.1, help='share of the pairs held out (0.1)')
    add('--seed', type=int, default=1337, help='fixes the order and the held-out sums (1337)')
    add('--out_dir', default=HERE, help="folder to write to (the script's)")
    args = parser.parse_args()

    started = time.time()
    documents.check_fraction(args.val_fraction)
    if not 0 <= args.seed < 2**64:
        raise UserError(f'--seed={args.seed}: expected a number from 0 to 2**64 - 1, such as 1337')
    is_reversed = args.order == 'reversed'
    texts = {split: write_sums(pairs, args.digits, is_reversed) for split, pairs
             in split_pairs(args.digits, args.val_fraction, args.seed).items()}
    source = f'sums of {args.digits}-digit numbers, answers {args.order}, seed {args.seed}'
    corpus = encode.Corpus(texts.items, documents=False, source=source,
                           val_fraction=args.val_fraction, total=sum(map(len, texts.values())))
    meta = encode.write_dataset(args.out_dir, corpus, CharTokenizer(CHARS))
    name = os.path.basename(os.path.abspath(args.out_dir))
    following = 'python -m lab.addition' + (f' --dataset={name}' if name != 'addition' else '')
    if is_reversed:  # lab/addition.py reverses plain ones itself
        following = f'python train.py config/quickstart.py --dataset={name} --out_dir=out-{name}'
    encode.report(args.out_dir, meta, started, following)


if __name__ == '__main__':
    encode.run(main)
