"""lab/law.py on runs made by the law itself, lab/scaling_laws.py on a small grid of real ones."""

import json
import signal

import numpy as np
import pytest

from configurator import UserError
from lab import law


def made_up(n=80, noise=0.0, coefficients=law.BESIROGLU):
    """Return n law.Runs that follow the law with some noise."""
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7.5, 10, n), 10 ** rng.uniform(9, 11.5, n)
    return law.Runs(N, D, law.loss_of(coefficients, N, D) * np.exp(noise * rng.standard_normal(n)))


def write_table(path, header, rows):
    path.write_text('\n'.join([header, *(','.join(map(str, row)) for row in rows)]) + '\n')


@pytest.mark.parametrize('coefficients', [law.BESIROGLU, law.HOFFMANN, (0.5, 3e3, 40.0, 0.6, 0.25)])
def test_fit_finds_the_coefficients(coefficients):
    assert law.fit(made_up(coefficients=coefficients)) == pytest.approx(coefficients, rel=0.01)


def test_an_outlier_does_not_pull_the_fit():
    runs = made_up()
    runs.loss[3] *= 1.5
    assert law.fit(runs) == pytest.approx(law.BESIROGLU, rel=0.02)


def test_bootstrap_covers_the_coefficients():
    runs = made_up(noise=0.003)
    best = law.fit(runs)
    samples = law.bootstrap(runs, best, 60, seed=0)
    low, high = np.percentile(samples, [1, 99], axis=0)
    assert (low < law.BESIROGLU).all() and (law.BESIROGLU < high).all()
    assert (samples == law.bootstrap(runs, best, 60, seed=0)).all()
    assert high[0] - low[0] < 0.2  # E is 1.8


def test_best_size_is_the_lowest_point_of_its_curve():
    C = 1e21
    N, D = law.best_size(law.BESIROGLU, C)
    assert 6 * N * D == pytest.approx(C)
    sizes = N * np.geomspace(0.1, 10, 2001)
    assert sizes[law.loss_of(law.BESIROGLU, sizes, C / 6 / sizes).argmin()] == pytest.approx(N, rel=0.01)


def test_valley():
    N = np.geomspace(1e5, 1e7, 7)
    assert law.valley(N, 2 + 0.1 * np.log(N / 3e5) ** 2) == (pytest.approx(3e5), pytest.approx(2))
    assert law.valley(N, 2 - 0.1 * np.log(N / 3e5) ** 2) is None  # a hill
    assert law.valley(N, 2 + 0.1 * np.log(N / 3e7) ** 2) is None  # larger ones were better still
    assert law.valley(N[:2], N[:2]) is None


def test_a_table_gives_its_coefficients_back(folder):
    N, D, loss = made_up(200, noise=0.002)
    loss[:5] *= 2  # left out
    write_table(folder.path / 'runs.csv', 'color,Model Size,Training FLOP,loss',
                [('#fae', n, 6 * n * d, value) for n, d, value in zip(N, D, loss, strict=True)])
    run = folder.start('lab.scaling_laws', table='runs.csv', leave_out=5, bootstraps=40, out='out').ok()
    figures = json.loads((folder.path / 'out' / 'scaling_laws_table.json').read_text())
    assert figures['runs'] == 195
    for i, name in enumerate(law.NAMES):
        assert abs(figures['fit'][name] - law.BESIROGLU[i]) < law.BESIROGLU_ERRORS[i]
        assert figures['low'][name] < figures['fit'][name] < figures['high'][name]
    assert 'Hoffmann 2022' in run.out and max(map(len, run.out.splitlines())) <= 80
    assert (folder.path / 'out' / 'scaling_laws_table.png').exists()


