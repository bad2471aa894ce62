"""Prepare a sample of FineWeb-Edu, educational web pages.

    pip install -e '.[data]'
    python data/fineweb_edu/prepare.py --shards=1       # 2 GB to begin with
    python data/fineweb_edu/prepare.py                  # sample/10BT, 28 GB
    python data/fineweb_edu/prepare.py --input=PARQUET  # a file, or a folder
    python train.py config/train_gpt2.py --dataset=fineweb_edu

--sample=10BT, 100BT or 350BT is about the number of tokens. Each shard of 2 GB
turns into 1.4 GB of token files. Memory: below 1 GB. README.md has the time.
After an interruption, run the same command again: it continues after the last
finished shard.
"""

import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import documents, download, encode

REPO = 'HuggingFaceFW/fineweb-edu'


def main():
    parser = encode.make_parser(__doc__)
    add = parser.add_argument
    add('--sample', default='10BT', choices=['10BT', '100BT', '350BT'], help='which sample (10BT)')
    add('--shards', type=encode.positive, help='only its first files (all)')
    add('--revision', default='main', help='branch, tag or commit (main)')
    add('--input', help='a .parquet file or a folder of them, not the network')
    add('--min_score', type=float, help='leave out pages with a score, 0 to 5, below this')
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
        folder = f'sample/{args.sample}'
        shards = download.HubFolder(REPO, folder, args.revision, args.shards)
        paths, commit = download.get_shards(shards, os.path.join(args.out_dir, 'shards'),
                                            'python data/fineweb_edu/prepare.py --input=FOLDER')
        source = f'{REPO}@{commit}, {len(paths)} shards of {folder}'
    if args.min_score is not None:
        source += f', score of at least {args.min_score}'
    print(f'preparing {source}', file=sys.stderr)

    def pieces():
        pages = documents.read_documents(paths, min_score=args.min_score)
        return documents.split_documents(pages, args.val_fraction)

    # encode and write
    corpus = encode.Corpus(
        pieces, documents=True, source=source, val_fraction=args.val_fraction,
        shard_tokens=args.shard_tokens, workers=args.num_proc)
    tokenizer = encode.make_tokenizer(args.tokenizer, corpus, args.vocab_size)
    meta = encode.write_dataset(args.out_dir, corpus, tokenizer)
    print(f'{sum(meta["documents"].values()):,} documents')
    encode.report(args.out_dir, meta, started,
                  'python train.py config/train_gpt2.py --dataset=fineweb_edu')


if __name__ == '__main__':
    encode.run(main)
