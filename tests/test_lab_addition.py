"""data/addition: every sum once, none held out that stands commuted in train. lab/addition.py: units first wins."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, load_lab
from torch.nn import functional as F

import tokenizer
from data import datasets, tokens
from model import GPT, GPTConfig


def prepare(folder, name, **options):
    return folder.start('data/addition/prepare.py', out_dir=f'data/{name}', **options).ok()


def read(folder, name):
    """{'train': [line, ...], 'val': ...}"""
    path = folder.path / 'data' / name
    meta = datasets.load_meta(path)
    decode = tokenizer.from_dict(meta['tokenizer']).decode
    return {split: decode(tokens.open_tokens(path, split, meta, 1)).splitlines() for split in ('train', 'val')}


@pytest.mark.parametrize('digits', [1, 2])
def test_dataset(folder, digits):
    prepare(folder, 'plain', digits=digits)
    prepare(folder, 'reversed', digits=digits, order='reversed')
    prepare(folder, 'other', digits=digits, seed=1)
    plain, other = read(folder, 'plain'), read(folder, 'other')
    pairs = {}
    for split, lines in plain.items():
        for line in lines:
            a, b, answer = re.fullmatch(rf'(\d{{{digits}}})\+(\d{{{digits}}})=(\d{{{digits + 1}}})', line).groups()
            assert int(a) + int(b) == int(answer)
            assert (a, b) not in pairs
            pairs[a, b] = split
    assert len(pairs) == 100**digits
    assert all(pairs[b, a] == split for (a, b), split in pairs.items())
    held_out = {frozenset(pair) for pair, split in pairs.items() if split == 'val'}
    assert len(held_out) == round(0.1 * 10**digits * (10**digits + 1) / 2)
    assert plain['train'] != sorted(plain['train'])
    assert read(folder, 'reversed') == {split: [line[: -digits - 1] + line[: -digits - 2 : -1] for line in lines]
                                        for split, lines in plain.items()}
    assert set(other['val']) != set(plain['val'])
    assert set(other['train'] + other['val']) == set(plain['train'] + plain['val'])


def test_readme_has_the_numbers_of_the_files(folder):
    prepare(folder, 'addition')
    page = (ROOT / 'data/addition/README.md').read_text(encoding='utf-8')
    for split in ('train', 'val'):
        data = (folder.path / 'data' / 'addition' / f'{split}.bin').read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        assert f'| {split}.bin | {len(data) // 26:,} | {len(data) // 2:,} | `{sha256}` |' in page


def test_train_takes_it(folder):
    prepare(folder, 'addition_2', digits=2)
    run = folder.train(dataset='addition_2', block_size=20)
    assert run.code == 0, run.out
    assert folder.checkpoint()['model_args']['vocab_size'] == 13
    assert '\n12+34=' in folder.sample(start='\n12+34=', num_samples=1, max_new_tokens=3).ok().out


@pytest.mark.parametrize('option, said', [
    ({'digits': 4}, '--digits: invalid choice: 4 (choose from'), ({'order': 'backwards'}, "'reversed'"),
    ({'val_fraction': 1.0}, 'val_fraction is 1.0; expected a number between 0 and 1'),
    ({'seed': -1}, '--seed=-1: expected a number from 0'),
])
def test_dataset_refuses(folder, option, said):
    folder.start('data/addition/prepare.py', out_dir='data/bad', **option).wait().refused(said)
    assert not (folder.path / 'data' / 'bad').exists()


def ids_of(lab, *lines):
    return np.array([[lab.CHARS.index(char) for char in line] for line in lines], dtype=np.uint16)


def test_sequences_are_masked():
    lab = load_lab('addition')
    line = ids_of(lab, '123+456=0579\n')
    x, y = lab.sequences(line, 'plain')
    assert ''.join(lab.CHARS[i] for i in x[0]) == '123+456=057'
    assert y[0].tolist() == [-1] * 7 + [lab.CHARS.index(char) for char in '0579']
    x, y = lab.sequences(line, 'reversed')
    assert ''.join(lab.CHARS[i] for i in x[0]) == '123+456=975'
    assert y[0].tolist() == [-1] * 7 + [lab.CHARS.index(char) for char in '9750']
    assert ''.join(lab.CHARS[i] for i in line[0]) == '123+456=0579\n'  # the dataset's own line is as it was


def test_loss_is_that_of_the_answer():
    lab = load_lab('addition')
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=13, block_size=11))
    x, y = lab.sequences(ids_of(lab, '123+456=0579\n', '999+001=1000\n'), 'reversed')
    logits, loss = model(x, y)
    by_hand = [-F.log_softmax(logits[row], dim=-1)[7 + i, lab.CHARS.index(char)].item()
               for row, answer in enumerate(('9750', '0001')) for i, char in enumerate(answer)]
    assert loss.item() == pytest.approx(sum(by_hand) / 8, abs=1e-6)


def test_carries_by_hand():
    lab = load_lab('addition')
    a, b = np.array([123, 8, 95, 999, 500]), np.array([456, 5, 7, 1, 500])
    assert lab.carries(a, b, 3).astype(int).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1]]
    assert lab.nines(a, b, 3).tolist() == [0, 0, 1, 2, 0]


@pytest.mark.parametrize('order', ['plain', 'reversed'])
def test_right_digits_are_those_of_greedy_decoding(folder, order):
    prepare(folder, 'addition_1', digits=1)
    lab = load_lab('addition', '--steps=40', '--n_embd=16', '--n_layer=1', '--batch_size=32')
    lines, a, b = lab.read_sums(folder.path / 'data' / 'addition_1', 'train')
    torch.manual_seed(0)
    model = lab.new_model(4 + 1)
    for _ in lab.common.train(model, lambda step: lab.sequences(lines, order), 40):
        pass
    right = lab.right_digits(model, lines, order)
    ids = torch.from_numpy(lines[:, :4].astype(np.int64))
    model.eval()
    for _ in range(2):
        ids = torch.cat((ids, model(ids)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    written = ids[:, 4:].flip(1) if order == 'reversed' else ids[:, 4:]
    equal = lab.number(written.numpy()) == a + b
    assert 0 < equal.sum() < len(equal)
    assert right.all(axis=1).tolist() == equal.tolist()
    units = (ids[:, 4 if order == 'reversed' else 5] - 2).numpy() == (a + b) % 10
    assert order == 'plain' or right[:, 0].tolist() == units.tolist()


@pytest.mark.slow
def test_units_first_wins(folder):
    prepare(folder, 'addition_2', digits=2)
    run = folder.start('lab.addition', dataset='addition_2', steps=150, batch_size=128, n_embd=24, seeds=1).ok()
    found = json.loads((folder.path / 'out-lab' / 'addition.json').read_text())
    assert '9 in 1 place' in run.out and 'thousands' not in run.out
    assert found['exact']['reversed'] == [pytest.approx(1 - found['wrong']['reversed']['all'])]
    assert found['wrong']['reversed']['all'] < 0.05
    assert found['wrong']['plain']['all'] > 2 * found['wrong']['reversed']['all']
    assert [curves[0][-1][0] for curves in found['curves'].values()] == [150, 150]
    assert (folder.path / 'out-lab' / 'addition.png').stat().st_size > 10_000


@pytest.mark.parametrize('setting, said', [
    ({'dataset': 'tiny'}, 'expected sums such as 123+456=0579'), ({'dataset': 'none'}, 'no dataset in data'),
    ({'dataset': 'turned'}, 'python data/addition/prepare.py, and leave out --dataset'),
    ({'dataset': 'plain', 'n_train': 1000}, 'n_train=1000: expected 1 to 90'),
    ({'steps': 0}, 'steps=0: expected 1 or more'), ({'seed': -1}, 'seed=-1: expected at least 0'),
    ({'dataset': 'plain', 'n_embd': 30}, 'n_embd=30 is not divisible by n_head=4'),
])
def test_refuses(folder, setting, said):
    prepare(folder, 'turned', digits=1, order='reversed')
    prepare(folder, 'plain', digits=1)
    folder.start('lab.addition', **setting).wait().refused(said)
