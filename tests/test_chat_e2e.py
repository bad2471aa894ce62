"""Run posttrain.chat at a terminal and in a pipe. Run: pytest tests/test_chat_e2e.py"""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from test_sample_e2e import save

from model import GPT, GPTConfig


def says(text, **config):
    """A model of bytes that says this letter, whatever it hears."""
    model = GPT(GPTConfig(**{'block_size': 64, 'vocab_size': 256, 'n_layer': 1, 'n_head': 1, 'n_embd': 8, **config}))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[ord(text)] = 5.0
    return model


def command(**settings):
    return [sys.executable, '-m', 'posttrain.chat', '--compile=False', '--device=cpu',
            *(f'--{key}={value}' for key, value in settings.items())]


def test_in_a_pipe(folder):
    save(folder, says('a'), tokenizer={'kind': 'byte'})
    run = folder.start('posttrain.chat', typed='Hi\n/reset\nHo\n', max_new_tokens=5, system='B.',
                       compile=False, device='cpu').ok()
    assert re.sub('> ', '', run.out).splitlines()[-6:] == [
        'a model without a chat format: it continues a transcript', '/help for help, Ctrl-D to leave', 'aaaaa',
        '(forgotten)', 'aaaaa', '']


def test_in_the_chat_format(folder):
    """The model hears the template's ids, and ends where the template ends an answer."""
    template = "{% for m in messages %}{{ m.role[0] + m.content + 'z' }}{% endfor %}"
    save(folder, says('z'), tokenizer={'kind': 'byte'}, chat_template=template)
    run = folder.start('posttrain.chat', typed='', compile=False, device='cpu').ok()
    assert 'a chat model' in run.out
    save(folder, says('z'), tokenizer={'kind': 'byte'}, chat_template='{{ raise_exception("not today") }}')
    folder.start('posttrain.chat', device='cpu').refused('not today')


def test_ctrl_c_at_a_terminal(folder):
    """While an answer streams it stops the answer; at the prompt it leaves."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ('pty', 'fcntl', 'termios'))
    save(folder, says('a'), tokenizer={'kind': 'byte'})
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(max_new_tokens=100_000), cwd=folder.path, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True, close_fds=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = ''

    def wait_for(pattern):
        nonlocal shown
        end = time.monotonic() + 600
        while (found := re.search(pattern, shown)) is None:
            assert time.monotonic() < end and process.poll() is None, shown
            try:
                shown += os.read(ours, 10_000).decode(errors='replace')
            except BlockingIOError:
                time.sleep(0.005)
        shown = shown[found.end() :]
        return found

    try:
        for text in ('first', 'second'):
            wait_for('> ')
            os.write(ours, f'{text}\n'.encode())
            wait_for('a{20}')
            os.write(ours, b'\x03')
            assert len(wait_for(r'(a*)(\^C)?(a*)\r\n')[0]) < 50_000
        wait_for('> ')
        os.write(ours, b'\x03')
        assert process.wait(600) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
