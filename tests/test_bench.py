"""Test bench/: the plot, the shared functions, time_to_loss and ablation."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, encode, make_text, write_dataset

from bench import common, plot
from configurator import UserError
from flatgpt import logs


def write_log(folder, steps=50, offset=0.0, tail=''):
    """An out_dir with a log as train.py writes it: an evaluation every 10 steps, the lowest before step 40."""
    folder.mkdir()
    lines = []
    for step in range(steps + 1):
        if step % 10 == 0:
            val_loss = 2.0 + offset + abs(step - 40) / 100
            lines.append({'step': step, 'train_loss': 2.0, 'val_loss': val_loss, 'train_time': step * 0.5})
        if step < steps:
            lines.append({'step': step, 'loss': 4.0 - step / 25 + offset, 'lr': 1e-3, 'grad_norm': 1.0, 'ms': 500.0,
                          'mfu': None, 'tokens_per_s': 200, 'tokens': (step + 1) * 100, 'train_time': step * 0.5 + 0.5})
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + tail)
    return str(folder)


def png_size(path):
    header = Path(path).read_bytes()[:24]
    assert header[:8] == b'\x89PNG\r\n\x1a\n'
    return int.from_bytes(header[16:20], 'big'), int.from_bytes(header[20:24], 'big')


# plot.py -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('axis', ['step', 'time', 'tokens'])
def test_plot_draws_two_runs(tmp_path, axis):
    pytest.importorskip('matplotlib')
    folders = [write_log(tmp_path / 'a'), write_log(tmp_path / 'b', offset=0.3, tail='{"step": 50, "lo')]
    summary = plot.draw(folders, str(tmp_path / 'loss.png'), axis)
    assert summary == [{'run': 'a', 'steps': 50, 'val_loss': 2.0, 'step': 40},
                       {'run': 'b', 'steps': 50, 'val_loss': pytest.approx(2.3), 'step': 40}]
    width, height = png_size(tmp_path / 'loss.png')
    assert width >= 800 and height >= 500


def test_plot_of_a_run_just_begun(tmp_path):
    pytest.importorskip('matplotlib')
    only_evaluated, one_step = write_log(tmp_path / 'a', steps=0), write_log(tmp_path / 'b', steps=1)
    assert plot.draw([only_evaluated, one_step], str(tmp_path / 'loss.png'), 'tokens')[1]['steps'] == 1
    (tmp_path / 'b' / 'log.jsonl').write_text('{"step": 0, "loss": 4.0, "tokens": 100, "train_time": 0.5}\n')
    assert plot.draw([one_step], str(tmp_path / 'loss.png'))[0]['val_loss'] is None


def test_plot_command(tmp_path):
    pytest.importorskip('matplotlib')
    write_log(tmp_path / 'out')
    done = subprocess.run([sys.executable, '-m', 'bench.plot', 'out', '--out=a.png'], cwd=tmp_path,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert 'lowest val loss 2.0000 at step 40' in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])['runs'][0]['val_loss'] == 2.0
    assert png_size(tmp_path / 'a.png')


def test_plot_says_what_is_wrong_with_a_log(tmp_path):
    with pytest.raises(UserError, match=r'nowhere.log\.jsonl does not exist; expected the out_dir'):
        logs.read_log(str(tmp_path / 'nowhere'))
    damaged = write_log(tmp_path / 'damaged', tail='{"step": 50, "lo{"step": 51}\n')
    with pytest.raises(UserError, match=r'line 57 is damaged \(JSONDecodeError'):
        logs.read_log(damaged)
    for number, line in enumerate(['[1, 2]', '{"step": 3}', '{"step": 3, "loss": "high"}', 'null', '\0\0']):
        folder = write_log(tmp_path / f'line-{number}', steps=0, tail=line + '\n')
        with pytest.raises(UserError, match='line 2 is damaged'):
            logs.read_log(folder)
    empty = tmp_path / 'empty'
    empty.mkdir()
    (empty / 'log.jsonl').write_text('')
    with pytest.raises(UserError, match='holds no losses yet'):
        logs.read_log(str(empty))


def test_plot_says_what_is_wrong_with_the_picture(tmp_path):
    pytest.importorskip('matplotlib')
    folder = write_log(tmp_path / 'out')
    for out in (tmp_path / 'no' / 'folder.png', tmp_path / 'loss.nosuffix'):
        with pytest.raises(UserError, match='--out='):
            plot.draw([folder], str(out))


def test_smooth_keeps_lines_and_ends():
    line = [0.5 * i for i in range(100)]
    assert plot.smooth(line, 20) == pytest.approx(line)
    assert plot.smooth([1.0, 5.0], 1) == [1.0, 5.0]
    assert plot.smooth([0.0, 3.0, 0.0], 3) == pytest.approx([0.0, 1.0, 0.0])
    assert plot.smooth([], 3) == []


def test_names_of_runs():
    assert logs.names_of(['out-a', 'runs/out-b/']) == ['out-a', 'out-b']
    assert logs.names_of(['1/out', '2/out']) == ['1/out', '2/out']


# common.py -----------------------------------------------------------------------------------------------------------


def test_step_times_stops_the_run_it_measures(tmp_path):
    script = tmp_path / 'run.py'
    script.write_text('import time\nprint("a line")\nfor i in range(10**6):\n'
                      '    print(f"iter {i}: loss 4.2, time {i + 0.5:.2f}ms, mfu n/a")\n    time.sleep(0.01)\n')
    assert common.step_times([sys.executable, str(script)], 3) == [0.5, 1.5, 2.5]
    script.write_text('print("iter 0: loss 4.2, time 1.00ms, mfu 1%"); raise SystemExit("it broke")')
    with pytest.raises(UserError, match='exit status 1:\n(.|\n)*it broke'):
        common.step_times([sys.executable, str(script)], 3)
    script.write_text('print("iter 0: loss 4.2, time 1.00ms, mfu 1%")')
    with pytest.raises(UserError, match='ended after 1 of 3 steps'):
        common.step_times([sys.executable, str(script)], 3)


def test_run_shows_why_a_command_failed():
    assert common.run([sys.executable, '-c', 'import os; print(os.environ["X"])'], X='1') == '1\n'
    with pytest.raises(UserError, match='exit status 3:\nreason'):
        common.run([sys.executable, '-c', 'print("reason"); raise SystemExit(3)'])


def test_follow_yields_lines_and_says_why_a_command_failed():
    python = [sys.executable, '-c']
    assert list(common.follow([*python, 'import os; print("a"); print(os.environ["X"])'], X='1')) == ['a\n', '1\n']
    lines = common.follow([*python, 'print("reason"); raise SystemExit(3)'])
    assert next(lines) == 'reason\n'
    with pytest.raises(UserError, match='exit status 3:\nreason'):
        next(lines)
    lines = common.follow([*python, 'import os, time; print(os.getpid()); time.sleep(600)'])
    pid = int(next(lines))
    lines.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_patterns_read_the_lines_of_training():
    line = 'iter 1999: loss 1.7811, time 21.40ms, mfu n/a, norm 0.61, 35.9k tok/s, 00:00 left'
    assert common.ITER.match(line).groups() == ('1999', '1.7811', '21.40')
    assert common.ITER.match('step 250: train loss 1.9, val loss 2.0') is None
    assert common.EVALUATED.match('step 250: train loss 1.9, val loss 2.0').groups() == ('250', '1.9', '2.0')
    assert common.SAVED.match('saved out/ckpt.pt at step 250 (best so far)').groups() == ('out/ckpt.pt', '250')


def test_train_command_leaves_the_machine_to_auto():
    arguments = ['a.py', '--device=cpu', '--compile=False', '--dropout=0.0']
    assert common.train_command(arguments, auto=True) == [sys.executable, 'train.py', 'a.py', '--dropout=0.0']
    assert '--device=cpu' in common.train_command(common.SMALL)


def test_check_peer(tmp_path):
    with pytest.raises(UserError, match='no train.py'):
        common.check_peer(str(tmp_path))
    (tmp_path / 'train.py').touch()
    with pytest.raises(UserError, match=r'python data/shakespeare_char/prepare\.py'):
        common.check_peer(str(tmp_path))


def test_table_and_spread():
    figures = common.spread([3.0, 1.0, 2.0])
    assert figures == {'median': 2.0, 'min': 1.0, 'max': 3.0, 'n': 3}
    assert common.show(figures, ' ms') == '2.0 ms (1.0-3.0)'
    assert common.show(common.spread([1234.5])) == '1,234.5'
    assert common.table([['', 'ms'], ['ours', 5], ['b', 1000]]) == '        ms\n----------\nours     5\nb     1000'


def test_last_line_is_json(capsys):
    common.finish('x', 3, ms=common.spread([1.0]))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {'bench', 'hardware', 'torch', 'commit', 'n', 'others_cores_busy'} <= set(record)
    assert record['bench'] == 'x' and record['ms']['median'] == 1.0 and f'{os.cpu_count()} cores' in record['hardware']


@pytest.mark.parametrize('name', sorted(
    path.stem for path in (ROOT / 'bench').glob('*.py') if path.stem not in ('__init__', 'bare', 'common', 'fuzz_cases', 'fuzz_kinds', 'mutate', 'pretended', 'victims')))
def test_scripts_explain_themselves(folder, name):
    out = folder.start(f'bench.{name}', '--help').ok().out
    assert f'$ python -m bench.{name}' in out and 'config = ' not in out


# time_to_loss.py -----------------------------------------------------------------------------------------------------

SHAPE = '--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --compile=False'


@pytest.fixture
def peer(folder):
    """
    A folder in which train.py can be measured against itself: the dataset, and what has to be there of nanoGPT, whose
    settings and printed lines are ours too.
    """
    path = folder.path / 'peer'
    (path / 'config').mkdir(parents=True)
    for data in (folder.path / 'data', path / 'data'):
        write_dataset(data / 'shakespeare_char', encode(make_text(3000)), encode(make_text(333, seed=1)))
    for script in ROOT.glob('*.py'):
        shutil.copy(script, path)
    (path / 'config' / 'train_shakespeare_char.py').write_text(
        "dataset = 'shakespeare_char'\ngradient_accumulation_steps = 1\nlearning_rate = 1e-3\nwarmup_iters = 0\n"
        'eval_interval = 5\n')
    return folder


def measure(folder, script, *files, **settings):
    """A script of bench/ in the folder -> (what it printed, its JSON line)."""
    out = folder.start(f'bench.{script}', *files, **settings).wait(300).ok().out
    return out, json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_time_to_loss_of_a_run(peer):
    flags = [*SHAPE.split(), '--preset=gpt2', '--learning_rate=1e-3', '--warmup_iters=0', '--decay_lr=False',
             '--dtype=float32', '--max_iters=8', '--eval_interval=1', '--sample_tokens=0']
    # the run by itself; and a target between two evaluations so close that both checkpoints have to be looked at
    peer.start('train.py', ROOT / 'config' / 'shakespeare_cpu.py', *flags, seed=1337, out_dir='alone').ok()
    losses = {line['step']: line['val_loss'] for line in peer.log('alone') if 'val_loss' in line}
    target = (losses[1] + losses[2]) / 2
    assert losses[1] - 0.01 < losses[2] < losses[1] and losses[3] < losses[2]
    out, record = measure(peer, 'time_to_loss', peer='peer', rounds=1, sprint='', cold=True, extra=shlex.join(flags),
                          target=target, peer_flags=f'--device=cpu {SHAPE} --max_iters=10 --lr_decay_iters=10')
    theirs, ours = record['peer'], record['sprint']
    assert theirs['steps']['median'] == 10 and not theirs['estimated']
    assert ours['rounds_reached'] == 1 and ours['reached_step']['median'] == 2
    for key, loss in (('reached_val', losses[2]), ('best_val', min(losses.values()))):
        assert ours[key]['median'] == pytest.approx(loss, abs=1e-4)
        assert ours[f'{key}_logged']['median'] == pytest.approx(loss, abs=1e-4)
    for kind in ('train_s', 'wall_s'):
        share = ours[f'reached_{kind}']['median'] / theirs[kind]['median']
        assert ours[f'reached_{kind}_of_peer']['median'] == pytest.approx(share, rel=0.05)
        assert ours[f'reached_{kind}']['median'] <= ours[kind]['median']
        assert record['full'][f'rounds_within_peer_{kind}'] == (ours[kind]['median'] <= theirs[kind]['median'])
    assert 0 < ours['reached_train_s']['median'] < ours['reached_wall_s']['median']
    table = out[out.index('nanoGPT: val loss') :].splitlines()[:-1]
    assert len(table) == 18 and max(map(len, table)) <= 80


@pytest.mark.slow
def test_time_to_loss_that_is_not_reached(peer):
    out, record = measure(peer, 'time_to_loss', case='char', peer='peer', rounds=1, full=False,
                          peer_steps=2, sprint_char='--max_iters=4 --eval_interval=2', extra=SHAPE,
                          peer_flags=f'--device=cpu {SHAPE}')
    theirs, ours = record['peer'], record['sprint']
    assert theirs['estimated'] and record['target']['median'] == theirs['val_loss']['median'] == 1.4697
    assert theirs['train_s']['median'] == pytest.approx(1.75 * theirs['step_ms']['median'], abs=1e-3)
    assert ours['reached_train_s'] is None and ours['reached_wall_s_of_peer'] is None and ours['rounds_reached'] == 0
    assert f'not reached, best {ours["best_val"]["median"]:.4f}' in out
    assert '1750 steps, estimated, s' in out and 'full' not in record


def test_time_to_loss_says_what_is_wrong(peer):
    peer.start('bench.time_to_loss', case='medium').refused('--case=medium: ')
    write_dataset(peer.path / 'peer' / 'data' / 'shakespeare_char', encode(make_text(3000)), encode(make_text(333)))
    peer.start('bench.time_to_loss', peer='peer').refused('prepare both from the same text')


# ablation.py ---------------------------------------------------------------------------------------------------------


def finished_runs(path, config, steps, runs):
    """A file of finished runs of a config file in the folder above: {(flags, seed): (val loss, ms)}."""
    path.parent.mkdir(exist_ok=True)
    digest = hashlib.sha256((path.parent.parent / config).read_bytes()).hexdigest()[:16]
    with open(path, 'w') as f:
        for (flags, seed), (loss, ms) in runs.items():
            f.write(json.dumps({'config': config, 'sha256': digest, 'flags': flags, 'steps': steps, 'seed': seed,
                                'val_loss': loss, 'ms': ms, 'commit': 'abc1234'}) + '\n')


@pytest.mark.slow
def test_ablation_of_finished_runs_does_none_again(folder):
    runs = folder.path / 'out-ablation' / 'runs.jsonl'
    (folder.path / 'a.py').write_text("raise SystemExit('a run was started')\n")
    finished_runs(runs, 'a.py', 7, {
        ('', 1): (1.60, 10.0), ('', 2): (1.70, 20.0),
        ('--mlp=gelu', 1): (1.65, 12.0), ('--mlp=gelu', 2): (1.71, 22.0),
        ('--mlp=relu2', 1): (1.50, 10.0), ('--mlp=relu2', 2): (1.62, 10.0)})
    kept = runs.read_text()
    runs.write_text(kept + '{"config": "a.py", "fla')  # a run that was cut off
    out, record = measure(folder, 'ablation', config_file='a.py', steps=7, seeds='1,2', variants='gelu,relu2',
                          table='table.md')
    assert '6 of 6 runs are in out-ablation/runs.jsonl already, done at commit abc1234' in out
    table = (folder.path / 'table.md').read_text(encoding='utf-8')
    # the standard error of two values is half of their distance
    assert [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()[2:]] == [
        ['relu2', '1.5600 ± 0.0600', '-0.0900 ± 0.0100', '0.75'],
        ['base', '1.6500 ± 0.0500', '', '1.00'],
        ['gelu', '1.6800 ± 0.0300', '+0.0300 ± 0.0200', '1.15']]
    assert table in out and max(map(len, table.splitlines())) <= 80
    assert record['variants']['gelu'] == {'val_loss': 1.68, 'error': 0.03, 'difference': 0.03, 'difference_error': 0.02,
                                          'ms': 17.0, 'time': 1.15}
    assert runs.read_text() == kept
    (folder.path / 'a.py').write_text("raise SystemExit('another config file')\n")  # whose runs these are not
    folder.start('bench.ablation', config_file='a.py', steps=7, seeds='1').wait(300).refused('another config file')


@pytest.mark.slow
def test_ablation_runs_what_is_missing(folder):
    config = folder.path / 'small.py'
    config.write_text("preset = 'modern'\ndataset = 'tiny'\nn_layer = 1\nn_head = 1\nn_embd = 16\nblock_size = 16\n"
                      "batch_size = 4\ngradient_accumulation_steps = 1\ndtype = 'float32'\ncompile = False\n")
    runs = folder.path / 'runs' / 'a.jsonl'
    finished_runs(runs, 'small.py', 4, {('--mlp=gelu --device=cpu', 1): (9.0, 1.0)})
    out, record = measure(folder, 'ablation', config_file='small.py', steps=4, seeds='1', out='runs/a.jsonl',
                          extra='--device=cpu', variants='gelu,n_kv_head 2,tied head')
    assert '1 of 4 runs are in runs/a.jsonl already' in out
    assert 'n_kv_head=2: expected a divisor of n_head=1' in out and record['variants']['n_kv_head 2'] is None
    assert [cell.strip() for cell in out.splitlines()[-2].split('|')][1:3] == ['n_kv_head 2', 'failed']
    assert record['variants']['gelu']['val_loss'] == 9.0
    done = {run['flags']: run for run in map(json.loads, runs.read_text().splitlines())}
    assert set(done) == {'--mlp=gelu --device=cpu', '--device=cpu', '--tie_embeddings=True --device=cpu'}
    # each is the run that train.py alone would be
    alone = folder.start('train.py', 'small.py', device='cpu', tie_embeddings=True, seed=1, max_iters=4,
                         eval_interval=4, eval_first=False, lr_decay_iters=None).ok()
    assert f'val loss {done["--tie_embeddings=True --device=cpu"]["val_loss"]:.4f}' in alone.out
    assert os.listdir(runs.parent) == ['a.jsonl']


def test_ablation_says_what_is_wrong(folder):
    for settings, text in (({'variants': 'gelu,relu'}, "'relu' is none of base, learned positions, "),
                           ({'seeds': '1;2'}, "seeds='1;2': expected whole numbers"),
                           ({'steps': 0}, 'steps=0: expected 1 or more'),
                           ({'config_file': 'nowhere.py'}, "config_file='nowhere.py': there is no such file")):
        folder.start('bench.ablation', **settings).refused(text)
    runs = folder.path / 'runs.jsonl'
    for damaged, text in (('{"config": "a.py"}', ', line 1'), ('null', ', line 1'), ('[1', ', line 1'), ('\0', ' is not text')):
        runs.write_text(damaged + '\n')
        folder.start('bench.ablation', out='runs.jsonl', config_file='runs.jsonl').refused('runs.jsonl' + text)
