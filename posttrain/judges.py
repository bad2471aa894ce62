"""Judge answers: rank rated ones, or let a person at the terminal compare two.

    for better, worse in extremes(answers, ratings, most=2): ...
    number = ask_person('3 of 10', messages, ('4', '5'), rng)  # 0, 1, or None for a tie
    pair = pair_of(messages, better, worse)
"""

import os
import sys
import textwrap

from flatgpt.decoding import for_terminal

KEYS = {'1': 0, '2': 1, '=': None, 'q': 'quit'}
LEGEND = 'better: 1 or 2; tie or skip: =; quit: q'


class Quit(Exception):
    """Report that the person stopped judging."""


# Ratings ------------------------------------------------------------------------------------------

def extremes(answers, ratings, most):
    """Pair the best answer with the worst, the next best with the next worst, ...

    -> at most `most` pairs (better, worse). Each answer is in one pair, and equally rated ones make
    none. Of equally rated answers the earlier ones come first.
    """
    order = sorted(range(len(answers)), key=lambda i: -ratings[i])
    pairs = zip(order[: len(order) // 2], reversed(order), strict=False)
    return [(answers[i], answers[j]) for i, j in pairs if ratings[i] > ratings[j]][:most]


def pair_of(messages, chosen, rejected, group=None):
    """Return a pair as preferences.read_pairs() reads it."""
    pair = {'messages': messages, 'chosen': chosen, 'rejected': rejected}
    return pair if group is None else {**pair, 'group': group}


# A person -----------------------------------------------------------------------------------------

def ask_person(title, messages, answers, rng):
    """Show two answers in random order; -> the better one's index, or None for a tie.

    Raises Quit for the key q and at the end of the input.
    """
    order = rng.sample((0, 1), 2)
    print(f'\n{title} {"-" * (76 - len(title))}')
    for message in messages:
        show(message['role'], message['content'])
    for key, i in zip('12', order, strict=True):
        show(f'[{key}]', answers[i])
    print(LEGEND, end=' ', flush=True)
    while (key := read_key()) not in KEYS:
        pass
    print(key)
    if key == 'q':
        raise Quit
    return None if KEYS[key] is None else order[KEYS[key]]


def show(name, text):
    """Print a text below its name, indented."""
    print(f'{name}\n{textwrap.indent(for_terminal(text), "    ")}')


def read_key():
    """Return a key pressed at the terminal.

    From a pipe it is the first character of a line. The end of the input is 'q'. Keys pressed
    before the call do not count.
    """
    try:
        import termios
        import tty
    except ImportError:  # Windows
        termios = None
    if termios is None or not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip()[:1].lower() if line else 'q'
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)  # drops what was typed before; Ctrl-C still interrupts
        keys = os.read(fd, 32).decode(errors='replace')  # several characters: an arrow key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
    return 'q' if keys in ('', '\x04') else keys.lower()
