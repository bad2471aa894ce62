"""Runs of data/clean.py: what they write, refuse and leave behind. Run: pytest
tests/test_clean_runs.py"""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from corpora import SENTENCES, once, prose

from data import clean
from flatgpt.files import Busy, lock_folder

POSIX = pytest.mark.skipif(os.name != 'posix', reason='needs signals')

# all together ------------------------------------------------------------------------------------

ALL = clean.Steps(normalize=True, language=('en',), gopher=True, gopher_skip=('word_length',), exact=True, near=0.8)


def write_rows(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts), encoding='utf-8')
    return path


def read_rows(path):
    return [json.loads(line)['text']
            for line in Path(path).read_text(encoding='utf-8').splitlines()]


def run(*args, cwd, **options):
    return subprocess.run([sys.executable, '-m', 'data.clean', *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, encoding='utf-8', **options)


def refused(result, *said):
    assert result.returncode not in (0, None)
    for text in said:
        assert text in result.stderr, result.stderr
    assert 'Traceback' not in result.stderr


ENGLISH = '''The committee met on a cold evening in the small hall behind the church, because the
roof of the town hall had begun to leak again. There were nine of them, and most had walked. They
talked about the price of coal, about the road to the mill that nobody would mend, and about a
letter from the county that none of them quite understood. It was late when the oldest member
stood up and said that they should have fixed the roof with the money for a band.'''


def test_from_a_folder_to_a_dataset_for_prepare(tmp_path):
    pytest.importorskip('py3langid')
    pytest.importorskip('datasketch')
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / 'a.txt').write_text(ENGLISH, encoding='utf-8')
    (folder / 'b.txt').write_text(SENTENCES['de'] * 3, encoding='utf-8')
    (folder / 'c.txt').write_text(ENGLISH.replace(' ', '\t'), encoding='utf-8')
    (folder / 'd.txt').write_text(ENGLISH.replace('nine', 'eight'), encoding='utf-8')
    (folder / 'e.txt').write_text('Too short to be of any use.', encoding='utf-8')
    second = ('\0She had never been to the sea, and the stories that her uncle used to tell made '
              'it sound like a field of grey wheat. So when the train came out of the tunnel and '
              'there it was, far below, blue and full of boats, she did not have a word for it; '
              'she only took the hand of the child who was travelling with her.')
    write_rows(folder / 'f.jsonl', ['\0\0', second])
    (folder / 'g.bin').write_bytes(b'\0')

    result = run('--input=in', '--out=clean.jsonl', '--normalize', '--language=en', '--gopher',
                 '--exact', '--near=0.8',
                 '--num_proc=1', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_rows(tmp_path / 'clean.jsonl') == [ENGLISH, second[1:]]
    report = json.loads((tmp_path / 'clean.report.json').read_text(encoding='utf-8'))
    assert report['documents'] == {'read': 7, 'kept': 2, 'changed by normalize': 1}
    assert report['bytes']['kept'] == len((ENGLISH + second[1:]).encode())
    removed = {rule: (entry['documents'], entry['examples'][0]['document']) for rule, entry in
               report['removed'].items()}
    assert removed == {'language: de': (1, 2), 'exact': (1, 3), 'near': (1, 4),
                       'gopher: words': (1, 5),
                       'normalize: blank': (1, 6)}
    assert report['removed']['gopher: words']['examples'][0]['why'] == '7, expected 50 to 100,000'
    assert report['removed']['near']['examples'][0]['why'].endswith('like document 1')
    assert report['bytes']['read'] == report['bytes']['kept'] + 1 + sum(
        entry['bytes'] for entry in report['removed'].values())  # 1: the \0 that normalize took out
    for said in ('gopher: words', 'kept', 'next:  python data/text/prepare.py --input=clean.jsonl',
                 '1 more are left'):
        assert said in result.stdout + result.stderr
    assert sorted(os.listdir(tmp_path)) == ['clean.jsonl', 'clean.report.json', 'in']


def some_documents():
    rng = random.Random(11)
    texts = []
    for seed in range(300):
        kind = rng.randrange(6)
        texts.append(rng.choice(texts) if kind == 0 and texts
                     else rng.choice(texts) + ' and so on' if kind == 1 and texts
                     else rng.choice(list(SENTENCES.values())) * 3 if kind == 2
                     else ENGLISH + '\r\n' + prose(rng.randrange(30, 300), seed))
    return texts


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip('py3langid')
    pytest.importorskip('datasketch')
    source = write_rows(tmp_path / 'in.jsonl', some_documents())
    # of this process, which makes the batches: some 60 of them
    monkeypatch.setattr(clean, 'BATCH_CHARS', 3000)
    got = {}
    for num_proc in (1, 2):
        file = io.BytesIO()
        got[num_proc] = clean.clean(source, file, ALL, num_proc=num_proc), file.getvalue()
    assert got[1] == got[2]
    assert {'exact', 'near', 'language: de'} <= set(got[1][0]['removed'])
    kept = [json.loads(line)['text'] for line in got[1][1].splitlines()]
    order = [clean.normalize(text) for text in some_documents()]
    places = [order.index(text) for text in kept]
    assert places == sorted(places) and len(set(places)) == len(places) > 50


def test_a_step_alone_needs_no_library_of_another(tmp_path):
    write_rows(tmp_path / 'in.jsonl', [prose(80, 1), prose(80, 2), prose(80, 1), 'b'])
    code = ('import sys; sys.modules.update(datasketch=None, py3langid=None); '
            f'sys.path.insert(0, {str(ROOT)!r}); from data import clean, encode; '
            'encode.run(clean.main)')

    def without_libraries(*steps):
        return subprocess.run([sys.executable, '-c', code, '--input=in.jsonl', '--out=out.jsonl',
                               '--num_proc=1',
                               *steps], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert without_libraries('--normalize', '--gopher', '--exact').returncode == 0
    assert read_rows(tmp_path / 'out.jsonl') == [prose(80, 1), prose(80, 2)]
    refused(without_libraries('--near'), 'datasketch', "pip install -e '.[clean]'")
    refused(without_libraries('--language=en'), 'py3langid', "pip install -e '.[clean]'")


@pytest.mark.parametrize('args, said', [
    ([], ['no step', '--exact', '--near=0.8']),
    (['--near=0'], ['--near is 0', '0.5 to 1']),
    (['--near=1.1'], ['--near is 1.1', '0.5 to 1']),
    (['--near=nan'], ['--near is nan']),
    (['--language=en,gr'], ["unknown 'gr'", 'did you mean', 'expected some of: ']),
    (['--gopher', '--gopher_skip=word'], ["unknown 'word'; did you mean 'words'"]),
    (['--exact', '--gopher_skip=words'], ['needs --gopher']),
    (['--exact', '--out=clean.txt'], ['--out=clean.txt', 'ends in .jsonl']),
    (['--exact', '--out=in.jsonl'], ['--out=in.jsonl lies in the input']),
    (['--exact', '--out=nowhere/clean.jsonl'], ['nowhere', 'does not exist', 'mkdir -p']),
    (['--exact', '--input=im.jsonl'], ["im.jsonl does not exist; did you mean 'in.jsonl'"]),
    (['--exact', '--text_key=body'], ["no field 'body'"]),
    (['--gopher'], ['all 2 documents would be removed', '--gopher_skip=words',
                    "The rule 'gopher: words' removes 2, the first for: 1, expected 50"]),
])
def test_refusals(args, said, tmp_path, monkeypatch, capsys):
    if any(arg.startswith('--language=') for arg in args):
        pytest.importorskip('py3langid')
    write_rows(tmp_path / 'in.jsonl', ['b', 'c'])
    monkeypatch.chdir(tmp_path)
    defaults = ['--input=in.jsonl', '--out=clean.jsonl', '--num_proc=1']
    monkeypatch.setattr(sys, 'argv', ['clean.py', *once(defaults, args)])
    with pytest.raises(ValueError) as error:
        clean.main()
    for text in said:
        assert text in str(error.value)
    assert os.listdir(tmp_path) == ['in.jsonl']


@pytest.mark.parametrize('count', ['0', '-1', '1.5', 'two'])
def test_a_number_of_processes_that_is_none(count, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['clean.py', '--input=in.jsonl', '--out=out.jsonl',
                                      f'--num_proc={count}'])
    with pytest.raises(SystemExit):
        clean.main()
    assert f"--num_proc: '{count}' is not a whole number of 1 or more" in capsys.readouterr().err


def test_output_inside_the_input_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / 'in').mkdir()
    write_rows(tmp_path / 'in' / 'a.jsonl', ['b'])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['clean.py', '--input=in', '--out=in/clean.jsonl', '--exact'])
    with pytest.raises(ValueError, match='the next run would read it'):
        clean.main()


