"""Prepare the standard library of the running Python. Needs no network.

    python data/python_stdlib/prepare.py                   # one token per byte
    python data/python_stdlib/prepare.py --tokenizer=gpt2  # or char, bpe, ...
    python train.py config/quickstart.py --dataset=python_stdlib    # the next step

Takes a second and 65 MB of disk. data/python_bpe holds the same text in pieces of
words. The size of the text depends on the Python: about 31 MB where the standard
library includes its tests, 11 MB where the system leaves them out (Debian's python3).
"""

import os
import sys
import sysconfig
import time
import tokenize

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from configurator import UserError
from data import documents, encode

LONGEST = 50_000  # characters of a file in val.bin, so that at least seven files share it


def find_sources(stdlib):
    """List the .py files of the standard library, relative to its folder, sorted.

    Skips installed packages, the files that differ between two builds of one version (config-*,
    _sysconfigdata*), and sitecustomize.py, which belongs to the machine.
    """
    paths = []
    for folder, subfolders, names in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if not name.startswith('config-') and
                         name not in ('site-packages', 'dist-packages', '__pycache__')]
        paths += [os.path.relpath(os.path.join(folder, name), stdlib) for name in names if
                  name.endswith('.py') and not name.startswith(('_sysconfigdata', 'sitecustomize'))]
    return sorted(paths, key=lambda path: path.split(os.sep))


def read_sources(stdlib, paths):
    """Yield the text of each file, except those that are undecodable on purpose."""
    for path in paths:
        try:
            with tokenize.open(os.path.join(stdlib, path)) as file:  # reads "# -*- coding: ..."
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield text


def main(doc=__doc__, folder=HERE, tokenizer='byte', vocab_size=None):
    """Write the dataset.

    doc, folder, tokenizer, vocab_size: of the script that runs this.
    """
    parser = encode.make_parser(doc)
    encode.add_options(parser, tokenizer=tokenizer, out_dir=folder)
    parser.add_argument('--val_bytes', type=encode.positive, default=350_000,
                        help='bytes of the files that become val.bin, about (350,000)')
    args = parser.parse_args()
    if args.tokenizer == tokenizer:
        args.vocab_size = args.vocab_size or vocab_size

    # read
    started = time.time()
    stdlib = sysconfig.get_paths()['stdlib']
    paths = find_sources(stdlib)
    if not paths:
        raise UserError(f'{stdlib}, the standard library of this Python, has no .py files. Use a '
                        f'Python with sources, or your own text: '
                        f'python data/text/prepare.py --input=FILE')
    sources = list(read_sources(stdlib, paths))  # 31 MB; reading them twice costs more
    val_fraction = documents.fraction_for(sources, args.val_bytes, LONGEST)

    # encode and write
    name = f'standard library of Python {".".join(map(str, sys.version_info[:3]))}'
    corpus = encode.Corpus(
        lambda: documents.split_documents(sources, val_fraction, LONGEST), documents=True,
        source=name, val_fraction=val_fraction, shard_tokens=args.shard_tokens,
        total=sum(os.path.getsize(os.path.join(stdlib, path)) for path in paths),
        workers=args.num_proc)
    encoder = encode.make_tokenizer(args.tokenizer, corpus, args.vocab_size)
    meta = encode.write_dataset(args.out_dir, corpus, encoder)
    n_used = sum(meta['documents'].values())
    print(f'{n_used:,} files of the {name} ({len(paths) - n_used} empty or undecodable left out)')
    dataset = os.path.basename(folder)
    encode.report(args.out_dir, meta, started,
                  f'python train.py config/quickstart.py --dataset={dataset}')


if __name__ == '__main__':
    encode.run(main)
