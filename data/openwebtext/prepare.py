"""Prepare OpenWebText (8,013,769 documents, 39.8 GB of text) with GPT-2's BPE,
for reproducing GPT-2 124M.

    pip install -e '.[data]'
    python data/openwebtext/prepare.py                  # downloads all of it
    python data/openwebtext/prepare.py --input=PARQUET  # a shard, or a folder
    python train.py config/train_gpt2.py                # what comes next

Disk: 24 GB for the download, which can be removed afterwards, and 18 GB for
the token files. Memory: below 1 GB. Time: the download, and the encoding,
which takes about 50 minutes on two cores with tiktoken and uses all there are.
When interrupted, run the same command again: it goes on where it was.
"""

import argparse
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import download
from data.documents import check_fraction, read_documents, split_documents
from data.encode import add_options, load_tokenizer, make_tokenizer, report, run, write_dataset

# The commit is pinned so that everyone gets the same tokens. It holds Parquet files; the dataset's main branch had a
# loading script for years.
REPO, REVISION, FOLDER = 'Skylion007/openwebtext', '7577b918bd30b25df0b88bb718dc8a6c80cb619b', 'data'
DOCUMENTS, TEXT_BYTES = 8_013_769, 39_769_491_688


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', help='a .parquet file or a folder of them, instead of the network')
    add_options(parser, tokenizer='gpt2', val_fraction=0.0005, out_dir=HERE)
    args = parser.parse_args()

    check_fraction(args.val_fraction)
    started = time.time()
    source = os.path.basename(os.path.abspath(args.input)) if args.input else f'{REPO}@{REVISION}'
    folder = args.input or os.path.join(args.out_dir, 'shards')
    load_tokenizer(args.tokenizer, args.vocab_size)  # what is wrong with it shows before the download
    if not args.input:
        download.get_shards(REPO, FOLDER, folder, REVISION, None, 'python data/openwebtext/prepare.py --input=FOLDER')

    def pieces():
        return split_documents(read_documents(folder), args.val_fraction)

    print(f'preparing {folder}', file=sys.stderr)
    tokenizer = make_tokenizer(args.tokenizer, pieces, documents=True, vocab_size=args.vocab_size)
    meta = write_dataset(args.out_dir, pieces, tokenizer, documents=True, source=source,
                                val_fraction=args.val_fraction, shard_tokens=args.shard_tokens, workers=args.num_proc,
                                total=None if args.input else TEXT_BYTES)
    count = sum(meta['documents'].values())
    print(f'{count:,} documents')
    if not args.input and count != DOCUMENTS:
        print(f'note: OpenWebText has {DOCUMENTS:,} documents, so {abs(DOCUMENTS - count):,} are '
              f'{"missing" if count < DOCUMENTS else "new"}', file=sys.stderr)
    report(args.out_dir, meta, started, 'python train.py config/train_gpt2.py')


if __name__ == '__main__':
    run(main)