def test_help_fits_a_terminal(tmp_path):
    result = run('--help', cwd=tmp_path, env={**os.environ, 'COLUMNS': '80'})
    assert result.returncode == 0 and max(map(len, result.stdout.splitlines())) <= 80


# what a broken run leaves behind -----------------------------------------------------------------

def big(path):
    """A corpus that takes seconds."""
    return write_rows(path, [prose(2000, seed) for seed in range(40)] * 40)


@POSIX
@pytest.mark.parametrize('wait', [0, 0.2, None],
                         ids=['at its start', 'while workers start', 'while it writes'])
def test_interrupted(wait, tmp_path):
    pytest.importorskip('datasketch')
    big(tmp_path / 'in.jsonl')
    (tmp_path / 'out.jsonl').write_text('old')
    process = subprocess.Popen([sys.executable, '-m', 'data.clean', '--input=in.jsonl',
                                '--out=out.jsonl', '--gopher',
                                '--near', '--num_proc=2'], cwd=tmp_path, stderr=subprocess.PIPE,
                               text=True,
                               start_new_session=True)
    wait_for(lambda: any(wait is not None or path.stat().st_size for path in tmp_path.glob('out.jsonl.*.tmp')))
    time.sleep(wait or 0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in errors, errors
    assert (tmp_path / 'out.jsonl').read_text() == 'old'
    assert sorted(os.listdir(tmp_path)) == ['in.jsonl', 'out.jsonl']


@POSIX
def test_another_process_that_writes_there(tmp_path):
    lock = lock_folder(tmp_path)
    small = write_rows(tmp_path / 'in.jsonl', ['b'])
    with pytest.raises(Busy, match='cleaning a corpus into'):
        clean.clean_to(tmp_path / 'out.jsonl', small, clean.Steps(exact=True))
    os.close(lock)
    assert os.listdir(tmp_path) == ['in.jsonl']


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
def test_workers_end_when_the_main_process_was_killed(tmp_path):
    pytest.importorskip('datasketch')
    big(tmp_path / 'in.jsonl')
    process = subprocess.Popen([sys.executable, '-m', 'data.clean', '--input=in.jsonl',
                                '--out=out.jsonl', '--gopher',
                                '--near', '--num_proc=2'], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob('out.jsonl.*.tmp')))
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_running(pid) for pid in children))
    assert not (tmp_path / 'out.jsonl').exists()
    small = write_rows(tmp_path / 'small.jsonl', ['b'])
    clean.clean_to(tmp_path / 'out.jsonl', small, clean.Steps(exact=True))
    assert sorted(os.listdir(tmp_path)) == [  # no temporary file
        'in.jsonl', 'out.jsonl', 'out.report.json', 'small.jsonl']


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


def test_a_worker_that_was_ended_from_outside(tmp_path):
    def batches():
        yield [(1, 'b')]
        for number in range(2, 10_000):
            for child in multiprocessing.active_children():
                child.kill()
            yield [(number, 'b')]

    with pytest.raises(ValueError, match='--num_proc=1'):
        for _ in clean.in_order(batches(), clean.Examiner(clean.Steps(exact=True)), 2):
            pass


@POSIX
def test_a_full_disk(tmp_path):
    import resource
    write_rows(tmp_path / 'in.jsonl', [prose(2000, seed) for seed in range(20)])
    (tmp_path / 'out.jsonl').write_text('old')

    def limit():  # the disk takes 50 kB of a file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    refused(run('--input=in.jsonl', '--out=out.jsonl', '--exact', '--num_proc=1', cwd=tmp_path,
                preexec_fn=limit),
            'has no room for out.jsonl', 'another disk')
    assert (tmp_path / 'out.jsonl').read_text() == 'old'
    assert sorted(os.listdir(tmp_path)) == ['in.jsonl', 'out.jsonl']
