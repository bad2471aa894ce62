"""Talk to a model at the terminal.

    $ python -m posttrain.chat --out_dir=out-sft
    $ python -m posttrain.chat --init_from=FOLDER --system="Be brief."
    $ python -m posttrain.chat --out_dir=out-grpo-tiny-chat --tools=calculator

A model with a chat template answers in its format; any other continues a transcript.
"""

import contextlib
import re
import signal
from dataclasses import replace
from typing import Literal

from configurator import (
    Count,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Seed,
    Share,
    UserError,
    override,
    printable,
)
from flatgpt import decoding, output
from flatgpt.generate import generate_texts
from flatgpt.sampling import Sampling
from posttrain.tools import PYTHON_END, check_tokenizer, toolbox
from tokenizer.chat import find_endings, render

output.protect()

# settings -----------------------------------------------------------------------------------------
init_from = 'resume'  # 'resume': out_dir; or a Hugging Face folder, a hub id, 'gpt2' to 'gpt2-xl'
out_dir = 'out'  # folder of ckpt.pt and best.pt
which: Literal['best', 'last'] | Count = 'best'  # best.pt if there is one; ckpt.pt; ckpt-STEP.pt
system = ''  # the system message: the assistant's role and task
tools: bool | str = False  # that the model may call: calculator,python; True: the calculator
max_new_tokens: Count = 500  # tokens in each answer
slide: Count = 1  # tokens that a full context drops at once; 1 is exact, more are faster
lookup: Natural = 8  # tokens that repeats let it guess at once; 0: none
# choice of the next token
temperature: NonNegative = 0.8  # 1: the model's own; lower: less random; 0: the likeliest
top_k: Natural | None = 200  # only the k likeliest tokens; None or 0: all
top_p: Share | None = None  # only the likeliest tokens that together have this probability
min_p: Probability | None = None  # only tokens with this share of the largest probability
repetition_penalty: Positive = 1.0  # above 1: earlier tokens become less likely
seed: Seed = 1337  # with the number of an answer it fixes that answer
# machine
device = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', ...
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
quantize: Literal['', 'int8'] = ''  # 'int8': 8-bit weights, on a CPU the fastest
compile: bool | Literal['auto'] = 'auto'  # compile the code of a step
config = override(globals())
# --------------------------------------------------------------------------------------------------

HELP = """\
/reset  forget the conversation       /help   print this
/retry  another answer to the same    Ctrl-C  stop the answer, or leave
A line that ends with \\ continues in the next one."""


