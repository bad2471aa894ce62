"""lab/: the commands of its pages print what the pages say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_or_skip

import configurator

ROOT = Path(__file__).parent.parent


def console_blocks(page):
    """[command, what it prints] of every ```console block, several commands in one block apart."""
    found = []
    for block in re.findall(r'```console\n(.*?)```', (ROOT / page).read_text(encoding='utf-8'), flags=re.S):
        found += [part.split('\n', 1) for part in re.split(r'^\$ ', block, flags=re.M)[1:]]
    return found


@pytest.mark.parametrize('command, printed', console_blocks('lab/tokens.md'))
def test_commands_of_tokens_page(command, printed):
    for name in ('gpt2', 'cl100k_base'):
        load_or_skip(name)
    path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
    result = subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                            env={**os.environ, 'PATH': path, 'PYTHONUTF8': '1'})
    assert result.stderr == ''
    assert result.stdout == printed


def commands_of(text):
    """(script, [settings]) of every `python lab/x.py --a=b ...` in a text, those that go on in the next line too."""
    found = []
    for part in re.findall(r'python\s+lab/[^`#$|]*', text):
        script, *settings = part.split('\n\n')[0].split()[1:]
        found.append((script, [word[2:].split('=')[0] for word in settings if word.startswith('--')]))
    return found


@pytest.mark.parametrize('script', sorted(path.name for path in (ROOT / 'lab').glob('*.py')))
def test_every_script_is_in_the_course(script):
    """With its picture, and commands that its settings allow. What has no settings is a part of others."""
    source = (ROOT / 'lab' / script).read_text(encoding='utf-8')
    if 'override(globals())' not in source:
        return
    course = (ROOT / 'lab' / 'README.md').read_text(encoding='utf-8')
    commands = [(name, settings) for name, settings in commands_of(course + source) if name == f'lab/{script}']
    page = set(configurator.read_page(source))
    assert commands and f'pictures/{script.removesuffix(".py")}' in course
    assert {setting for _, settings in commands for setting in settings} <= page | {'help'}
    assert 'out' in page


def test_pictures_of_the_course():
    course = (ROOT / 'lab' / 'README.md').read_text(encoding='utf-8')
    shown = set(re.findall(r'!\[[^\]]+\]\((pictures/[\w.]+)\)', course))
    assert shown == {f'pictures/{path.name}' for path in (ROOT / 'lab' / 'pictures').iterdir()}
    for name in shown:
        data = (ROOT / 'lab' / name).read_bytes()
        assert data[:4] in (b'\x89PNG', b'GIF8') and len(data) < 150_000, f'{name} has {len(data):,} bytes'


def test_nothing_imports_the_lab():
    for path in [*ROOT.glob('*.py'), *ROOT.glob('bench/*.py'), *ROOT.glob('data/*/*.py'), *ROOT.glob('config/*.py'),
                 *ROOT.glob('tasks/*.py')]:
        assert not re.search(r'^\s*(from|import) lab\b', path.read_text(encoding='utf-8'), flags=re.M), path
