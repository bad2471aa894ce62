"""Talk at the terminal, with answers that are made up. Run: pytest tests/test_terminal.py"""

import io
import os
import re
import signal
import sys

from conftest import ROOT, load_script

from tokenizer import ByteTokenizer, CharTokenizer

TERMINAL = load_script(ROOT / 'posttrain' / 'chat.py')


def talk(monkeypatch, capsys, typed, answer, most=1000, **changes):
    """-> what is printed when this is typed, without the prompts."""
    monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
    TERMINAL.converse(answer, None, changes.pop('tokenizer', ByteTokenizer()), most, **changes)
    return capsys.readouterr().out.replace('> ', '').replace('. ', '')


def echo(heard):
    """Answers that say how many messages there were, and keep in `heard` what was asked."""
    def answer(ids, number):
        heard.append((bytes(ids).decode(), number))
        yield ''
        yield ' I'
        yield ' I hear'
    return answer


def test_history_and_commands(monkeypatch, capsys):
    heard = []
    out = talk(monkeypatch, capsys, 'one\n\ntwo\n/retry\n/reset\n/retry\nthree\n/help\n/unknown\n', echo(heard))
    assert [text for text, _ in heard] == [
        'User: one\nAssistant:', 'User: one\nAssistant: I hear\nUser: two\nAssistant:',
        'User: one\nAssistant: I hear\nUser: two\nAssistant:', 'User: three\nAssistant:']
    assert [number for _, number in heard] == [0, 1, 2, 3]  # which decides over what is drawn: /retry is another answer
    assert out.count('I hear\n') == 4 and '(forgotten)' in out and '(there is no answer yet)' in out
    assert out.count('/reset  forget the conversation') == 2 and 'there is no /unknown\n' in out
    assert max(map(len, out.splitlines())) <= 80


def test_system_and_lines(monkeypatch, capsys):
    heard = []
    talk(monkeypatch, capsys, 'one\\\ntwo\n/reset\n/etc/passwd?', echo(heard), system='Be short.')
    assert [text for text, _ in heard] == ['Be short.\n\nUser: one\ntwo\nAssistant:',
                                           'Be short.\n\nUser: /etc/passwd?\nAssistant:']


def test_ctrl_c_stops_the_answer_alone(monkeypatch, capsys):
    heard = []

    def answer(ids, number):
        heard.append(bytes(ids).decode())
        for n in range(1, 6):
            if number == 0 and n == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield 'abcde'[:n]

    before = signal.getsignal(signal.SIGINT)
    out = talk(monkeypatch, capsys, 'one\ntwo\n', answer)
    assert 'abc\nabcde\n' in out
    assert heard[1] == 'User: one\nAssistant: abc\nUser: two\nAssistant:'
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_of_nothing_is_no_turn(monkeypatch, capsys):
    heard = []

    def answer(ids, number):
        heard.append(bytes(ids).decode())
        yield '' if number == 0 else 'yes'

    talk(monkeypatch, capsys, 'one\ntwo\n', answer)
    assert heard == ['User: one\nAssistant:', 'User: two\nAssistant:']


def test_the_oldest_turns_are_forgotten(monkeypatch, capsys):
    heard = []
    typed = 'a\nb\nc\nd\n' + 'too much ' * 20 + '\ne\n'
    out = talk(monkeypatch, capsys, typed, echo(heard), most=70, system='Be short.')
    assert out.count('the oldest turns are forgotten') == 1
    assert [text for text, _ in heard][2:4] == [
        f'Be short.\n\nUser: {a}\nAssistant: I hear\nUser: {b}\nAssistant:' for a, b in ('bc', 'cd')]
    assert re.search(r'error: the message takes 2\d\d tokens: expected at most 70', out)
    assert len(heard) == 5 and heard[4][0].endswith('User: e\nAssistant:')


def test_what_the_tokenizer_can_not_say(monkeypatch, capsys):
    tokenizer = CharTokenizer(sorted(set('User: Assistant\nabc')))

    def answer(ids, number):
        yield 'a'

    out = talk(monkeypatch, capsys, 'é\nab\n', answer, tokenizer=tokenizer)
    assert "error: " in out and "'é' (U+00E9)" in out and out.rstrip().endswith('a')
