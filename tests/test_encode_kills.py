"""data/encode.py after kills, errors and full disks: all or nothing, then continued.

Run: pytest tests/test_encode_kills.py
"""

import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from corpora import NEW, OLD, contents, names, words, write
from tqdm import tqdm

import tokenizer
from data import encode
from flatgpt import files

# tqdm's lock is shared with forked processes: one that is killed with it would stop all others
tqdm.set_lock(threading.RLock())
POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs fork and signals')
SHARDS = {'shard_tokens': 2000}  # of NEW: five or more in train



def state(folder, references):
    """Which of the complete datasets this folder holds, or None when it counts as not prepared."""
    if not (folder / 'train.bin').exists():
        return None
    for name, reference in references.items():
        if all(path.exists() and path.read_bytes() == content
               for path, content in ((folder / file, content) for file,
                                     content in contents(reference).items())):
            return name
    raise AssertionError(f'a mixture: {names(folder)}')


@pytest.fixture
def references(tmp_path):
    write(tmp_path / 'old', OLD, **SHARDS)
    write(tmp_path / 'new', NEW, **SHARDS)
    return {'old': tmp_path / 'old', 'new': tmp_path / 'new'}


@pytest.fixture
def small_steps(monkeypatch):
    """A batch of a few documents."""
    monkeypatch.setattr(encode, 'BATCH_CHARS', 1000)


def die_at(step):
    """End this process without any clean-up just before the step-th call that changes or syncs a
    folder."""
    calls = 0

    def or_die(function):
        def counted(*arguments):
            nonlocal calls
            calls += 1
            if calls == step:
                os._exit(9)
            return function(*arguments)
        return counted

    for name in ('fsync', 'replace', 'remove'):
        setattr(os, name, or_die(getattr(os, name)))


@POSIX
@pytest.mark.parametrize('shard_tokens', [10**9, pytest.param(4000, marks=pytest.mark.slow)])
def test_a_crash_at_every_step(tmp_path, shard_tokens, small_steps, capfd):
    """Die, as if by kill -9, just before the 1st, 2nd, ... call that changes the folder."""
    references = {'old': tmp_path / 'old', 'new': tmp_path / 'new'}
    write(references['old'], OLD, shard_tokens=shard_tokens)
    write(references['new'], NEW, shard_tokens=shard_tokens)
    seen, n_continued = [], 0
    for step in range(1, 1000):
        folder = tmp_path / f'step{step}'
        shutil.copytree(references['old'], folder)
        (folder / 'meta.pkl').write_bytes(b'left over from before')
        child = os.fork()
        if child == 0:
            die_at(step)
            try:
                write(folder, NEW, shard_tokens=shard_tokens)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append(state(folder, references))
        write(folder, NEW, shard_tokens=shard_tokens)  # the next run succeeds and tidies up
        assert contents(folder) == contents(references['new'])
        said = capfd.readouterr().err
        n_continued += 'continuing' in said
        assert 'starting again' not in said
        shutil.rmtree(folder)
        if status == 0:
            break
    assert status == 0 and len(seen) > 15, (len(seen), n_continued)
    assert (n_continued > 0.3 * len(seen)) == (shard_tokens == 4000), (n_continued, len(seen))
    # first the old one, then none, then the new one
    assert seen == sorted(seen, key=['old', None, 'new'].index)
    assert set(seen) == {'old', None, 'new'}


@pytest.mark.slow
@POSIX
def test_kill_at_any_moment(tmp_path, references, small_steps, capfd):
    """SIGKILL, again and again, while two datasets take turns, and while a longer one grows."""
    rng, n_continued, killed = random.Random(0), 0, 0
    for i in range(200):
        child = os.fork()
        if child == 0:
            try:
                while (tmp_path / 'long' / 'train.bin').exists():
                    write(tmp_path / 'turns', OLD, **SHARDS)
                    write(tmp_path / 'turns', NEW, **SHARDS)
                write(tmp_path / 'long', NEW * 40, **SHARDS)
            finally:
                os._exit(0)
        # on a busy machine, too, one of them comes to the end
        time.sleep(rng.uniform(0, 0.005 * (i + 1)))
        os.kill(child, 9)
        os.waitpid(child, 0)
        n_continued += 'continuing' in capfd.readouterr().err
        state(tmp_path / 'turns', references)  # raises for a mixture
        killed += (tmp_path / 'long' / 'train.bin').exists()
        if killed == 10:
            break
    assert killed == 10 and n_continued > 3
    write(tmp_path / 'reference', NEW * 40, **SHARDS)
    assert contents(tmp_path / 'long') == contents(tmp_path / 'reference')
    write(tmp_path / 'turns', NEW, **SHARDS)
    assert contents(tmp_path / 'turns') == contents(references['new'])


