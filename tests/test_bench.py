"""bench/: the plot on made-up logs, and what the measuring scripts share. Run: pytest tests/test_bench.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import common, plot  # noqa: E402


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
    done = subprocess.run([sys.executable, str(ROOT / 'bench' / 'plot.py'), 'out', '--out=a.png'], cwd=tmp_path,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert 'lowest val loss 2.0000 at step 40' in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])['runs'][0]['val_loss'] == 2.0
    assert png_size(tmp_path / 'a.png')


def test_plot_says_what_is_wrong_with_a_log(tmp_path):
    with pytest.raises(SystemExit, match=r'nowhere.log\.jsonl does not exist; expected the out_dir'):
        plot.read_log(str(tmp_path / 'nowhere'))
    damaged = write_log(tmp_path / 'damaged', tail='{"step": 50, "lo{"step": 51}\n')
    with pytest.raises(SystemExit, match=r'line 57 is damaged \(JSONDecodeError'):
        plot.read_log(damaged)
    for number, line in enumerate(['[1, 2]', '{"step": 3}', '{"step": 3, "loss": "high"}', 'null', '\0\0']):
        folder = write_log(tmp_path / f'line-{number}', steps=0, tail=line + '\n')
        with pytest.raises(SystemExit, match='line 2 is damaged'):
            plot.read_log(folder)
    empty = tmp_path / 'empty'
    empty.mkdir()
    (empty / 'log.jsonl').write_text('')
    with pytest.raises(SystemExit, match='holds no losses yet'):
        plot.read_log(str(empty))


def test_plot_says_what_is_wrong_with_the_picture(tmp_path):
    pytest.importorskip('matplotlib')
    folder = write_log(tmp_path / 'out')
    for out in (tmp_path / 'no' / 'folder.png', tmp_path / 'loss.nosuffix'):
        with pytest.raises(SystemExit, match='--out='):
            plot.draw([folder], str(out))


def test_smooth_keeps_lines_and_ends():
    line = [0.5 * i for i in range(100)]
    assert plot.smooth(line, 20) == pytest.approx(line)
    assert plot.smooth([1.0, 5.0], 1) == [1.0, 5.0]
    assert plot.smooth([0.0, 3.0, 0.0], 3) == pytest.approx([0.0, 1.0, 0.0])
    assert plot.smooth([], 3) == []


def test_names_of_runs():
    assert plot.names_of(['out-a', 'runs/out-b/']) == ['out-a', 'out-b']
    assert plot.names_of(['1/out', '2/out']) == ['1/out', '2/out']


# common.py -----------------------------------------------------------------------------------------------------------


def test_step_times_stops_the_run_it_measures(tmp_path):
    script = tmp_path / 'run.py'
    script.write_text('import time\nprint("a line")\nfor i in range(10**6):\n'
                      '    print(f"iter {i}: loss 4.2, time {i + 0.5:.2f}ms, mfu n/a")\n    time.sleep(0.01)\n')
    assert common.step_times([sys.executable, str(script)], 3) == [0.5, 1.5, 2.5]
    script.write_text('print("iter 0: loss 4.2, time 1.00ms, mfu 1%"); raise SystemExit("it broke")')
    with pytest.raises(SystemExit, match='ended after 1 of 3 steps:\n(.|\n)*it broke'):
        common.step_times([sys.executable, str(script)], 3)


def test_run_shows_why_a_command_failed():
    assert common.run([sys.executable, '-c', 'import os; print(os.environ["X"])'], X='1') == '1\n'
    with pytest.raises(SystemExit, match='exit status 3:\nreason'):
        common.run([sys.executable, '-c', 'print("reason"); raise SystemExit(3)'])


def test_patterns_read_the_lines_of_training():
    line = 'iter 1999: loss 1.7811, time 21.40ms, mfu n/a, norm 0.61, 35.9k tok/s, 00:00 left'
    assert common.ITER.match(line).groups() == ('1999', '1.7811', '21.40')
    assert common.ITER.match('step 250: train loss 1.9, val loss 2.0') is None
    assert common.SAVED.match('saved out/ckpt.pt at step 250 (best so far)').groups() == ('out/ckpt.pt', '250')


def test_train_command_leaves_the_machine_to_auto():
    assert common.train_command(['a.py', '--device=cpu', '--compile=False', '--dropout=0.0'], auto=True, python='p') \
        == ['p', 'train.py', 'a.py', '--dropout=0.0']
    assert '--device=cpu' in common.train_command(common.SMALL)


def test_check_peer(tmp_path):
    with pytest.raises(SystemExit, match='no train.py'):
        common.check_peer(str(tmp_path))
    (tmp_path / 'train.py').touch()
    with pytest.raises(SystemExit, match=r'python data/shakespeare_char/prepare\.py'):
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


@pytest.mark.parametrize('name', ['start', 'kill', 'tokenizer', 'prepare', 'round_trip'])
def test_scripts_explain_themselves(name):
    script = ROOT / 'bench' / f'{name}.py'
    done = subprocess.run([sys.executable, str(script), '--help'], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert f'$ python bench/{name}.py' in done.stdout and 'config = ' not in done.stdout
