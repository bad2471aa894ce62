"""Dropout by the passes over a text, and the recipe for a small one. Run: pytest tests/test_small_data.py"""

import json

import pytest
from conftest import ROOT, TINY, Folder, encode, make_text, same_state, write_dataset

from data import mixture
from flatgpt.parallel import World


@pytest.mark.parametrize('steps, meta, dropout', [
    (0, 'json', 0.0), (10, 'json', 0.0), (24, 'json', 0.0), (80, 'pkl', 0.1), (240, 'json', 0.2), (720, 'json', 0.3),
    (9999, 'json', 0.3), (40, 'json', 0.042)])
def test_dropout_by_passes(tmp_path, steps, meta, dropout):
    """A step of 128 tokens reads an eighth of 1,024. log(5 / 3) / log(10 / 3) = 0.424 between 3 passes and 10."""
    write_dataset(tmp_path / 'text', encode(make_text(1024)), encode(make_text(99)), meta=meta)
    config = {**TINY, 'dropout': 'auto', 'max_iters': steps, 'dataset': str(tmp_path / 'text'), 'total_batch_size': 0,
              'anneal_dataset': '', 'anneal_fraction': 0.2, 'documents': 'flat', 'lr_decay_iters': None}
    data = mixture.Data(config)
    data.prepare(is_first=True)
    assert data.choose_dropout(config, World()) == dropout
    assert data.choose_dropout({**config, 'dropout': 0.5}, World()) == 0.5


def test_dropout_of_a_mixture(tmp_path, capsys):
    """The text that is read most often decides: 3/4 of 40 steps of 128 tokens are 30 passes over 128 tokens."""
    for name, n in (('short', 128), ('long', 4096)):
        write_dataset(tmp_path / name, encode(make_text(n, n)), encode(make_text(99)))
    config = {**TINY, 'dropout': 'auto', 'max_iters': 40, 'total_batch_size': 0, 'anneal_dataset': '', 'lr_decay_iters': None,
              'dataset': f'{tmp_path}/short:3,{tmp_path}/long:1', 'anneal_fraction': 0.2, 'documents': 'flat'}
    data = mixture.Data(config)
    data.prepare(is_first=True)
    assert data.choose_dropout(config, World()) == 0.2
    assert 'dropout 0.2: the run passes 30.0 times over its text' in capsys.readouterr().out


def test_auto_is_its_number(folder):
    """94 steps of 128 tokens pass 4.01 times over 3,000: dropout 0.024, the same bits as if it were given."""
    run = folder.train(dropout='auto', max_iters=94, eval_interval=94).ok()
    assert 'dropout 0.024: the run passes 4.0 times over its text' in run.out
    assert json.loads((folder.path / 'out' / 'config.json').read_text())['dropout'] == 0.024
    folder.train(dropout=0.024, max_iters=94, eval_interval=94, out_dir='given').ok()
    same_state(folder.checkpoint(), folder.checkpoint('given'))
    # a longer run passes more often
    run = folder.train(dropout='auto', max_iters=96, eval_interval=96, init_from='resume').ok()
    assert 'dropout 0.026' in run.out and folder.checkpoint()['config']['dropout'] == 0.026
    folder.train(dropout='none').refused("dropout=none: expected float or 'auto'")


def test_recipe_stops_when_val_turns(tmp_path):
    """On a text of 20 lines a model learns these by heart, and the run ends by itself long before its last step."""
    write_dataset(tmp_path / 'data' / 'book', encode(make_text(400)), encode(make_text(333, seed=1)))
    folder, recipe = Folder(tmp_path), ROOT / 'config' / 'small_data.py'
    small = {'dataset': 'book', 'n_layer': 2, 'n_embd': 32, 'n_head': 2, 'block_size': 16, 'batch_size': 16,
             'eval_interval': 10, 'eval_iters': 1, 'out_dir': 'out', 'device': 'cpu', 'sample_tokens': 0, 'compile': False}
    run = folder.start('train.py', recipe, **small).ok()
    last, best = folder.checkpoint(), folder.checkpoint(name='best.pt')
    assert 'val loss has not improved for 4 evaluations after step' in run.out
    assert last['iter_num'] == best['iter_num'] + 40 < 600 and last['config']['dropout'] == 0.3
    assert 'fits in' in folder.start('train.py', recipe, plan='8xH200', dataset='book').ok().out
