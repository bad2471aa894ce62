"""Prepare tiny Shakespeare (1.1 MB) with GPT-2's BPE, for finetuning GPT-2.

    python data/shakespeare/prepare.py               # downloads input.txt
    python data/shakespeare/prepare.py --input=FILE  # without a network
    python train.py config/finetune_shakespeare.py   # what comes next

Takes a second. Writes train.bin (301,966 tokens), val.bin (36,059) and
meta.json next to this script. Needs the package tiktoken, which fetches
GPT-2's vocabulary once.
"""

import argparse
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

import corpus  # noqa: E402
import tokenizer  # noqa: E402

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', help='a text file instead of the download')
    parser.add_argument('--out_dir', default=HERE, help="folder to write to (this script's own)")
    args = parser.parse_args()

    path = corpus.get_input(args.input, os.path.join(HERE, 'input.txt'), URL, SHA256,
                            'python data/shakespeare/prepare.py --input=FILE')
    started = time.time()
    meta = corpus.write_dataset(args.out_dir, corpus.split_text(path, 0.1), tokenizer.load('gpt2'), documents=False,
                                source=os.path.basename(path), val_fraction=0.1, total=os.path.getsize(path))
    corpus.report(args.out_dir, meta, started, 'python train.py config/finetune_shakespeare.py')


if __name__ == '__main__':
    corpus.run(main)
