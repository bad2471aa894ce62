"""Prepare all sums of two numbers of up to 3 digits, one token per character.
Needs no network and no download.

    python data/addition/prepare.py    # 123+456=0579
    python -m lab.addition             # what comes next

Units first, 123+456=9750, to train on with train.py:

    python data/addition/prepare.py --order=reversed \\
        --out_dir=data/addition_reversed

Takes a second. Writes train.bin (11,700,091 tokens), val.bin (1,299,909) and
meta.json (13 characters) next to this script.
"""

import argparse
import os
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from configurator import UserError
from data.documents import check_fraction
from data.encode import report, run, write_dataset
from tokenizer import CharTokenizer

CHARS = '\n+0123456789='  # sorted, as every char vocabulary here


def split_pairs(digits, val_fraction, seed):
    """
    All (a, b) of numbers of so many digits in a random order -> {'train': (n, 2), 'val': (n, 2)}. a + b and b + a are
    in the same split: who has read one knows the other.
    """
    N = 10**digits
    # a bit generator's raw numbers, unlike what numpy makes of them, are the same in all its versions
    draws, places = np.random.Philox(key=seed).random_raw(2 * N * N).reshape(2, -1)
    a, b = np.divmod(np.arange(N * N), N)
    draws = draws[np.minimum(a, b) * N + np.maximum(a, b)]  # of a pair one number, whichever stands first
    n_pairs = N * (N + 1) // 2
    is_val = draws < np.sort(draws[a <= b])[min(n_pairs - 1, max(1, round(val_fraction * n_pairs)))]
    order = places.argsort(kind='stable')
    pairs, is_val = np.stack((a, b), axis=1)[order], is_val[order]
    return {'train': pairs[~is_val], 'val': pairs[is_val]}


def write_sums(pairs, digits, reverse):
    """(n, 2) numbers -> n lines of text such as 123+456=0579; reverse: the answer with its units first, =9750."""
    def columns(numbers, n_digits):
        return numbers[:, None] // 10 ** np.arange(n_digits - 1, -1, -1) % 10 + ord('0')

    a, b = pairs.T
    answer = columns(a + b, digits + 1)
    parts = [columns(a, digits), '+', columns(b, digits), '=', answer[:, ::-1] if reverse else answer, '\n']
    parts = [np.full((len(pairs), 1), ord(part)) if isinstance(part, str) else part for part in parts]
    return np.concatenate(parts, axis=1).astype(np.uint8).tobytes().decode('ascii')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    # not 4: its 10**8 sums would take 3 GB of disk, to learn what 3 digits show as well
    parser.add_argument('--digits', type=int, choices=(1, 2, 3), default=3, help='of each number (3)')
    parser.add_argument('--order', choices=('plain', 'reversed'), default='plain',
                        help='of the digits of the answers; reversed: units first')
    parser.add_argument('--val_fraction', type=float, default=0.1, help='share of the pairs held out (0.1)')
    parser.add_argument('--seed', type=int, default=1337, help='of the order and of what is held out (1337)')
    parser.add_argument('--out_dir', default=HERE, help="folder to write to (this script's own)")
    args = parser.parse_args()

    started = time.time()
    check_fraction(args.val_fraction)
    if not 0 <= args.seed < 2**64:
        raise UserError(f'--seed={args.seed}: expected a number from 0 to 2**64 - 1, such as 1337')
    pairs = split_pairs(args.digits, args.val_fraction, args.seed)
    texts = {split: write_sums(pairs[split], args.digits, args.order == 'reversed') for split in pairs}
    meta = write_dataset(args.out_dir, lambda: iter(texts.items()), CharTokenizer(CHARS), documents=False,
                                source=f'sums of {args.digits}-digit numbers, answers {args.order}, '
                                       f'seed {args.seed}', val_fraction=args.val_fraction,
                                total=sum(map(len, texts.values())))
    name = os.path.basename(os.path.abspath(args.out_dir))
    following = 'python -m lab.addition' + (f' --dataset={name}' if name != 'addition' else '')
    if args.order == 'reversed':  # lab/addition.py turns plain ones round itself
        following = f'python train.py config/quickstart.py --dataset={name} --out_dir=out-{name}'
    report(args.out_dir, meta, started, following)


if __name__ == '__main__':
    run(main)
