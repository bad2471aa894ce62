"""Prepare a sample of FineWeb-Edu, educational web pages, for training GPTs
that know something.

    pip install -e '.[data]'
    python data/fineweb_edu/prepare.py --shards=1       # 2 GB to begin with
    python data/fineweb_edu/prepare.py                  # sample/10BT, 28 GB
    python data/fineweb_edu/prepare.py --input=PARQUET  # a shard, or a folder
    python train.py config/train_gpt2.py --dataset=fineweb_edu

--sample=10BT, 100BT or 350BT is about the number of tokens. Each shard of 2 GB
turns into 1.4 GB of token files. Memory: below 1 GB. Time: the download, and
the encoding, about 5 minutes a shard on two cores with tiktoken; it uses all
there are. When interrupted, run the same command again: it goes on where it
was.
"""

import argparse
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import download
from data.documents import check_fraction, find_files, read_documents, split_documents
from data.encode import add_options, load_tokenizer, make_tokenizer, positive, report, run, write_dataset

REPO = 'HuggingFaceFW/fineweb-edu'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--sample', default='10BT', choices=['10BT', '100BT', '350BT'], help='which sample (10BT)')
    parser.add_argument('--shards', type=positive, help='how many of its shards, the first ones (all)')
    parser.add_argument('--revision', default='main', help='branch, tag or commit of the dataset (main)')
    parser.add_argument('--input', help='a .parquet file or a folder of them, instead of the network')
    parser.add_argument('--min_score', type=float, help='leave out pages whose score, 0 to 5, is below this')
    add_options(parser, tokenizer='gpt2', val_fraction=0.0005, out_dir=HERE)
    args = parser.parse_args()

    check_fraction(args.val_fraction)
    started = time.time()
    load_tokenizer(args.tokenizer, args.vocab_size)  # what is wrong with it shows before the download
    if args.input:
        paths, _ = find_files(args.input)
        source = os.path.basename(os.path.abspath(args.input))
    else:
        paths, commit = download.get_shards(REPO, f'sample/{args.sample}', os.path.join(args.out_dir, args.sample),
                                            args.revision, args.shards,
                                            'python data/fineweb_edu/prepare.py --input=FOLDER')
        source = f'{REPO}@{commit}, {len(paths)} shards of sample/{args.sample}'
    if args.min_score is not None:
        source += f', score of at least {args.min_score}'

    def pieces():
        return split_documents(read_documents(paths, min_score=args.min_score), args.val_fraction)

    print(f'preparing {source}', file=sys.stderr)
    tokenizer = make_tokenizer(args.tokenizer, pieces, documents=True, vocab_size=args.vocab_size)
    meta = write_dataset(args.out_dir, pieces, tokenizer, documents=True, source=source,
                                val_fraction=args.val_fraction, shard_tokens=args.shard_tokens, workers=args.num_proc)
    print(f'{sum(meta["documents"].values()):,} documents')
    report(args.out_dir, meta, started, 'python train.py config/train_gpt2.py --dataset=fineweb_edu')


if __name__ == '__main__':
    run(main)