@pytest.mark.parametrize('header', [' N,Training Tokens,Loss', 'n_params,D (tokens),final loss (nats)'])
def test_columns_by_other_names(tmp_path, header):
    rows = [(float(i), 10.0 * i, 3.0 - 0.1 * i) for i in range(1, 13)]
    write_table(tmp_path / 'a.csv', header, rows)
    N, D, loss = law.read_table(tmp_path / 'a.csv')
    assert sorted(zip(N, D, loss, strict=True)) == rows
    write_table(tmp_path / 'a.csv', 'size,flops,loss', [(n, 6 * n * d, value) for n, d, value in rows])
    assert law.read_table(tmp_path / 'a.csv')[1] == pytest.approx(D)


@pytest.mark.parametrize('text, said', [
    ('', 'no column N, loss, D or C'), ('N,D\n1,2\n', 'no column loss among N, D'),
    ('N,D,loss\n1e6,1e8,3.5\n1e6,many,3.4\n', "line 3: '1e6,many,3.4' has no number"),
    ('N,D,loss\n1e6,1e8\n', "line 2: '1e6,1e8' has no number"), ('N,D,loss\n1e6,0,3.5\n', 'line 2: .*above 0'),
    ('N,D,loss\n1e6,1e8,nan\n', 'line 2: .*above 0'), ('N,D,loss\n1e6,1e8,3.5\n', '1 runs are left')])
def test_tables_that_can_not_be_fitted(tmp_path, text, said):
    (tmp_path / 'a.csv').write_text(text)
    with pytest.raises(UserError, match=said):
        law.read_table(tmp_path / 'a.csv')


GRID = {'dataset': 'tiny', 'n_layer': 1, 'block_size': 8, 'batch_size': 4, 'widths': '16,32,48', 'val_windows': 64,
        'budgets': '1e7,4e7', 'ratios': '1e-4,1000', 'bootstraps': 20, 'larger': 3.0, 'out': 'out'}


@pytest.mark.slow
def test_a_grid_that_was_killed_goes_on(folder):
    runs_file = folder.path / 'out' / 'scaling_laws.jsonl'
    first = folder.start('lab.scaling_laws', processes=1, **GRID)
    first.wait_for(r'(?s)loss.*loss')  # two runs have ended
    first.kill(signal.SIGKILL).wait()
    before = runs_file.read_bytes()
    lines = before[: before.rfind(b'\n') + 1].splitlines()
    assert 2 <= len(lines) < 8
    with open(runs_file, 'ab') as f:
        f.write(b'{"dataset": "tiny", "wid')
    second = folder.start('lab.scaling_laws', processes=1, **GRID).ok()
    assert f'6 runs, {6 - len(lines)} to do' in second.out
    runs = [json.loads(line) for line in runs_file.read_text().splitlines()]
    assert runs[: len(lines)] == [json.loads(line) for line in lines]
    assert len({(run['width'], run['steps'], run['seed']) for run in runs}) == len(runs) == 8  # two are held out
    figures = json.loads((folder.path / 'out' / 'scaling_laws.json').read_text())
    losses = {(run['C'], run['width']): run['loss'] for run in figures['runs']}
    assert all(losses[4e7, width] < losses[1e7, width] for width in (16, 32, 48))  # longer runs are better
    assert [run['seed'] for run in figures['held_out']] == [1337, 1338]
    assert second.out.index('predicted loss') < second.out.index('2 runs, 2 to do')
    assert max(map(len, second.out.splitlines())) <= 80


@pytest.mark.parametrize('changes, said', [
    ({'budgets': '1e7,x'}, '--budgets=1e7,x: expected numbers above 0'),
    ({'widths': '16,-16'}, 'expected whole numbers'), ({'widths': '16,24'}, 'multiples of 16'),
    ({'ratios': '5'}, 'the fewest and the most'), ({'ratios': '1e5,1e6'}, '0 runs; five coefficients need 6'),
    ({'seeds': 0}, 'seeds=0: expected 1 or more'), ({'val_windows': 100}, 'a multiple of 64'),
    ({'dataset': 'none'}, 'no dataset in'), ({'table': 'no.csv'}, 'no.csv cannot be read')])
def test_settings_that_can_not_be(folder, changes, said):
    folder.start('lab.scaling_laws', **{**GRID, **changes}).refused(said)
