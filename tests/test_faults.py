"""Kills and errors at single file operations: bench.faults tries them all. Run: pytest tests/test_faults.py"""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_checkpoint import files, make_state

from flatgpt import checkpoint
from flatgpt.files import link_file, move_aside, put_back, replace_file
from flatgpt.output import protect
from tokenizer import CharTokenizer

RUN = ('best.pt', 'log.jsonl', 'config.json', 'ckpt.pt')


class Killed(BaseException):
    """Stand in for SIGKILL: nothing is cleaned up that waits for an Exception."""


@pytest.mark.parametrize('error', [OSError(5, 'Input/output error'), Killed()])
@pytest.mark.parametrize('at', range(1, 6))
def test_a_run_is_moved_whole_or_not_at_all(tmp_path, monkeypatch, at, error):
    """An error leaves the files where they were, and a kill until the folder is opened again."""
    for name in RUN:
        (tmp_path / name).write_text(name)
    calls, replace, rename = 0, os.replace, os.rename

    def fail(function):
        def counted(*arguments):
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            function(*arguments)
        return counted

    monkeypatch.setattr(os, 'replace', fail(replace))
    monkeypatch.setattr(os, 'rename', fail(rename))
    with pytest.raises(type(error)):
        move_aside(str(tmp_path), RUN)
    monkeypatch.undo()
    if isinstance(error, Killed):
        put_back(str(tmp_path), RUN)
    assert files(tmp_path) == sorted(RUN)
    move_aside(str(tmp_path), RUN)
    assert files(tmp_path) == ['previous-1'] and files(tmp_path / 'previous-1') == sorted(RUN)
    put_back(str(tmp_path), RUN)
    assert files(tmp_path) == ['previous-1']


def test_a_link_is_no_unfinished_move(tmp_path):
    victim = tmp_path / 'victim'
    victim.mkdir()
    (victim / 'ckpt.pt').write_text('mine')
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'ckpt.pt').write_text('ours')
    (out / 'previous.tmp').symlink_to(victim)
    put_back(str(out), RUN)
    with pytest.raises(OSError, match='exists'):
        move_aside(str(out), ['ckpt.pt'])
    assert (victim / 'ckpt.pt').read_text() == 'mine' and (out / 'ckpt.pt').read_text() == 'ours'


def test_lines_that_the_disk_refused_are_written_later(tmp_path, monkeypatch, capsys):
    """In order, with the next line or the next checkpoint, and once."""
    run, is_full = checkpoint.Run(str(tmp_path), {}), False
    opener = checkpoint.no_link

    def full(path, flags):
        if is_full:
            raise OSError(28, 'No space left on device')
        return opener(path, flags)

    monkeypatch.setattr(checkpoint, 'no_link', full)

    def steps():
        path = tmp_path / 'log.jsonl'
        return [json.loads(line)['step'] for line in path.read_text().splitlines()] if path.exists() else []

    for step in range(6):
        is_full = step in (0, 2, 3, 5)
        run.log(step=step)
        assert steps() == [[], [0, 1], [0, 1], [0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]][step]
    assert capsys.readouterr().out.count('WARNING') == 4
    is_full, run.step = False, 6
    state = make_state(6)
    run.save(lambda: state)
    run.saver.wait()
    assert run.saved_step == 6 and steps() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize('write', [
    lambda path: replace_file(path, b'new'), lambda path: CharTokenizer.from_text(['ab']).save(path),
    lambda path: link_file(path.with_name('other'), path)])
def test_temporary_files_of_killed_processes_go(tmp_path, write):
    """With the next writing of the same path; other names stay."""
    path = tmp_path / 'a.json'
    others = ['other', f'b{path.name}.{"0" * 16}.tmp', f'{path.name}.{"0" * 15}.tmp', f'{path.name}.{"g" * 16}.tmp']
    for name in (*others, f'{path.name}.{"0" * 16}.tmp'):
        (tmp_path / name).write_text('x')
    (tmp_path / f'{path.name}.{"1" * 16}.tmp').mkdir()
    (tmp_path / f'{path.name}.{"2" * 16}.tmp').symlink_to(tmp_path)
    write(path)
    assert files(tmp_path) == sorted([*others, path.name])


def test_streams_that_are_no_files(monkeypatch):
    """A closed one, and one that has write() and flush() alone, are streams that never raise."""
    class Bare:
        text = ''

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    closed, bare = io.TextIOWrapper(io.BytesIO()), Bare()
    closed.close()
    monkeypatch.setattr(sys, 'stdout', bare)
    monkeypatch.setattr(sys, 'stderr', closed)
    protect()
    print('a', flush=True)
    print('b', file=sys.stderr, flush=True)
    assert bare.text == 'a\n' and not sys.stdout.isatty() and not sys.stderr.isatty()


def test_what_was_printed_before_and_cannot_be_written(monkeypatch):
    """A warning of an import that went to a full disk does not end the script."""
    class Full(io.RawIOBase):
        is_full = True

        def writable(self):
            return True

        def write(self, data):
            if self.is_full:
                raise OSError(28, 'No space left on device')
            return len(data)

    streams = [io.TextIOWrapper(io.BufferedWriter(Full())) for _ in range(2)]
    for name, stream in zip(('stdout', 'stderr'), streams, strict=True):
        stream.write('a warning')
        monkeypatch.setattr(sys, name, stream)
    protect(drop=True)
    assert all('No space left' in stream.lost for stream in (sys.stdout, sys.stderr))
    monkeypatch.setattr(sys, 'stdout', streams[0])
    with pytest.raises(SystemExit, match='could not be written: .*No space left'):
        protect()
    Full.is_full = False  # the garbage collector tries again


@pytest.mark.slow
@pytest.mark.skipif(not (sys.platform == 'linux' and shutil.which('cc')), reason='needs Linux and a C compiler')
@pytest.mark.parametrize('script', ['train resumed', 'prepare text over', 'batch', 'export'])
def test_faults_at_file_operations(script):
    done = subprocess.run([sys.executable, '-m', 'bench.faults', f'--script={script}', '--most=3'], cwd=ROOT,
                          capture_output=True, text=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and record['n'] == 15 and record['wrong'] == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc and ptys')
@pytest.mark.parametrize('way', ['SIGTERM', 'both', 'terminal'])
def test_lost_streams(way):
    done = subprocess.run([sys.executable, '-m', 'bench.streams', '--script=sample', f'--way={way}'], cwd=ROOT,
                          capture_output=True, text=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and record['n'] >= 2 and record['wrong'] == 0, done.stderr
