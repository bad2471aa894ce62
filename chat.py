"""
Conversations: from messages to the ids that an assistant's answer continues, and the loop at the terminal.

    ids = render([{'role': 'user', 'content': 'Hello'}], template, tokenizer)
    stop_ids, stop_texts = find_endings(template, tokenizer)

A template is one of Hugging Face's, in Jinja; render() gives the ids that transformers' apply_chat_template() does.
A model without one gets a transcript, which any model of text can go on with:

    User: Hello
    Assistant:
"""

import contextlib
import functools
import json
import re
import signal
import sys
from datetime import datetime

import bpe
from interchange import ANSWER_ENDS, DOCUMENT_ENDS

NAMES = {'user': 'User', 'assistant': 'Assistant'}  # in a transcript
ROLES = ('system', 'user', 'assistant', 'tool')
# Most tokenizers do not say what their special tokens are for: by name, those that begin a text, or end an answer
BEGINNINGS = ('<|begin_of_text|>', '<s>', '<|endoftext|>')  # of Llama 3, Mistral, GPT-2
ENDINGS = (*ANSWER_ENDS, '</s>', *DOCUMENT_ENDS)
THOUGHTS = ('<think>', '</think>')  # templates look for these in an answer, to forget what is between them
HELP = """\
/reset  forget the conversation         /help   this
/retry  another answer to the same      Ctrl-C  stops an answer; here, leaves
A line that ends with \\ goes on in the next one."""

# From messages to ids ------------------------------------------------------------------------------------------------


def render(messages, template, tokenizer):
    """
    Messages, dicts with role and content, the last one not the assistant's, -> the ids after which the answer comes.
    template: Jinja's, or None for a transcript. What reads like a special token in a content is ordinary text, so that
    nobody can end his turn and speak as another one. Raises ValueError for what is no conversation, and with the
    template's own words for one that it refuses.
    """
    check_messages(messages)
    if template is None:
        return tokenizer.encode(transcript(messages), allowed_special='none')
    # Each special token in a content becomes a private character that stands for it until the template's own are ids.
    # The content is otherwise what the template expects: it may strip it, or look into it.
    contents = ''.join(message['content'] for message in messages)
    free = (char for char in map(chr, range(0xF0000, 0x10FFFE)) if char not in contents)
    stand_ins = dict(zip(tokenizer.special_tokens, free, strict=False))

    def hide(message):
        hidden = [token for token in stand_ins if not (message['role'] == 'assistant' and token in THOUGHTS)]
        parts = bpe.split_specials(message['content'], hidden)
        content = ''.join(stand_ins[part] if i % 2 else part for i, part in enumerate(parts))
        return {'role': message['role'], 'content': content}

    text = apply_template(template, tokenizer, [hide(message) for message in messages], add_generation_prompt=True)
    shown = {ord(char): token for token, char in stand_ins.items()}
    ids = []
    for i, part in enumerate(bpe.split_specials(text, list(tokenizer.special_tokens))):
        if i % 2:
            ids.append(tokenizer.special_tokens[part])
        else:
            ids += tokenizer.encode(part.translate(shown), allowed_special='none')
    return ids


def check_messages(messages):
    """ValueError unless these are messages of a conversation in which the assistant is next."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('messages are a list of at least one, such as [{"role": "user", "content": "Hello"}]')
    for message in messages:
        role, content = (message.get('role'), message.get('content')) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f'{json.dumps(message)[:60]} is no message; expected a role, one of {", ".join(ROLES)}, '
                             f'and a text, such as {{"role": "user", "content": "Hello"}}')
    if messages[-1]['role'] == 'assistant':
        raise ValueError("the last message is the assistant's own; expected one that it can answer")


def transcript(messages):
    """What a model without a template continues."""
    lines = [f'{NAMES[message["role"]]}: {message["content"].strip()}\n' if message['role'] in NAMES else
             f'{message["content"].strip()}\n\n' for message in messages]
    return ''.join(lines) + 'Assistant:'


def apply_template(template, tokenizer, messages, add_generation_prompt):
    """-> text, in which special tokens are spelt out."""
    def named(names):
        return next((name for name in names if name in tokenizer.special_tokens), '')

    try:
        return compiled(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
            bos_token=tokenizer.bos_token or named(BEGINNINGS), eos_token=named(ENDINGS))
    except Exception as error:  # of Jinja, of the template, or of what it does to the messages
        raise ValueError(f"the model's chat template can not render this conversation: {error}") from error


@functools.lru_cache(maxsize=2)
def compiled(template):
    """A template, with what transformers offers to it. It comes with a model, from anybody, hence the sandbox."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda format: datetime.now().strftime(format)
    # {% generation %} ... {% endgeneration %}, around what the assistant says, changes nothing of the text
    template = re.sub(r'(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})',
                      lambda tag: tag[1] + ('endif' if tag[2] else 'if true') + tag[3], template)
    return environment.from_string(template)


def find_endings(template, tokenizer):
    """-> (ids, texts) that end an answer: the usual special tokens, and what the template writes after an answer."""
    ids = {i for token, i in tokenizer.special_tokens.items() if token in ENDINGS}
    if template is None:
        return ids, ['\nUser:']
    question, answer = '\U000f0000', '\U000f0001'
    messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer},
                {'role': 'user', 'content': question}]
    text = apply_template(template, tokenizer, messages, add_generation_prompt=False)
    after = text.rpartition(answer)[2].partition(question)[0]
    words, *special = bpe.split_specials(after, list(tokenizer.special_tokens))
    if special and not words.strip():
        ids.add(tokenizer.special_tokens[special[0]])
    return ids, [words.rstrip()] if words.strip() else []


# At the terminal -----------------------------------------------------------------------------------------------------


def converse(answer, template, tokenizer, most, system=''):
    """
    Talk until Ctrl-D, or Ctrl-C at the prompt. answer(ids, number) yields the text of an answer as it grows; number
    counts them. most: tokens that a conversation may have; of a longer one the oldest turns are forgotten.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit lines)
    beginning = [{'role': 'system', 'content': system}] if system else []
    if len(ids := render([*beginning, {'role': 'user', 'content': ''}], template, tokenizer)) >= most:
        raise ValueError(f'the system message and the format of the chat take {len(ids):,} tokens, and beside an '
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
            raise ValueError(f'this takes {len(ids):,} tokens, and the context of the model has room for {most:,} '
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
