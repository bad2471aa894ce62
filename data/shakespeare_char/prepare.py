"""Prepare tiny Shakespeare (1.1 MB) with one token per character.

    python data/shakespeare_char/prepare.py               # downloads input.txt
    python data/shakespeare_char/prepare.py --input=FILE  # without a network
    python train.py config/train_shakespeare_char.py      # the next step

Takes a second. Writes train.bin (1,003,854 tokens), val.bin (111,540) and
meta.json (65 characters) beside this script, and nanoGPT's meta.pkl, so that
its scripts can read the dataset too.
"""

import os
import pickle
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import documents, download, encode


def main():
    parser = encode.make_parser(__doc__)
    parser.add_argument('--input', help='a text file, in place of the download')
    parser.add_argument('--out_dir', default=HERE, help="folder to write to (the script's)")
    args = parser.parse_args()

    path = download.get_shakespeare(args.input, HERE,
                                    'python data/shakespeare_char/prepare.py --input=FILE')
    started = time.time()
    corpus = encode.Corpus(
        lambda: documents.split_text(path, 0.1), documents=False, source=os.path.basename(path),
        val_fraction=0.1, total=os.path.getsize(path))
    tokenizer = encode.make_tokenizer('char', corpus)
    itos = dict(enumerate(tokenizer.chars))
    meta_pkl = pickle.dumps({'vocab_size': tokenizer.vocab_size, 'itos': itos,
                             'stoi': {char: i for i, char in itos.items()}})
    meta = encode.write_dataset(args.out_dir, corpus, tokenizer, meta_pkl)
    encode.report(args.out_dir, meta, started, 'python train.py config/train_shakespeare_char.py')


if __name__ == '__main__':
    encode.run(main)
