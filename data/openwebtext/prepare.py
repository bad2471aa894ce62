"""Prepare OpenWebText with GPT-2's BPE, to reproduce GPT-2 124M.

    pip install -e '.[data]'
    python data/openwebtext/prepare.py                  # downloads all of it
    python data/openwebtext/prepare.py --input=PARQUET  # a file, or a folder
    python train.py config/train_gpt2.py                # the next step

Disk: 24 GB for the download, which can be removed afterwards, and 18 GB for
the token files. Memory: below 1 GB. README.md has the time. After an
interruption, run the same command again: it continues after the last finished
shard.
"""

import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import documents, download, encode

# A pinned commit of Parquet files, so that everyone gets the same tokens.
SHARDS = download.HubFolder('Skylion007/openwebtext', 'data',
                            revision='7577b918bd30b25df0b88bb718dc8a6c80cb619b')
DOCUMENTS, TEXT_BYTES = 8_013_769, 39_769_491_688


def main():
    parser = encode.make_parser(__doc__)
    parser.add_argument('--input', help='a .parquet file or a folder of them, not the network')
    encode.add_options(parser, tokenizer='gpt2', val_fraction=0.0005, out_dir=HERE)
    args = parser.parse_args()

    # check before the download
    started = time.time()
    documents.check_fraction(args.val_fraction)
    encode.load_tokenizer(args.tokenizer, args.vocab_size)

    # read
    if args.input:
        documents.list_files(args.input)  # prints what is left out
        paths, source = args.input, os.path.basename(os.path.abspath(args.input))
    else:
        paths, commit = download.get_shards(SHARDS, os.path.join(args.out_dir, 'shards'),
                                            'python data/openwebtext/prepare.py --input=FOLDER')
        source = f'{SHARDS.repo}@{commit}'
    print(f'preparing {source}', file=sys.stderr)

    # encode and write
    corpus = encode.Corpus(
        lambda: documents.split_documents(documents.read_documents(paths), args.val_fraction),
        documents=True, source=source, val_fraction=args.val_fraction,
        shard_tokens=args.shard_tokens, total=None if args.input else TEXT_BYTES,
        workers=args.num_proc)
    tokenizer = encode.make_tokenizer(args.tokenizer, corpus, args.vocab_size)
    meta = encode.write_dataset(args.out_dir, corpus, tokenizer)
    count = sum(meta['documents'].values())
    print(f'{count:,} documents')
    if not args.input and count != DOCUMENTS:
        print(f'note: expected {DOCUMENTS:,} documents', file=sys.stderr)
    encode.report(args.out_dir, meta, started, 'python train.py config/train_gpt2.py')


if __name__ == '__main__':
    encode.run(main)
