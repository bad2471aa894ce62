"""lab/: the commands of its pages print what the pages say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def console_blocks(page):
    """[command, what it prints] of every ```console block, several commands in one block apart."""
    found = []
    for block in re.findall(r'```console\n(.*?)```', (ROOT / page).read_text(encoding='utf-8'), flags=re.S):
        found += [part.split('\n', 1) for part in re.split(r'^\$ ', block, flags=re.M)[1:]]
    return found


@pytest.mark.parametrize('command, printed', console_blocks('lab/tokens.md'))
def test_commands_of_tokens_page(command, printed):
    path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
    result = subprocess.run(['bash', '-c', command], cwd=ROOT, capture_output=True, text=True, encoding='utf-8',
                            env={**os.environ, 'PATH': path, 'PYTHONUTF8': '1'})
    assert result.stderr == ''
    assert result.stdout == printed