class CountingTokenizer(tokenizer.ByteTokenizer):
    texts = 0

    def encode_batch(self, texts, workers=None):
        self.texts += len(texts)
        return super().encode_batch(texts, workers)


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('broken input'),
                                   OSError(28, 'No space left')])
def test_going_on_after_an_error(tmp_path, references, small_steps, capsys, error):
    def broken():
        yield from NEW[:30]
        raise error

    folder = tmp_path / 'folder'
    shutil.copytree(references['old'], folder)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ValueError):
        write(folder, broken, **SHARDS)
    assert 'the same command continues after them' in capsys.readouterr().err
    assert state(folder, references) == 'old'
    tok = CountingTokenizer()
    write(folder, NEW, tok=tok, **SHARDS)
    said = capsys.readouterr().err
    assert 'continuing the unfinished preparation' in said and 'starting again' not in said
    assert 20 <= tok.texts < 45  # of 50; the others were not encoded again
    assert contents(folder) == contents(references['new'])


def write_and_interrupt(folder):
    """An unfinished preparation of 30 documents."""
    def broken():
        yield from NEW[:30]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, broken, **SHARDS)
    assert (folder / '.progress.json').exists()


@pytest.mark.parametrize('changed, said', [
    ({'texts': [NEW[0] + 'x', *NEW[1:]]}, 'the text is not the same; starting again'),
    ({'texts': NEW[:1]}, 'the text is not the same; starting again'),
    ({'val_fraction': 0.5}, 'has other settings or is damaged; starting again'),
    ({'tok': tokenizer.CharTokenizer.from_text(NEW)}, 'has other settings'),
    ({'shard_tokens': 5000}, 'has other settings'),
])
def test_another_preparation_starts_again(tmp_path, small_steps, capsys, changed, said):
    write_and_interrupt(tmp_path / 'a')
    other = {'texts': NEW, **SHARDS, **changed}
    # too little for a dataset, and nothing of the 30 others is taken for it
    if len(other['texts']) == 1:
        with pytest.raises(ValueError, match='val split has 0'):
            write(tmp_path / 'a', **other)
        assert names(tmp_path / 'a') == []
    else:
        write(tmp_path / 'a', **other)
        write(tmp_path / 'b', **other)
        assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('damage', [
    lambda folder: (folder / '.progress.json').write_text('{'),
    lambda folder: (folder / '.progress.json').write_text('[]'),
    lambda folder: (folder / '.progress.json').write_text('{"settings": "", "shards": {}}'),
    lambda folder: (folder / '.progress.json').write_text(
        (folder / '.progress.json').read_text().replace('"shards"', '"sharks"')),
    lambda folder: (folder / '.train.bin.tmp').write_bytes(b'short'),
    lambda folder: (folder / '.train.bin.tmp').unlink(),
])
def test_damaged_progress_starts_again(tmp_path, references, small_steps, capsys, damage):
    write_and_interrupt(tmp_path / 'a')
    damage(tmp_path / 'a')
    write(tmp_path / 'a', NEW, **SHARDS)
    assert 'starting again' in capsys.readouterr().err
    assert contents(tmp_path / 'a') == contents(references['new'])


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('broken input')])
def test_an_error_keeps_the_old_dataset(tmp_path, references, error):
    def documents():
        yield from NEW
        raise error

    folder = tmp_path / 'folder'
    shutil.copytree(references['old'], folder)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        write(folder, documents)
    assert names(folder) == names(references['old'])
    assert state(folder, references) == 'old'


