"""data/mixture.py: shares, patterns, sources of a run. Run: pytest tests/test_mixture.py"""

import numpy as np
import pytest
import torch
from conftest import encode, load_or_skip, make_text, same_state, write_dataset
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from data.mixture import SOURCE, Annealed, Data, Mixture, Sources, apportion, parse
from data.tokens import Batches, Rows, count_targets, draw, gather
from flatgpt.cut import Cut, Stages
from flatgpt.parallel import World

CPU = torch.device('cpu')
DIGESTS = ['a' * 64, 'b' * 64, 'c' * 64]
SHARES = st.lists(st.just(0.0) | st.floats(0.1, 1), min_size=1, max_size=6).filter(sum).map(
    lambda shares: [share / sum(shares) for share in shares])


def test_parse(tmp_path, monkeypatch):
    assert parse('web:0.7,code:0.2, books:0.1') == pytest.approx({'web': 0.7, 'code': 0.2, 'books': 0.1})
    assert parse('web:7,code:3') == {'web': 0.7, 'code': 0.3} and parse('web:1,old:0') == {'web': 1.0}
    assert parse('a/b:1e1,c:30') == {'a/b': 0.25, 'c': 0.75} and parse('web:2') == {'web': 1.0}
    for plain in ('web', 'C:\\data', '/x:1/y', ''):
        assert parse(plain) == {plain: 1.0}
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a,b:1').mkdir()
    assert parse('a,b:1') == {'a,b:1': 1.0}  # a folder
    for wrong, message in (('a:0.5,b', "'b' has no share"), ('a:0.5,:1', "':1' has no share"), ('a:b', "'a:b' has no share"), ('a:', "'a:' has"), ('a:x,b:1', "'a:x' has"),
                           ('a:1,a:2', 'names a twice'), ('a:-1,b:2', 'share of a is -1; expected 0 or more'),
                           ('a:nan,b:1', 'share of a is nan'), ('a:1e999,b:1', 'share of a is 1e999'),
                           ('a:0,b:0', 'all shares are 0')):
        with pytest.raises(UserError, match=message):
            parse(wrong)


@given(SHARES, st.integers(1, 500))
def test_largest_remainder(shares, n):
    counts = apportion(shares, n)
    assert counts.sum() == n and (np.abs(counts - np.array(shares) * n) < 1).all()
    remainders = np.array(shares) * n - np.floor(np.array(shares) * n)
    raised = counts > np.array(shares) * n - remainders + 0.5
    assert raised.all() or not raised.any() or remainders[raised].min() >= remainders[~raised].max() - 1e-9


@given(SHARES, st.integers(1, 7), st.integers(0, 10**6), st.integers(0, 300))
def test_shares_of_any_hundred_steps_are_exact(shares, sequences, first, n):
    """Within a sequence in a stretch of 100 steps, evenly in it; counts so far agree with the sources."""
    mixture = Mixture(shares, sequences)
    sources = mixture.sources(first, 100 * sequences)
    counts = np.bincount(sources, minlength=len(shares))
    assert (np.abs(counts - np.array(shares) * 100 * sequences) < 1).all()
    drawn = mixture.drawn(first + n) - mixture.drawn(first)
    assert (drawn == np.bincount(mixture.sources(first, n), minlength=len(shares))).all()
    half = np.bincount(sources[: 50 * sequences], minlength=len(shares))
    assert (np.abs(half - counts / 2) <= len(shares)).all()


@given(SHARES, st.integers(1, 3), st.integers(0, 900), st.integers(0, 1000), st.integers(0, 300))
def test_annealing(shares, sequences, start, first, n):
    late = shares[::-1]
    annealed = Annealed(Mixture(shares, sequences), Mixture(late, sequences), start)
    whole = annealed.sources(0, first + n)
    assert (annealed.sources(first, n) == whole[first:]).all()
    assert (annealed.drawn(first + n) == np.bincount(whole, minlength=len(shares))).all()
    assert (whole[:start] == Mixture(shares, sequences).sources(0, len(whole[:start]))).all()
    assert (whole[start:] == Mixture(late, sequences).sources(0, len(whole[start:]))).all()


def test_a_share_without_a_sequence_is_refused():
    with pytest.raises(UserError, match='a share of 0.004 has no sequence in 100 steps of 1; expected at least 0.01'):
        Mixture([0.996, 0.004], 1)