def main():
    # open the model, and find the ends of its answers
    model, tokenizer, template, line = decoding.open_model(config)
    block_size, system_message = model.config.block_size, system
    stop_ids, stops = find_endings(template, tokenizer)
    allowed = toolbox(tools)
    if allowed:
        if template is None:
            raise UserError(f'tools={tools}: expected a chat model, trained on conversations')
        check_tokenizer(tokenizer)
        system_message = f'{system} {allowed.system}'.strip()
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
                        stop_ids=stop_ids, slide=slide, lookup=lookup, stops=stops,
                        seed=seed)

    # choose device, precision and compilation
    decoding.prepare(model, config)
    print(line, flush=True)
    print('a chat model: it answers in its format' if template else
          'a model without a chat format: it continues a transcript')
    messages = [*beginning_of(system_message), {'role': 'user', 'content': 'Hello'}]
    ids = render(messages, template, tokenizer)[-block_size:]
    decoding.warm_up(model, generate_texts(model, tokenizer, [ids], sampling))

    def answer(ids, number):
        """Yield the growing text of an answer; continue it behind the value of each call."""
        text, n_left, n_calls = '', max_new_tokens, 0
        while n_left > 0:
            is_call = False
            for [sample] in generate_texts(
                    model, tokenizer, [ids[-block_size:]], replace(sampling, max_new_tokens=n_left),
                    [number + n_calls * 2**16]):  # new random numbers after a call
                yield text + sample.shown(stops)
                is_call = allowed and sample.ids[-1:] == [tokenizer.special_tokens[PYTHON_END]]
                if is_call:
                    break
            if not is_call:
                return
            output = allowed.output_of(sample.ids, tokenizer)
            n_left, n_calls = n_left - len(sample.ids) - len(output), n_calls + 1
            ids, text = ids + sample.ids + output, text + sample.text + tokenizer.decode(output)
            yield text

    # talk
    room = block_size - min(max_new_tokens, block_size // 2)
    converse(answer, template, tokenizer, room, system_message)


def beginning_of(system):
    """Return the messages before the user's first."""
    return [{'role': 'system', 'content': system}] if system else []


def converse(answer, template, tokenizer, room, system=''):
    """Talk until Ctrl-D, or Ctrl-C at the prompt.

    answer(ids, number) yields the text of an answer as it grows; number counts the answers.
    room: tokens of a conversation; a longer one loses its oldest turns.
    Raises UserError for a system message that leaves no room.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (edits the lines of input())
    beginning = beginning_of(system)
    ids = render([*beginning, {'role': 'user', 'content': ''}], template, tokenizer)
    if len(ids) >= room:
        raise UserError(f'the system message and the format take {len(ids):,} tokens: expected '
                        f'fewer than {room:,}; shorten --system, or lower --max_new_tokens')
    messages, number, has_warned = list(beginning), 0, False
    print('/help for help, Ctrl-D to leave')
    while True:
        try:
            text = read_message()
        except (EOFError, KeyboardInterrupt):
            print()
            return

        # a command, or the next message
        if text == '/retry' and len(messages) > len(beginning):
            messages.pop()
        elif text.strip() and not re.fullmatch(r'/\w+', text):
            messages.append({'role': 'user', 'content': text})
        else:
            if text == '/reset':
                messages = list(beginning)
            replies = {'/reset': '(forgotten)', '/retry': '(there is no answer yet)', '/help': HELP}
            if text.strip():
                print(replies.get(text, f'there is no {text}\n{HELP}'))
            continue

        # the answer
        reply = ''
        try:
            kept, ids = shorten(messages, template, tokenizer, room)
            if len(kept) < len(messages) and not has_warned:
                print(f'(the oldest turns are forgotten, to keep to {room:,} tokens)')
                has_warned = True
            messages = kept
            reply = stream(answer(ids, number))
        except UserError as error:  # another message may be possible
            print(f'error: {printable(error)}')
        number += 1
        if reply:
            messages.append({'role': 'assistant', 'content': reply})
        else:
            messages.pop()  # the message counts as unsent


def read_message():
    """Read a message; a line that ends with a backslash continues in the next."""
    text = input('> ')
    while text.endswith('\\'):
        text = text[:-1] + '\n' + input('. ')
    return text


def shorten(messages, template, tokenizer, room):
    """Drop the oldest turns until a conversation fits; -> (messages, their ids).

    Raises UserError if the last message alone does not fit.
    """
    n_first = int(messages[0]['role'] == 'system')
    while len(ids := render(messages, template, tokenizer)) > room:
        if len(messages) <= n_first + 1:
            raise UserError(f'the message takes {len(ids):,} tokens: expected at most {room:,}, '
                            f'the context of the model without an answer; shorten it')
        messages = messages[:n_first] + messages[n_first + 2 :]  # a message and its answer
    return messages, ids


def stream(texts):
    """Print a growing text until it ends or Ctrl-C is pressed; -> the text.

    A second Ctrl-C raises KeyboardInterrupt at once, also while a token is computed.
    """
    presses, text = [], ''

    def press(*_):
        if presses:
            raise KeyboardInterrupt
        presses.append(True)

    previous = signal.signal(signal.SIGINT, press)
    try:
        for grown in texts:
            n_printed, text = len(text), grown.lstrip()
            print(decoding.for_terminal(text[n_printed:]), end='', flush=True)
            if presses:
                break
    finally:
        signal.signal(signal.SIGINT, previous)
        print()
    return text.strip()


if __name__ == '__main__':
    main()
