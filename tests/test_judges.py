"""judges.py: pairs of the best and the worst, and a person at the keyboard. Run: pytest tests/test_judges.py"""

import io
import os
import random
import sys

import pytest

from posttrain import judges
from posttrain.preferences import to_pair

MESSAGES = [{'role': 'user', 'content': '2+2?'}]


def test_extremes_by_hand():
    answers = list('abcde')
    assert judges.extremes(answers, [1, 5, 3, 2, 4], 9) == [('b', 'a'), ('e', 'd')]
    assert judges.extremes(answers, [1, 5, 3, 2, 4], 1) == [('b', 'a')]
    assert judges.extremes(answers, [0, 1, 0, 1, 1], 9) == [('b', 'c'), ('d', 'a')]  # each answer once
    assert judges.extremes(answers, [0, 0, 1, 0, 0], 9) == [('c', 'e')]
    assert judges.extremes(answers, [1] * 5, 9) == judges.extremes(['a'], [1], 9) == judges.extremes([], [], 9) == []


def test_a_pair_is_read():
    assert to_pair(judges.pair_of(MESSAGES, '4', '5', 'sums'))['group'] == 'sums'
    assert 'group' not in judges.pair_of(MESSAGES, '4', '5')


def ask(monkeypatch, capsys, typed, seed=0):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
    verdict = judges.ask_person('1 of 9', MESSAGES, ('first', 'sec\x1b[2Jond'), random.Random(seed))
    return verdict, capsys.readouterr().out


def test_a_person_sees_random_order(monkeypatch, capsys):
    """The index is that of the answer, wherever it stood; each order occurs."""
    verdicts = []
    for seed in range(20):
        for key in '12':
            verdict, out = ask(monkeypatch, capsys, f'{key}\n', seed)
            place = {0: 'first', 1: 'sec'}[verdict]
            assert out.index(f'[{key}]') < out.index(place) < out.index(f'[{key}]') + 12
            assert 'user\n    2+2?\n' in out
            verdicts.append(verdict)
    assert 10 < sum(verdicts) < 30 and verdicts[::2] != verdicts[1::2]


def test_ties_other_keys_and_the_end(monkeypatch, capsys):
    assert ask(monkeypatch, capsys, '\nx\n3\n=\n1\n')[0] is None
    for typed in ('q\n', 'Q\n', '', 'x'):
        with pytest.raises(judges.Quit):
            ask(monkeypatch, capsys, typed)


def test_one_key_at_a_terminal(monkeypatch):
    """Without Enter; an arrow key, and its characters, are no answer; the terminal is as it was."""
    pty, termios = pytest.importorskip('pty'), pytest.importorskip('termios')
    main, side = pty.openpty()
    before = termios.tcgetattr(side)
    real, keys = os.read, [b'\x1b[1~', b'2', b'\x04']

    def read(fd, n):  # pressed once it waits
        assert not termios.tcgetattr(side)[3] & termios.ICANON
        os.write(main, keys.pop(0))
        return real(fd, n)

    with open(side, closefd=False) as terminal:
        monkeypatch.setattr(sys, 'stdin', terminal)
        monkeypatch.setattr(os, 'read', read)
        assert judges.read_key() not in judges.KEYS
        assert judges.read_key() == '2' and judges.read_key() == 'q'
        assert termios.tcgetattr(side) == before
    os.close(main)
    os.close(side)