def test_another_batch_size_keeps_the_places(several):
    """After a resume with four times the batch each dataset goes on where it was; the last steps keep their place."""
    changes = {'dataset': 'tiny:0.7,other:0.3', 'anneal_dataset': 'other', 'anneal_fraction': 0.5}
    several.train(**changes, max_iters=5).ok()
    before = several.log()[-1]['sources']
    several.train(**changes, total_batch_size=512, init_from='resume', eval_interval=5).ok()
    at = {line['step']: line['sources'] for line in several.log() if 'sources' in line}
    assert at[10]['tiny']['tokens'] - before['tiny']['tokens'] == pytest.approx(0.7 * 5 * 512, abs=32)
    # from step 10 of 20 on the other alone
    assert at[20]['tiny']['tokens'] == at[15]['tiny']['tokens'] == at[10]['tiny']['tokens']
    kept = several.checkpoint()['mixture']
    assert kept['anneal_start'] == 5 * 8 + 5 * 32 and sum(kept['drawn'].values()) == 5 * 8 + 15 * 32
    several.train(**changes, total_batch_size=256, init_from='resume', max_iters=22, lr_decay_iters=22).ok()
    assert several.checkpoint()['mixture']['anneal_start'] == kept['anneal_start']  # it was reached


def test_stages_of_the_batch_move_the_last_datasets(several):
    """10 steps of 4 sequences and 4 of 8 come before the last 6, of the other dataset alone."""
    changes = {'dataset': 'tiny:0.7,other:0.3', 'anneal_dataset': 'other', 'anneal_fraction': 0.3, 'batch_stages': 2}
    for max_iters, init_from in ((12, 'scratch'), (20, 'resume')):
        several.train(**changes, eval_interval=7, max_iters=max_iters, init_from=init_from).ok()
        assert several.checkpoint()['mixture']['anneal_start'] == 72
    at = {line['step']: line['sources'] for line in several.log() if 'sources' in line}
    assert [sum(source['tokens'] for source in at[step].values()) for step in (7, 14, 20)] == [16 * 28, 16 * 72, 16 * 120]
    assert at[20]['tiny']['tokens'] == at[14]['tiny']['tokens'] == pytest.approx(0.7 * 16 * 72, abs=16)


def test_order_and_spelling_of_names_change_nothing(several):
    several.train(dataset='tiny:0.7,other:0.3', out_dir='a').ok()
    several.train(dataset=f'{several.path}/data/other:3,data/tiny:7', out_dir='b').ok()
    same_state(several.checkpoint('a'), several.checkpoint('b'))
    run = several.train(dataset='data/other:0.3,tiny:0.7', out_dir='a', init_from='resume', max_iters=22).ok()
    assert 'starts anew' not in run.out
    run = several.train(dataset='other:0.4,tiny:0.6', out_dir='b', init_from='resume', max_iters=22).ok()
    assert 'the datasets hold other texts, or have other shares, than at step' in run.out


def three_sources():
    """Running text, text of another length, and rows of conversations with a mask."""
    generator = np.random.default_rng(0)
    rows = Rows(generator.integers(0, 50, 9 * 7).astype(np.uint16), generator.integers(0, 2, 63).astype(np.uint8), 9)
    return [np.arange(100, dtype=np.uint16), np.arange(100, 131, dtype=np.uint16), rows]


def test_batches_of_sources():
    """Windows lie in one source, each visits its own epochs, and targets count as in the source alone."""
    tokens = three_sources()
    sources = Sources(tokens, DIGESTS, Mixture([0.5, 0.3, 0.2], 10), np.zeros(3, int), 200)
    seen = {0: [], 1: [], 2: []}
    for step in range(20):
        starts = draw(sources, 10 * step, 10, 8, seed=3)
        x, y = gather(sources, starts, 8, 200)
        n_targets = 0
        for i, start in enumerate(starts):
            k, own = int(start >> SOURCE), start & (1 << SOURCE) - 1
            seen[k].append(int(own))
            own_x, own_y = gather(tokens[k], np.array([own]), 8, 200)
            assert torch.equal(x[i], own_x[0]) and torch.equal(y[i], own_y[0])
            n_targets += count_targets(tokens[k], np.array([own]), 8)
        assert n_targets == count_targets(sources, starts, 8) == int((y >= 0).sum())
    assert [len(seen[k]) for k in range(3)] == [100, 60, 40]
    for first in range(0, 35, 7):  # each epoch visits every row of c once
        assert sorted(seen[2][first : first + 7]) == [9 * row for row in range(7)]
    assert len(set(seen[0])) > 30


def test_processes_see_the_batches_of_one():
    sources = Sources(three_sources(), DIGESTS, Mixture([0.5, 0.3, 0.2], 12), np.zeros(3, int), 200)
    whole = Batches(sources, Cut(12, 8, 12, 1), 1, 200, CPU, World())(12 * 8 * 5)[0][0]
    parts = [Batches(sources, Cut(12, 8, 2, 2), 1, 200, CPU, World(rank, rank, 3))(12 * 8 * 5)[0] for rank in range(3)]
    for k in range(2):
        assert torch.equal(torch.cat([part[k] for micro_batches in parts for part in micro_batches]), whole[k])


