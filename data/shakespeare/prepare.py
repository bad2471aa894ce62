"""Prepare tiny Shakespeare (1.1 MB) with GPT-2's BPE, to finetune GPT-2.

    python data/shakespeare/prepare.py               # downloads input.txt
    python data/shakespeare/prepare.py --input=FILE  # without a network
    python train.py config/finetune_shakespeare.py   # the next step

Takes a second. Writes train.bin (301,966 tokens), val.bin (36,059) and
meta.json beside this script. tiktoken downloads GPT-2's vocabulary once.
--tokenizer chooses another one, to train from scratch.
"""

import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import documents, download, encode


def main():
    parser = encode.make_parser(__doc__)
    parser.add_argument('--input', help='a text file, in place of the download')
    encode.add_options(parser, tokenizer='gpt2', out_dir=HERE)
    args = parser.parse_args()

    path = download.get_shakespeare(args.input, HERE,
                                    'python data/shakespeare/prepare.py --input=FILE')
    started = time.time()
    corpus = encode.Corpus(
        lambda: documents.split_text(path, 0.1), documents=False, source=os.path.basename(path),
        val_fraction=0.1, shard_tokens=args.shard_tokens, total=os.path.getsize(path),
        workers=args.num_proc)
    tokenizer = encode.make_tokenizer(args.tokenizer, corpus, args.vocab_size)
    meta = encode.write_dataset(args.out_dir, corpus, tokenizer)
    encode.report(args.out_dir, meta, started, 'python train.py config/finetune_shakespeare.py')


if __name__ == '__main__':
    encode.run(main)
