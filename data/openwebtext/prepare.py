"""Prepare OpenWebText (8,013,769 documents, 39.8 GB of text) with GPT-2's BPE,
for reproducing GPT-2 124M.

    pip install -e '.[data]'
    python data/openwebtext/prepare.py                  # streams all of it
    python data/openwebtext/prepare.py --input=PARQUET  # a shard, or a folder
    python train.py config/train_gpt2.py                # what comes next

Disk: 18 GB for train.bin and val.bin, and nothing else, as the 24 GB download
is not stored. Memory: below 1 GB. Time: the longer of the download and the
encoding, which takes about 50 minutes on two cores and uses all there are.
An interrupted run leaves nothing behind and starts from the beginning; on a
bad connection, download the shards first (the README next to this script says
how) and use --input.
"""

import argparse
import os
import shutil
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

import corpus  # noqa: E402
import tokenizer  # noqa: E402

# The commit is pinned so that everyone gets the same tokens. It holds Parquet files; the dataset's main branch had a
# loading script for years, which current versions of `datasets` refuse to run.
FILES = ('hf://datasets/Skylion007/openwebtext@7577b918bd30b25df0b88bb718dc8a6c80cb619b'
         '/data/train-*-of-00080.parquet')
DOCUMENTS = 8_013_769
NEEDS_BYTES = 18_200_000_000


def stream_documents(files):
    """Yield the documents of Parquet files on Hugging Face."""
    try:
        import datasets
    except ImportError:
        raise ValueError("streaming OpenWebText needs the package datasets: pip install -e '.[data]'") from None
    count = 0
    try:
        for row in datasets.load_dataset('parquet', data_files={'train': files}, split='train', streaming=True):
            count += 1
            yield row['text']
    except Exception as error:  # datasets passes on what fsspec, requests, httpx and pyarrow raise
        raise ValueError(f'cannot stream {files}: {type(error).__name__}: {str(error).splitlines()[0][:200]} (after '
                         f'{count:,} documents). Is this machine offline? Copy Parquet files of the dataset here, and '
                         f'then: python data/openwebtext/prepare.py --input=FOLDER') from error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', help='a .parquet file or a folder of them, instead of the network')
    parser.add_argument('--files', default=FILES, help='Parquet files on Hugging Face, as an hf:// pattern')
    parser.add_argument('--num_proc', type=int, default=None, help='encoding threads (one per core)')
    parser.add_argument('--val_fraction', type=float, default=0.0005, help='share of the documents in val.bin (0.0005)')
    parser.add_argument('--out_dir', default=HERE, help="folder to write to (this script's own)")
    args = parser.parse_args()

    corpus.check_fraction(args.val_fraction)
    started = time.time()
    gpt2 = tokenizer.load('gpt2')
    if args.input:
        documents, source = corpus.read_documents(args.input), os.path.basename(os.path.abspath(args.input))
        print(f'preparing {args.input}', file=sys.stderr)
    else:
        documents, source = stream_documents(args.files), args.files
        free = shutil.disk_usage(args.out_dir if os.path.isdir(args.out_dir) else HERE).free
        print(f'streaming 24 GB from Hugging Face into 18 GB of token files ({free / 1e9:,.0f} GB free) with '
              f'{args.num_proc or corpus.core_count()} threads; see --help', file=sys.stderr)
        if free < NEEDS_BYTES:
            raise ValueError(f'{args.out_dir} has {free / 1e9:,.1f} GB free; OpenWebText needs '
                             f'{NEEDS_BYTES / 1e9:.1f} GB. Use --out_dir=FOLDER on a larger disk and link it: '
                             f'ln -s FOLDER/*.bin FOLDER/meta.json data/openwebtext/')
    meta = corpus.write_dataset(args.out_dir, corpus.split_documents(documents, args.val_fraction), gpt2,
                                documents=True, source=source, val_fraction=args.val_fraction, threads=args.num_proc,
                                total=None if args.input else 39_769_491_688)
    count = sum(meta['documents'].values())
    print(f'{count:,} documents')
    if not args.input and count != DOCUMENTS:
        print(f'note: OpenWebText has {DOCUMENTS:,} documents, so {abs(DOCUMENTS - count):,} are '
              f'{"missing" if count < DOCUMENTS else "new"}', file=sys.stderr)
    corpus.report(args.out_dir, meta, started, 'python train.py config/train_gpt2.py')


if __name__ == '__main__':
    corpus.run(main)
