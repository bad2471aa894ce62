"""Make a training set of your own text: a file, a folder of files, or a table
with a column of text.

    python data/text/prepare.py --input=book.txt             # -> data/book
    python data/text/prepare.py --input=notes/ --name=mine   # -> data/mine
    python data/text/prepare.py --input=posts.jsonl --text_key=body
    python train.py --dataset=mine                           # what comes next

A folder is read recursively, every file with the suffix of a text file. Tables
are .jsonl, .csv, .tsv and .parquet, a document per row.

--tokenizer says what a token is:
    byte   one of 256 bytes: any text, any prompt, no network
    char   one per distinct character; prompts can use no other characters
    gpt2   GPT-2's 50,257 word pieces: for large texts, or to finetune GPT-2

val.bin, which is never trained on, is
    of a single text            its last tenth,
    of fewer than 100 documents the last tenth of each,
    of more documents           every tenth, whole, chosen by its content.
--val_fraction=0.1 is that tenth.
"""

import argparse
import itertools
import os
import re
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, ROOT)  # so that it runs from any folder

import corpus  # noqa: E402

FEW = 100  # documents; with fewer, a tenth of them is too few to stand for all


def output_folder(name, path):
    """The folder data/<name> (name: by default from the input's); ValueError when it is not ours to write to."""
    if name is None:
        stem = os.path.splitext(os.path.basename(os.path.abspath(path)))[0]
        name = re.sub(r'[^\w.-]+', '_', stem).strip('._') or 'mytext'
    if not re.fullmatch(r'[\w-][\w.-]*', name):
        raise ValueError(f'--name={name} is not a plain name; expected letters, digits, "_", "-" and ".", like '
                         f'--name=mytext (the folder becomes data/mytext)')
    out_dir = os.path.join(ROOT, 'data', name)
    if os.path.exists(os.path.join(out_dir, 'prepare.py')):
        raise ValueError(f'data/{name} is a dataset with its own prepare.py; choose another name: --name=my_{name}')
    if os.path.exists(os.path.join(out_dir, 'train.bin')) and not os.path.exists(os.path.join(out_dir, 'meta.json')):
        raise ValueError(f'data/{name} has a train.bin that this script did not make (there is no meta.json beside '
                         f'it); choose another name: --name=my_{name}')
    return name, out_dir


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument('--input', required=True, help='a text file, a folder, or a .jsonl, .csv, .tsv, .parquet file')
    parser.add_argument('--name', help='name of the dataset (that of the input)')
    parser.add_argument('--text_key', default='text', help='field of .jsonl, .csv, .tsv and .parquet with the text')
    parser.add_argument('--tokenizer', default='byte', help='byte, char, gpt2, cl100k_base or o200k_base (byte)')
    parser.add_argument('--val_fraction', type=float, default=0.1, help='share of the text that becomes val.bin (0.1)')
    args = parser.parse_args()

    started = time.time()
    corpus.check_fraction(args.val_fraction)
    files, skipped = corpus.find_files(args.input)
    name, out_dir = output_folder(args.name, args.input)
    if skipped:
        print(f'{len(files):,} files; {skipped:,} more were left out because their suffix is not that of a text file',
              file=sys.stderr)

    def documents():
        return corpus.read_documents(args.input, args.text_key)

    one_text = len(files) == 1 and not corpus.is_rows(files[0])
    few = sum(1 for _ in itertools.islice(documents(), FEW)) < FEW
    if one_text:
        tokenizer = corpus.make_tokenizer(args.tokenizer, corpus.read_text(files[0]), documents=False)
        pieces, how = corpus.split_text(files[0], args.val_fraction), 'the end of the text'
    elif few:
        tokenizer = corpus.make_tokenizer(args.tokenizer, documents(), documents=True)
        pieces, how = corpus.split_each(documents(), args.val_fraction), 'the end of each document'
    else:
        tokenizer = corpus.make_tokenizer(args.tokenizer, documents(), documents=True)
        pieces, how = corpus.split_documents(documents(), args.val_fraction), 'whole documents, chosen by content'
    meta = corpus.write_dataset(out_dir, pieces, tokenizer, documents=not one_text,
                                source=os.path.basename(os.path.abspath(args.input)), val_fraction=args.val_fraction,
                                total=corpus.text_size(files))
    if not one_text:
        print(f'{meta["documents"]["train"]:,} documents in train, {meta["documents"]["val"]:,} in val')
    print(f'val is {how}: {meta["bytes"]["val"] / sum(meta["bytes"].values()):.1%} of the text')
    corpus.report(out_dir, meta, started, f'python train.py --dataset={name}')


if __name__ == '__main__':
    corpus.run(main)
