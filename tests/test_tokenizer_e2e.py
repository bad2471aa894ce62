"""python -m tokenizer: the commands a person types, and those of its README."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_or_skip

import tokenizer
from tokenizer import __main__ as tokenview

ROOT = Path(__file__).parent.parent
TEXT = 'Who is there? Nay, answer me: stand, and unfold yourself. Long live the king!\n' * 40


def run(*arguments, cwd, error=None):
    """Standard output of python -m tokenizer; with error, which has to be in what it says when it
    fails."""
    result = subprocess.run([sys.executable, '-m', 'tokenizer', *arguments], cwd=cwd,
                            capture_output=True,
                            text=True, encoding='utf-8', stdin=subprocess.DEVNULL)
    assert 'Traceback' not in result.stderr
    if error is not None:
        assert result.returncode != 0
        assert error in result.stderr
    else:
        assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    return tmp_path


def test_train_look_compare_export(folder):
    out = run('train', '--input=text.txt', '--vocab_size=300', '--out=mine.json', cwd=folder)
    assert 'wrote mine.json: bpe, 300 ids' in out
    mine = tokenizer.load(folder / 'mine.json')
    assert mine.vocab_size == 300 and mine.eot == 299 and mine.decode(mine.encode(TEXT)) == TEXT

    out = run('--text=the king', '--tokenizer=mine.json', cwd=folder)
    ids = mine.encode('the king')
    assert out.startswith(f'mine.json: 8 characters, 8 bytes, {len(ids)} tokens')
    for i in ids:
        assert f'{i:>8}  {mine.decode_bytes([i]).hex(" ")}' in out

    out = run('--compare=mine,byte', '--input=text.txt', cwd=folder)  # mine: without .json
    row = next(line for line in out.splitlines() if line.startswith('text.txt'))
    assert f'{len(mine.encode(TEXT)):,}' in row and f'{len(TEXT):,}' in row
    out = run('--compare=mine,byte', cwd=folder)
    assert all(name in out for name in tokenview.SAMPLES)
    assert max(map(len, out.splitlines())) <= 80

    for out_file in ('copy.json', 'tokenizer.json', 'mine.tiktoken', 'hf'):
        assert 'wrote' in run('export', '--tokenizer=mine.json', f'--out={out_file}', cwd=folder)
        assert tokenizer.load(folder / out_file).encode('the king') == ids


def test_words_and_chars(folder):
    run('train', '--kind=word', '--input=text.txt', '--vocab_size=12', '--out=words.json',
        cwd=folder)
    words = tokenizer.load(folder / 'words.json')
    assert words.vocab_size == 12 and words.kind == 'word'
    run('train', '--kind=char', '--input=text.txt', '--out=chars.json', cwd=folder)
    chars = tokenizer.load(folder / 'chars.json')
    assert chars.decode(chars.encode(TEXT)) == TEXT
    out = run('--compare=chars.json,byte', cwd=folder)
    korean = next(line for line in out.splitlines() if line.startswith('Korean'))
    assert korean.split()[2:5] == ['-', '-', '-']  # characters that the vocabulary does not have


def test_page(folder):
    run('train', '--input=text.txt', '--vocab_size=300', '--out=mine.json', cwd=folder)
    out = run('page', '--tokenizer=mine.json', '--tokenizer=byte', cwd=folder)
    assert 'wrote tokens.html (0.0 MB): open it in a browser' in out
    assert (folder / 'tokens.html').read_text(encoding='utf-8').count('"name": ') == 2
    run('page', *['--tokenizer=byte', '--tokenizer=mine', '--tokenizer=mine.json', '--tokenizer=nothing'],
        cwd=folder, error="unknown tokenizer 'nothing'")
    run('page', cwd=folder, error='--tokenizer')
    run('page', '--tokenizer=byte', '--out=.', cwd=folder, error='is a folder; expected a file to write')


def test_colors_only_on_request(folder):
    plain = run('--text=a b\n', '--tokenizer=byte', cwd=folder)
    assert '\033' not in plain and '|a| |b|\\n' in plain
    assert '\033[30;48;5;' in run('--text=a b', '--tokenizer=byte', '--color=always', cwd=folder)


@pytest.mark.parametrize('arguments, error', [
    (['trian'], "did you mean 'train'"),
    (['--text=a', '--tokenizer=gtp2'], "did you mean 'gpt2'"),
    (['--text=a', '--tokenizer=gpt4'], "did you mean 'cl100k_base'"),
    (['--text=a', '--input=text.txt'], 'both --text and --input'),
    (['--text=a', '--tokenizer=char'], 'takes its vocabulary from a text'),
    (['train', '--input=text.txt'], '--vocab_size=N'),
    (['train', '--input=text.txt', '--vocab_size=256'], 'expected at least 257'),
    (['train', '--input=text.txt', '--vocab_size=9999'], 'vocab_size at most'),
    (['train', '--input=nothing.txt', '--vocab_size=300'], 'nothing.txt does not exist'),
    (['train', '--input=text.txt', '--vocab_size=300', '--pattern=('],
     'is not a regular expression'),
    (['train', '--input=text.txt', '--vocab_size=300', '--special_tokens=<|a|>,<|a|>b'], 'overlap'),
    (['train', '--input=text.txt', '--vocab_size=300', '--out=no/mine.json'], 'mkdir -p no'),
    (['train', '--kind=char', '--input=text.txt', '--vocab_size=300'],
     '--vocab_size is for bpe and word'),
    (['export', '--tokenizer=byte', '--out=tokenizer.json'], 'hold byte pair encoding only'),
])
def test_errors(folder, arguments, error):
    run(*arguments, cwd=folder, error=error)


def test_file_of_another_version_or_damaged(folder):
    tokenizer.ByteTokenizer().save(folder / 'byte.json')
    values = json.loads((folder / 'byte.json').read_text())
    (folder / 'newer.json').write_text(json.dumps({**values, 'version': 2}))
    run('--text=a', '--tokenizer=newer.json', cwd=folder, error='version 2')
    (folder / 'short.json').write_text((folder / 'byte.json').read_text()[:-5])
    run('--text=a', '--tokenizer=short.json', cwd=folder, error='damaged or cut short')


def test_samples_and_views_cover_odd_tokens():
    assert tokenview.visible(b'\xec\x95') == '\\xec\\x95'
    assert tokenview.visible(b'a\tb\n') == 'a\\tb\\n'
    assert tokenview.visible('안'.encode()) == '안'


def test_output_that_nobody_reads_to_the_end(folder):
    (folder / 'long.txt').write_text('many words ' * 20_000)
    process = subprocess.Popen([sys.executable, '-m', 'tokenizer', '--input=long.txt',
                                '--tokenizer=byte'],
                               cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()  # as head does
    assert process.stderr.read() == b'' and process.wait(timeout=60) == 1


def test_training_keeps_to_its_kind(folder):
    run('train', '--kind=char', '--input=text.txt', '--pattern=gpt2', cwd=folder,
        error='--pattern is for bpe')
    run('train', '--input=text.txt', '--vocab_size=300', '--pattern=gtp4', cwd=folder,
        error="did you mean 'gpt4'")
    run('train', '--input=text.txt', '--vocab_size=300', '--out=.', cwd=folder, error='is a folder')
    run('train', '--input=text.txt', '--vocab_size=300', '--num_proc=-1', cwd=folder,
        error="'-1' is not a whole")


def test_commands_of_the_readme(folder):
    for name in ('gpt2', 'cl100k_base'):
        load_or_skip(name)
    (folder / 'novels').mkdir()
    for path in sorted(ROOT.glob('tokenizer/*.py')):
        shutil.copy(path, folder / 'novels')
    readme = (ROOT / 'tokenizer' / 'README.md').read_text(encoding='utf-8')
    commands = [shlex.split(line, comments=True) for line in
                re.search('```bash\n(.*?)```', readme, re.S)[1].splitlines()]
    for command in [*commands, ['python', '-m', 'tokenizer', 'export', '--tokenizer=novels.json',
                                '--out=tokenizer.json']]:
        assert command[:3] == ['python', '-m', 'tokenizer']
        run(*command[3:], cwd=folder)
    assert tokenizer.load(folder / 'novels.json').vocab_size == 4096
    program = re.search('```python\n(.*?)```', readme, re.S)[1]
    subprocess.run([sys.executable, '-c', program], cwd=folder, check=True)
    assert tokenizer.load(folder / 'my.json').vocab_size == 261
