"""Make a training set of the running Python's own standard library.
Needs no network and no download.

    python data/python_stdlib/prepare.py                   # one token per byte
    python data/python_stdlib/prepare.py --tokenizer=gpt2  # or char, bpe, ...
    python train.py config/quickstart.py                   # what comes next

Takes a second and 65 MB of disk. How much text there is depends on the Python:
about 31 MB where the standard library includes its tests, 11 MB where the
system leaves them out (Debian's python3).
"""

import argparse
import os
import sys
import sysconfig
import time
import tokenize

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from configurator import UserError
from data.documents import fraction_for, split_documents
from data.encode import add_options, make_tokenizer, positive, report, run, write_dataset

LONGEST = 50_000  # characters of a file in val.bin, so that at least seven files share it


def find_sources(stdlib):
    """Paths of the .py files of the standard library, relative to stdlib, sorted."""
    paths = []
    for folder, subfolders, names in os.walk(stdlib):
        # Installed packages are not the standard library; config-* and _sysconfigdata* differ between two builds of
        # the same version, sitecustomize.py belongs to the machine.
        subfolders[:] = [name for name in subfolders
                         if name not in ('site-packages', 'dist-packages', '__pycache__')
                         and not name.startswith('config-')]
        paths += [os.path.relpath(os.path.join(folder, name), stdlib) for name in names
                  if name.endswith('.py') and not name.startswith(('_sysconfigdata', 'sitecustomize'))]
    return sorted(paths, key=lambda path: path.split(os.sep))


def read_sources(stdlib, paths):
    """Yield the text of each file; those that are invalid on purpose (tests of encoding errors) are left out."""
    for path in paths:
        try:
            with tokenize.open(os.path.join(stdlib, path)) as file:  # heeds "# -*- coding: ... -*-"
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add_options(parser, tokenizer='byte', out_dir=HERE)
    parser.add_argument('--val_bytes', type=positive, default=350_000,
                        help='files of about so many bytes together become val.bin, evaluated whole (350,000)')
    args = parser.parse_args()

    started = time.time()
    stdlib = sysconfig.get_paths()['stdlib']
    paths = find_sources(stdlib)
    if not paths:
        raise UserError(f'no .py files in {stdlib}, where this Python says its standard library is. Use a Python with '
                         f'sources, or your own text: python data/text/prepare.py --input=FILE')
    documents = list(read_sources(stdlib, paths))  # 31 MB: holding them costs less than reading them twice
    val_fraction = fraction_for(documents, args.val_bytes, LONGEST)

    def pieces():
        return split_documents(documents, val_fraction, LONGEST)

    tokenizer = make_tokenizer(args.tokenizer, pieces, documents=True, vocab_size=args.vocab_size)
    version = '.'.join(map(str, sys.version_info[:3]))
    meta = write_dataset(args.out_dir, pieces, tokenizer, documents=True,
                                source=f'standard library of Python {version}', val_fraction=val_fraction,
                                shard_tokens=args.shard_tokens, workers=args.num_proc,
                                total=sum(os.path.getsize(os.path.join(stdlib, path)) for path in paths))
    used = sum(meta['documents'].values())
    print(f'{used:,} files of the standard library of Python {version} '
          f'({len(paths) - used} empty or undecodable left out)')
    report(args.out_dir, meta, started, 'python train.py config/quickstart.py')


if __name__ == '__main__':
    run(main)
