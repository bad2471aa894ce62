"""lab/long_context.py: a model reads past its context in three ways. Run: pytest tests/test_lab_long_context.py"""

import json

import numpy as np
import pytest
import torch
from conftest import load_lab

from lab import common
from model import GPT

TINY = {'corpus': 'bytes', 'steps': 40, 'block_size': 16, 'finetune_steps': 10, 'batch_tokens': 128, 'windows': 16,
        'n_layer': 1, 'n_head': 2, 'n_embd': 32, 'out': 'out'}


@pytest.fixture(scope='module')
def lab():
    return load_lab('long_context', '--block_size=16', '--windows=4')


def test_the_ways_share_weights_and_differ_in_rotation(lab):
    torch.manual_seed(0)
    model = GPT(common.gpt_config(vocab_size=256, block_size=16, n_layer=1, n_head=2, n_embd=64))
    ways = {way: lab.extended(model, way) for way in lab.WAYS}
    assert model.config.block_size == 16 and model.config.rope_scaling is None
    positions = torch.arange(64)
    turned = {way: longer.rotation(positions) for way, longer in ways.items()}
    assert torch.equal(turned['as it is'][:, :16], model.rotation(positions[:16]))
    torch.testing.assert_close(turned['interpolation'][:, ::4], model.rotation(positions[:16]))
    scale = ways['YaRN'].config.rope_scaling['attention_factor']
    fast = turned['YaRN'][..., 0] / scale  # the fastest channel turns as before
    torch.testing.assert_close(fast, model.rotation(positions)[..., 0])
    assert all(longer.config.block_size == 64 for longer in ways.values())


def test_losses_are_those_of_the_model(lab):
    torch.manual_seed(0)
    model = GPT(common.gpt_config(vocab_size=256, block_size=16, n_layer=1, n_head=2, n_embd=32))
    text = np.random.default_rng(0).integers(97, 123, 200).astype(np.uint8)
    losses = lab.losses_of(model, text)
    assert losses.shape[1] == 16
    x = torch.from_numpy(text[:17].astype(np.int64))[None]
    assert losses[0].mean() == pytest.approx(model(x[:, :-1], x[:, 1:])[1].item(), abs=1e-4)


@pytest.mark.slow
def test_script(texts):
    run = texts.start('lab.long_context', **TINY).ok()
    figures = json.loads((texts.path / 'out' / 'long_context.json').read_text())
    assert len(figures['rows']) == 7 and all(len(curve) == 64 for curve in figures['curves'].values())
    assert 'YaRN' in run.out and (texts.path / 'out' / 'long_context.png').stat().st_size > 10_000
