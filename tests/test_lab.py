"""Test the pages of lab/ and bench/: each command shown has valid settings, or prints what the page shows."""

import ast
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, load_or_skip

PAGES = ['lab/README.md', 'bench/README.md', *sorted(
    str(path.relative_to(ROOT)) for room in ('lab', 'bench') for path in (ROOT / room).glob('*.py'))]


def console_blocks(page):
    """Return [command, output] of each command in a page's ```console blocks."""
    commands = []
    for block in re.findall(r'```console\n(.*?)```', (ROOT / page).read_text(encoding='utf-8'), flags=re.S):
        commands += [part.split('\n', 1) for part in re.split(r'^\$ ', block, flags=re.M)[1:]]
    return commands


@pytest.mark.parametrize('command, printed', console_blocks('lab/tokens.md'))
def test_commands_of_tokens_page(command, printed):
    for name in ('gpt2', 'cl100k_base'):
        load_or_skip(name)
    path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
    result = subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                            env={**os.environ, 'PATH': path, 'PYTHONUTF8': '1'})
    assert result.stderr == ''
    assert result.stdout == printed


def commands_of(page):
    """Return the `python ...` commands of a page or of a script's docstring, each a list of words."""
    text = (ROOT / page).read_text(encoding='utf-8')
    if page.endswith('.py'):
        text = (ast.get_docstring(ast.parse(text)) or '').replace('\\\n', '')
        found = re.findall(r'^ *\$ (python .*)$', text, flags=re.M)
    else:
        found = re.findall(r'`(python [^`]+)`', text) + re.findall(r'^(python .*)$', text, flags=re.M)
    commands = [shlex.split(command, comments=True) for command in found]
    return [command for command in commands if len(command) > 1 and not any('NAME' in word for word in command)]


COMMANDS = sorted({tuple(command) for page in PAGES for command in commands_of(page)})


def page_of(words):
    """Return the script of a command and its arguments."""
    if words[1] == '-m':
        return ROOT / (words[2].replace('.', '/') + '.py'), list(words[3:])
    return ROOT / words[1], list(words[2:])


@pytest.mark.parametrize('words', COMMANDS, ids=' '.join)
def test_commands_have_valid_settings(words, monkeypatch):
    """The page of a script accepts a command's settings, a parser has its options."""
    script, argv = page_of(words)
    if words[:3] == ('python', '-m', 'tokenizer'):
        return  # run above
    if script.name == 'dpo.py' and not script.exists():
        pytest.skip('posttrain/dpo.py is not here yet')
    source = script.read_text(encoding='utf-8')
    monkeypatch.chdir(ROOT)
    if 'override(globals())' not in source:
        options = [word.split('=')[0] for word in argv if word.startswith('--')]
        parsers = source + (ROOT / 'data' / 'encode.py').read_text(encoding='utf-8')
        assert [option for option in options if f"'{option}'" not in parsers] == []
        return
    # run the script up to its page of settings, which checks them
    body = ast.parse(source).body
    end = next(i for i, node in enumerate(body) if 'override(' in ast.unparse(node) and isinstance(node, ast.Assign))
    monkeypatch.setattr(sys, 'argv', [str(script), *argv])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    names = {'__file__': str(script), '__name__': 'page', '__doc__': ''}
    exec(compile(ast.Module(body[: end + 1], []), str(script), 'exec'), names)
    assert set(word[2:].split('=')[0] for word in argv if word.startswith('--')) <= names['config'].given


@pytest.mark.parametrize('script', sorted(path.name for path in (ROOT / 'lab').glob('*.py')))
def test_every_script_is_in_the_course(script):
    """Each script with settings has its picture and a command in the course, and a folder for its results."""
    source = (ROOT / 'lab' / script).read_text(encoding='utf-8')
    if 'override(globals())' not in source:
        return
    name = script.removesuffix('.py')
    course = (ROOT / 'lab' / 'README.md').read_text(encoding='utf-8')
    assert f'pictures/{name}' in course and '\nout = ' in source
    assert ['python', '-m', f'lab.{name}'] in commands_of('lab/README.md')


@pytest.mark.parametrize('script', sorted(path.stem for path in (ROOT / 'bench').glob('*.py')))
def test_every_measurement_is_in_its_readme(script):
    if script not in ('__init__', 'bare', 'common', 'fuzz_cases', 'fuzz_kinds', 'mutate', 'pretended', 'victims'):
        assert any(command[1:3] == ['-m', f'bench.{script}'] for command in commands_of('bench/README.md'))


def test_pictures_of_the_course():
    course = (ROOT / 'lab' / 'README.md').read_text(encoding='utf-8')
    shown = set(re.findall(r'!\[[^\]]+\]\((pictures/[\w.]+)\)', course))
    assert shown == {f'pictures/{path.name}' for path in (ROOT / 'lab' / 'pictures').iterdir()}
    for name in shown:
        data = (ROOT / 'lab' / name).read_bytes()
        assert data[:4] in (b'\x89PNG', b'GIF8') and len(data) < 150_000, f'{name} has {len(data):,} bytes'


def test_talk_and_its_commands():
    """The minutes ascend within the talk; the runs that commands open are the folders of recipes."""
    section = (ROOT / 'lab' / 'README.md').read_text(encoding='utf-8').split('\n## The talk and its commands\n')[1]
    rows = [line.strip('| ').split(' | ') for line in section.splitlines() if re.match(r'\| \d', line)]
    minutes = [int(minute) for minute, _, _, _ in rows]
    assert minutes == sorted(minutes) and minutes[0] < 3 and 40 < minutes[-1] < 43
    assert all(re.fullmatch('`python [^`]+`', command) for _, _, command, _ in rows)
    recipes = ''.join(path.read_text(encoding='utf-8') for path in (ROOT / 'config').glob('*.py'))
    for folder in re.findall(r'=(out-[\w-]+)', section):
        assert f"out_dir = '{folder}'" in recipes
