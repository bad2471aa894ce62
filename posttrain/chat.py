import contextlib
import re
import signal
import sys

from configurator import UserError
from tokenizer.chat import render

HELP = """\
/reset  forget the conversation         /help   this
/retry  another answer to the same      Ctrl-C  stops an answer; here, leaves
A line that ends with \\ goes on in the next one."""


def converse(answer, template, tokenizer, most, system=''):
    """
    Talk until Ctrl-D, or Ctrl-C at the prompt. answer(ids, number) yields the text of an answer as it grows; number
    counts them. most: tokens that a conversation may have; of a longer one the oldest turns are forgotten.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit lines)
    beginning = [{'role': 'system', 'content': system}] if system else []
    if len(ids := render([*beginning, {'role': 'user', 'content': ''}], template, tokenizer)) >= most:
        raise UserError(f'the system message and the format of the chat take {len(ids):,} tokens, and beside an '
                         f'answer there is room for {most:,}; shorten --system, or answers with --max_new_tokens')
    messages, number, was_told = list(beginning), 0, False
    print('/help for help, Ctrl-D to leave')
    while True:
        try:
            text = read_message()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == '/reset':
            messages = list(beginning)
            print('(forgotten)')
            continue
        if text == '/retry' and len(messages) > len(beginning):
            messages.pop()
        elif text == '/retry':
            print('(there is no answer yet)')
            continue
        elif re.fullmatch(r'/\w+', text):
            print(HELP if text == '/help' else f'there is no {text}\n{HELP}')
            continue
        elif text.strip():
            messages.append({'role': 'user', 'content': text})
        else:
            continue
        said = ''
        try:
            kept, ids = shorten(messages, template, tokenizer, most)
            if len(kept) < len(messages) and not was_told:
                print(f'(a conversation has room for {most:,} tokens; from now on the oldest turns are forgotten)')
                was_told = True
            messages = kept
            said = stream(answer(ids, number))
        except ValueError as error:  # what this tokenizer or this template can't do; another message may go
            print(f'error: {error}')
        number += 1
        if said:
            messages.append({'role': 'assistant', 'content': said})
        else:
            messages.pop()  # not as if it had been answered


def for_terminal(text):
    """The text; at a terminal without what would move its cursor or change its colours."""
    if not sys.stdout.isatty():
        return text
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', lambda char: f'\\x{ord(char[0]):02x}', text)


def read_message():
    text = input('> ')
    while text.endswith('\\'):
        text = text[:-1] + '\n' + input('. ')
    return text


def shorten(messages, template, tokenizer, most):
    """-> (messages without as many of the oldest turns as it takes, their ids). ValueError if the last is too long."""
    n_first = int(messages[0]['role'] == 'system')
    while len(ids := render(messages, template, tokenizer)) > most:
        if len(messages) <= n_first + 1:
            raise UserError(f'this takes {len(ids):,} tokens, and the context of the model has room for {most:,} '
                             f'beside an answer; say it shorter')
        messages = messages[:n_first] + messages[n_first + 2 :]  # a message and its answer
    return messages, ids


def stream(texts):
    """
    Print the text that grows, until it ends or Ctrl-C is pressed; -> what was said. A second Ctrl-C, of somebody who
    does not want to wait for the token that is being computed, stops everything.
    """
    presses, said = [], ''

    def press(*_):
        if presses:
            raise KeyboardInterrupt
        presses.append(True)

    usual = signal.signal(signal.SIGINT, press)
    try:
        for text in texts:
            printed, said = len(said), text.lstrip()
            print(for_terminal(said[printed:]), end='', flush=True)
            if presses:
                break
    finally:
        signal.signal(signal.SIGINT, usual)
        print()
    return said.strip()