def test_processes_see_the_batches_of_one_in_a_stage():
    """In the first of two, half of 12 sequences; then all."""
    for step, n in ((4, 6), (5, 12)):
        whole, count = Batches(three_sources()[0], Cut(n, 8, n), 1, 200, CPU, World())(8 * 30)
        parts = [Batches(three_sources()[0], Cut(12, 8, 2, 2, Stages(2, 10)), 1, 200, CPU, World(rank, rank, 3))(8 * 30, step)
                 for rank in range(3)]
        assert {part[1] for part in parts} == {count} == {8 * n}
        assert torch.equal(torch.cat([x for part, _ in parts for x, *_ in part]), whole[0][0])
        assert sum(share for part, _ in parts for *_, share in part) == pytest.approx(3)


@pytest.fixture
def several(folder):
    """The folder, with a second dataset data/other, and data/alien of another vocabulary."""
    write_dataset(folder.path / 'data/other', encode(make_text(2000, seed=5)), encode(make_text(300, seed=6)))
    write_dataset(folder.path / 'data/alien', [0, 1] * 500, [0, 1] * 50, chars='ab')
    return folder


def test_a_mixture_resumes_bit_for_bit(several):
    """Also in two processes; the log has each dataset's loss, tokens and epochs."""
    changes = {'dataset': 'tiny:0.6,other:0.4', 'anneal_dataset': 'other', 'anneal_fraction': 0.3}
    run = several.train(out_dir='whole', **changes).ok()
    assert 'val loss' in run.out and '(tiny ' in run.out and 'WARNING: other is read 4.' not in run.out
    several.train(out_dir='half', **changes, max_iters=10).ok()
    several.train(out_dir='half', **changes, init_from='resume').ok()
    same_state(several.checkpoint('half'), several.checkpoint('whole'))
    several.train_two(out_dir='two', **changes, total_batch_size=128, batch_size=2)
    logs = [[[line[key] for key in ('step', 'loss', 'val_loss') if key in line] for line in several.log(out_dir)]
            for out_dir in ('whole', 'half', 'two')]
    assert logs[0] == logs[1]
    for a, b in zip(logs[0], logs[2], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    last = several.log('whole')[-1]
    sources = last['sources']
    assert sources['tiny']['tokens'] + sources['other']['tokens'] == 20 * 8 * 16
    assert sources['tiny']['tokens'] == pytest.approx(14 * 0.6 * 8 * 16, abs=2 * 16)
    assert sources['other']['epochs'] == sources['other']['tokens'] / 2000
    assert last['val_loss'] == pytest.approx(0.6 * sources['tiny']['val_loss'] + 0.4 * sources['other']['val_loss'])


@pytest.mark.slow
def test_wrong_mixtures_are_refused(several):
    for dataset, *said in (
            ('tiny:0.5,alien:0.5', 'alien has another tokenizer than tiny'), ('tiny:0.5,othr:0.5', "did you mean 'other'"),
            ('tiny:0.5,tiny:0.5', 'names tiny twice'), ('tiny:-1,other:1', 'expected 0 or more')):
        several.train(dataset=dataset).refused(*said)
    several.train(anneal_dataset='other', decay_lr=False).refused('anneal_dataset', 'decay_lr=False')
    write_dataset(several.path / 'data/short', encode('abc'), encode('abc'))
    several.train(dataset='tiny:0.5,short:0.5').refused('data/short/train.bin has', 'block_size + 1 = 17')
    run = several.train(dataset='tiny:0.1,other:0.9', max_iters=80, eval_iters=1).ok()
    assert 'WARNING: other is read 4.6 times in this run, expected at most 4' in run.out
    several.train(dataset='tiny:0.5,other:0.5', out_dir='mixed', max_iters=2).ok()
    several.start('eval.py', out_dir='mixed', device='cpu').wait().refused('tiny, other', '--dataset=tiny')


def test_texts_and_conversations_mix(several, monkeypatch):
    """A nanoGPT folder without a tokenizer takes that of the others; a row fixes the context."""
    monkeypatch.chdir(several.path)
    write_dataset('data/plain', encode(make_text(500)), encode(make_text(100)), meta='pkl')
    config = {'dataset': 'plain:0.5,tiny:0.5', 'anneal_dataset': '', 'anneal_fraction': 0.2, 'decay_lr': True,
              'documents': 'flat'}
    data = Data(config)
    meta = data.prepare(True)
    assert meta['tokenizer']['kind'] == 'char' and data.path.endswith('plain') and len(data.stamps) == 4
    other = Data({**config, 'dataset': 'plain:0.4,tiny:0.6'}).prepare(True)
    assert other['digest'] != meta['digest']
    load_or_skip('gpt2')
    write_dataset('data/gpt2', [1, 2] * 50, [1, 2] * 50, meta=None)  # GPT-2's tokens, if nothing says otherwise
    with pytest.raises(UserError, match='has another tokenizer than'):
        Data({**config, 'dataset': 'gpt2:0.5,tiny:0.5'}).prepare(True)
