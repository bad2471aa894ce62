"""Make a training set of your own text: a file, a folder of files, or a table
with a column of text.

    python data/text/prepare.py --input=book.txt             # -> data/book
    python data/text/prepare.py --input=notes/ --name=mine   # -> data/mine
    python data/text/prepare.py --input=posts.jsonl --text_key=body
    python train.py config/quickstart.py --dataset=mine --out_dir=out-mine

A folder is read recursively, every file with the suffix of a text file. Tables
are .jsonl, .csv, .tsv and .parquet, a document per row.

--tokenizer says what a token is:
    byte   one of 256 bytes: any text, any prompt, no network
    char   one per distinct character; prompts can use no other characters
    bpe    8,192 pieces of words (--vocab_size), found in the training split:
           a third of the tokens or fewer, for texts of some MB
    word   the 10,000 most frequent words (--vocab_size) of the training split
    gpt2   GPT-2's 50,257 pieces of words: for large texts, to finetune GPT-2
           (or cl100k_base, o200k_base: GPT-4's, GPT-4o's)
    FILE   a tokenizer trained or exported before, such as tokenizer.json

val.bin, which is never trained on, is
    of a single text            its last tenth,
    of fewer than 100 documents the last tenth of each,
    of more documents           every tenth, whole, chosen by its content.
--val_fraction=0.1 is that tenth.

When interrupted, run the same command again: it goes on where it was.
"""

import argparse
import itertools
import os
import shlex
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data.documents import (
    check_fraction,
    find_files,
    is_rows,
    read_documents,
    split_documents,
    split_each,
    split_text,
    text_size,
)
from data.encode import add_options, make_tokenizer, output_folder, report, run, write_dataset

FEW = 100  # documents; with fewer, a tenth of them is too few to stand for all


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', required=True, help='a text file, a folder, or a .jsonl, .csv, .tsv, .parquet file')
    parser.add_argument('--name', help='name of the dataset (that of the input)')
    parser.add_argument('--text_key', default='text', help='field of .jsonl, .csv, .tsv and .parquet with the text')
    parser.add_argument('--out_dir', help='folder to write to, in place of --name (data/NAME)')
    add_options(parser, tokenizer='byte', val_fraction=0.1)
    args = parser.parse_args()

    started = time.time()
    check_fraction(args.val_fraction)
    files, skipped = find_files(args.input)
    dataset, name, out_dir = output_folder(args.name, args.input, args.out_dir)
    if skipped:
        print(f'{len(files):,} files; {skipped:,} more were left out because their suffix is not that of a text file',
              file=sys.stderr)

    def documents():
        return read_documents(args.input, args.text_key)

    one_text = len(files) == 1 and not is_rows(files[0])
    few = sum(1 for _ in itertools.islice(documents(), FEW)) < FEW
    how = ('the end of the text' if one_text else 'the end of each document' if few else
           'whole documents, chosen by content')

    def pieces():
        if one_text:
            return split_text(files[0], args.val_fraction)
        return (split_each if few else split_documents)(documents(), args.val_fraction)

    tokenizer = make_tokenizer(args.tokenizer, pieces, documents=not one_text, vocab_size=args.vocab_size)
    meta = write_dataset(out_dir, pieces, tokenizer, documents=not one_text,
                                source=os.path.basename(os.path.abspath(args.input)), val_fraction=args.val_fraction,
                                shard_tokens=args.shard_tokens, total=text_size(files), workers=args.num_proc)
    if not one_text:
        print(f'{meta["documents"]["train"]:,} documents in train, {meta["documents"]["val"]:,} in val')
    print(f'val is {how}: {meta["bytes"]["val"] / sum(meta["bytes"].values()):.1%} of the text')
    report(out_dir, meta, started,
                  f'python train.py config/quickstart.py --dataset={shlex.quote(dataset)} --out_dir=out-{name}')


if __name__ == '__main__':
    run(main)
