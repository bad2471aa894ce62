"""Prepare the standard library of the running Python as pieces of words.

    python data/python_bpe/prepare.py                     # trains a BPE of 2,048 ids
    python data/python_bpe/prepare.py --vocab_size=4096
    python train.py config/quickstart.py                  # the next step

The text and its split are those of data/python_stdlib. The vocabulary is trained on
the training split. Takes about six seconds on two cores.
"""

import os
import runpy

HERE = os.path.dirname(os.path.abspath(__file__))

if __name__ == '__main__':
    # the other script finds the repository from any folder
    stdlib = runpy.run_path(os.path.join(os.path.dirname(HERE), 'python_stdlib', 'prepare.py'))
    stdlib['encode'].run(lambda: stdlib['main'](__doc__, HERE, 'bpe', 2048))
