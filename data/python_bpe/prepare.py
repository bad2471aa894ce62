"""Prepare the standard library of the running Python as pieces of words.

    python data/python_bpe/prepare.py                     # trains a BPE of 2,048 ids
    python data/python_bpe/prepare.py --vocab_size=4096
    python train.py config/quickstart.py                  # the next step

The text and its split are those of data/python_stdlib. The vocabulary is trained on
the training split. Takes about six seconds on two cores.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # so that it runs from any folder

from data import encode
from data.python_stdlib.prepare import main

if __name__ == '__main__':
    encode.run(lambda: main(__doc__, HERE, 'bpe', 2048))
