"""Prepare tiny Shakespeare (1.1 MB) with one token per character.

    python data/shakespeare_char/prepare.py               # downloads input.txt
    python data/shakespeare_char/prepare.py --input=FILE  # without a network
    python train.py config/train_shakespeare_char.py      # what comes next

Takes a second. Writes train.bin (1,003,854 tokens), val.bin (111,540) and
meta.json (65 characters) next to this script, and nanoGPT's meta.pkl, so that
its scripts can read the dataset too.
"""

import argparse
import os
import pickle
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import download
from data.documents import split_text
from data.encode import make_tokenizer, report, run, write_dataset


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', help='a text file instead of the download')
    parser.add_argument('--out_dir', default=HERE, help="folder to write to (this script's own)")
    args = parser.parse_args()

    path = download.get_shakespeare(args.input, HERE, 'python data/shakespeare_char/prepare.py --input=FILE')
    started = time.time()

    def pieces():
        return split_text(path, 0.1)

    tokenizer = make_tokenizer('char', pieces, documents=False)
    itos = dict(enumerate(tokenizer.chars))
    nanogpt_meta = {'vocab_size': tokenizer.vocab_size, 'itos': itos, 'stoi': {char: i for i, char in itos.items()}}
    meta = write_dataset(args.out_dir, pieces, tokenizer, documents=False, source=os.path.basename(path),
                                val_fraction=0.1, total=os.path.getsize(path),
                                meta_pkl=pickle.dumps(nanogpt_meta))
    report(args.out_dir, meta, started, 'python train.py config/train_shakespeare_char.py')


if __name__ == '__main__':
    run(main)
