"""Prepare tiny Shakespeare (1.1 MB) with GPT-2's BPE, for finetuning GPT-2.

    python data/shakespeare/prepare.py               # downloads input.txt
    python data/shakespeare/prepare.py --input=FILE  # without a network
    python train.py config/finetune_shakespeare.py   # what comes next

Takes a second. Writes train.bin (301,966 tokens), val.bin (36,059) and
meta.json next to this script. Needs the package tiktoken, which fetches
GPT-2's vocabulary once. --tokenizer takes another one, for training from
scratch.
"""

import argparse
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import download
from data.documents import split_text
from data.encode import add_options, make_tokenizer, report, run, write_dataset


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', help='a text file instead of the download')
    add_options(parser, tokenizer='gpt2', out_dir=HERE)
    args = parser.parse_args()

    path = download.get_shakespeare(args.input, HERE, 'python data/shakespeare/prepare.py --input=FILE')
    started = time.time()

    def pieces():
        return split_text(path, 0.1)

    tokenizer = make_tokenizer(args.tokenizer, pieces, documents=False, vocab_size=args.vocab_size)
    meta = write_dataset(args.out_dir, pieces, tokenizer, documents=False, source=os.path.basename(path),
                                val_fraction=0.1, shard_tokens=args.shard_tokens, total=os.path.getsize(path),
                                workers=args.num_proc)
    report(args.out_dir, meta, started, 'python train.py config/finetune_shakespeare.py')


if __name__ == '__main__':
    run(main)
