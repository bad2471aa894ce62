"""lab/mixture.py: each val loss falls with its text's share."""

import json

import pytest
from conftest import load_lab

from configurator import UserError

TINY = {'corpus': 'bytes', 'input': 'target.txt', 'steps': 40, 'n_layer': 1, 'n_head': 2, 'n_embd': 32,
        'block_size': 16, 'batch_size': 8, 'shares': '0,0.5,1', 'out': 'out'}


def test_losses_follow_the_shares(texts):
    (texts.path / 'target.txt').write_text(''.join(chr(65 + i * i % 23) for i in range(9000)))  # of other letters
    run = texts.start('lab.mixture', **TINY).ok()
    points = json.loads((texts.path / 'out/mixture.json').read_text())['points']
    shares, text, corpus = zip(*points, strict=True)
    assert shares == (0, 0.5, 1) and text[0] > text[1] > text[2] and corpus[0] < corpus[1] < corpus[2]
    assert 'share of the text' in run.out and (texts.path / 'out/mixture.png').stat().st_size > 1000


def test_shares_are_checked():
    for shares in ('', 'a', '0.5,2', '-1'):
        with pytest.raises(UserError, match='expected numbers from 0 to 1'):
            load_lab('mixture', f'--shares={shares}').read_shares()
