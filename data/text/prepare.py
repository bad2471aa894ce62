"""Prepare your own text: a file, a folder of files, or a table.

    python data/text/prepare.py --input=book.txt             # -> data/book
    python data/text/prepare.py --input=notes/ --name=mine   # -> data/mine
    python data/text/prepare.py --input=posts.jsonl --text_key=body
    python train.py config/quickstart.py --dataset=mine --out_dir=out-mine

A folder is read recursively: every file with the suffix of a text or a table.
Tables are .jsonl, .json, .csv, .tsv and .parquet; each row is a document. JSON is
recognised under any name. gzip, bzip2, xz and zstd are unpacked. --separator
cuts a text file into documents.

--tokenizer chooses the vocabulary:
    byte   256 bytes: any text, any prompt, no network
    char   one per distinct character; prompts can use no other characters
    bpe    8,192 pieces of words (--vocab_size), trained on the training split:
           a third of the tokens or fewer, for texts of some MB
    word   the 10,000 most frequent words (--vocab_size) of the training split
    gpt2   GPT-2's 50,257 pieces of words: for large texts, to finetune GPT-2
           (or cl100k_base, o200k_base: GPT-4's, GPT-4o's)
    FILE   a tokenizer trained or exported before, such as tokenizer.json

val.bin, on which no model is trained, holds
    for a single text            its last tenth,
    for fewer than 100 documents the last tenth of each,
    for more documents           every tenth, whole, chosen by its content.
--val_fraction=0.1 is that tenth.

After an interruption, run the same command again: it continues after the last
finished shard.
"""

import itertools
import os
import shlex
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import documents, encode, pages

FEW = 100  # documents; a tenth of fewer would not represent the others


def main():
    parser = encode.make_parser(__doc__)
    add = parser.add_argument
    add('--input', required=True,
        help='a text, a folder, or a .jsonl, .json, .csv, .tsv, .parquet file')
    add('--name', help='name of the dataset (that of the input)')
    add('--text_key', default='text', help='field of a table that holds the text')
    add('--separator', help="text between the documents of a text file, such as '<|endoftext|>'")
    add('--out_dir', help='folder to write to, in place of --name (data/NAME)')
    encode.add_options(parser, tokenizer='byte', val_fraction=0.1)
    args = parser.parse_args()

    # find the input and the folder to write to
    started = time.time()
    documents.check_fraction(args.val_fraction)
    files = documents.list_files(args.input, args.text_key)
    dataset, name, out_dir = encode.output_folder(args.name, args.input, args.out_dir)

    # choose how to split
    def read():
        return documents.read_documents(args.input, args.text_key, separator=args.separator)

    is_text = (len(files) == 1 and not args.separator
               and documents.kind_of(files[0], args.text_key) == 'text')
    first = list(itertools.islice(read(), 1 if is_text else FEW))
    pages.note_pages(args.input, files, first)
    for path in files[:FEW]:
        if (documents.kind_of(path, args.text_key) == 'text'
                and documents.begins_like_json(path)):
            print(f'note: {path} begins like JSON that has no text in {args.text_key!r}, so the '
                  f'JSON itself is the text; if a field holds the text: --text_key=NAME; if the '
                  f'first line is damaged, name the file .jsonl', file=sys.stderr)
            break
    if is_text:
        how = 'the end of the text'
    elif len(first) < FEW:
        how, split = 'the end of each document', documents.split_each
    else:
        how, split = 'whole documents, chosen by content', documents.split_documents

    def pieces():
        return (documents.split_text(files[0], args.val_fraction) if is_text
                else split(read(), args.val_fraction))

    # encode and write
    corpus = encode.Corpus(
        pieces, documents=not is_text, val_fraction=args.val_fraction,
        source=os.path.basename(os.path.abspath(args.input)), shard_tokens=args.shard_tokens,
        total=documents.text_size(files), workers=args.num_proc)
    tokenizer = encode.make_tokenizer(args.tokenizer, corpus, args.vocab_size)
    meta = encode.write_dataset(out_dir, corpus, tokenizer)
    if not is_text:
        print(f'{meta["documents"]["train"]:,} documents in train, '
              f'{meta["documents"]["val"]:,} in val')
    print(f'val is {how}: {meta["bytes"]["val"] / sum(meta["bytes"].values()):.1%} of the text')
    encode.report(out_dir, meta, started, f'python train.py config/quickstart.py '
                                   f'--dataset={shlex.quote(dataset)} --out_dir=out-{name}')


if __name__ == '__main__':
    encode.run(main)