@POSIX
def test_a_full_disk_keeps_the_old_dataset(tmp_path, references):
    """A limit on the size of files stands in for a small disk: writes fail half-way in the same
    manner."""
    folder = tmp_path / 'folder'
    shutil.copytree(references['old'], folder)
    code = ('import resource, sys, tokenizer\n'
            'from data import encode\n'
            'encode.BATCH_CHARS, limit = 30_000, int(sys.argv[2])\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n'
            'pieces = [("train" if i % 9 else "val", "hello world " * 500) for i in range(70)]\n'
            'pieces += [("train", "x" * int(sys.argv[3])), ("train", "the end")]\n'
            'corpus = encode.Corpus(lambda: pieces, True, "test", 0.1, shard_tokens=100_000)\n'
            'tok = tokenizer.ByteTokenizer()\n'
            'encode.run(lambda: encode.write_dataset(sys.argv[1], corpus, tok))\n')

    def run(folder, limit):  # the last document but one needs a file of 600,000 bytes
        return subprocess.run([sys.executable, '-c', code, str(folder), str(limit), '300_000'],
                              cwd=ROOT, capture_output=True, text=True)

    done = run(folder, 40_000)  # less than the first shard: nothing to keep
    assert done.returncode == 1 and 'has no room for the token files' in done.stderr
    assert names(folder) == names(references['old'])
    done = run(folder, 210_000)
    assert done.returncode == 1
    assert 'has no room for the token files' in done.stderr and 'MB free' in done.stderr
    assert 'the same command continues after them' in done.stderr
    assert 'Traceback' not in done.stderr and state(folder, references) == 'old'
    done = run(folder, 10**9)
    assert 'continuing the unfinished' in done.stderr and done.returncode == 0
    run(tmp_path / 'reference', 10**9)
    assert contents(folder) == contents(tmp_path / 'reference')


@POSIX
def test_two_at_once(tmp_path):
    import fcntl
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match='another process is preparing'):
        write(tmp_path, NEW)
    os.close(folder)
    write(tmp_path, NEW)


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, step):
    def full(*_):
        raise OSError(28, 'No space left on device')

    files.replace_file(tmp_path / 'f', b'old')
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match='No space left'):
        files.replace_file(tmp_path / 'f', b'new')
    assert contents(tmp_path) == {'f': b'old'}
    monkeypatch.undo()
    files.replace_file(tmp_path / 'f', b'new')
    assert contents(tmp_path) == {'f': b'new'}


def test_stale_meta_pkl_goes(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(b'of another tokenizer')
    write(tmp_path, NEW)
    assert 'meta.pkl' not in names(tmp_path) and 'val.bin' in names(tmp_path)


@pytest.mark.slow
@POSIX
def test_memory_is_constant(tmp_path):
    """Six times the text must not need more memory; nor may a text without a single line end."""
    line = words(2000).replace('\n', ' ').encode()
    sources = {}
    for name, size, end in (('small', 20, b'\n'), ('large', 120, b'\n'), ('one line', 40, b' ')):
        sources[name] = tmp_path / f'{name}.txt'
        with open(sources[name], 'wb') as file:
            for _ in range(size * 1_000_000 // len(line)):
                file.write(line + end)
    code = ('import resource, sys\n'
            'from data import documents, encode\n'
            'path, out = sys.argv[1:]\n'
            'def text():\n'
            '    return documents.split_text(path, 0.1)\n'
            'def each():\n'
            '    return documents.split_each(documents.read_documents(path), 0.1)\n'
            'tok = encode.make_tokenizer("char", encode.Corpus(text, True, "", 0.1))\n'
            'for pieces, are_documents in ((text, False), (each, True)):\n'
            '    encode.write_dataset(out, encode.Corpus(pieces, are_documents, "", 0.1), tok)\n'
            # ru_maxrss would count what the parent held when it forked
            'if sys.platform == "linux":\n'
            '    status = open("/proc/self/status").read()\n'
            '    print(int(status.split("VmHWM:")[1].split()[0]) / 1e3)\n'
            'else:\n'
            '    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n')
    peak = {}
    for name, path in sources.items():
        done = subprocess.run([sys.executable, '-c', code, str(path), str(tmp_path / 'out')],
                              cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peak[name] = float(done.stdout)
    assert peak['small'] < 300 and max(peak.values()) < 1.2 * peak['small'], peak  # MB


