"""
Encode and decode, 10,000 texts and 10,000 byte strings, with every tokenizer: how many come back otherwise?

    $ python -m bench.round_trip             # a minute or two
    $ python -m bench.round_trip --n=100000

The texts and bytes are drawn by hypothesis, which likes the odd ones: surrogates apart, any character. Each tokenizer
that takes any text meets all of them; char and word vocabularies are made of each text. OpenAI's vocabularies are left
out where tiktoken cannot get them. Prints a table, then a JSON line; any failure ends with status 1.
"""

import os
import sys

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tokenizer
from bench import common
from configurator import override
from tokenizer.bytepair import TIKTOKEN_FILES
from tokenizer.patterns import split

# settings ------------------------------------------------------------------------------------------------------------
n = 10_000  # texts, and byte strings
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------


def tokenizers():
    """{name: tokenizer} of all that take any text."""
    with open(os.path.join(common.ROOT, 'corpus.py'), encoding='utf-8') as file:
        source = file.read()
    found = {'byte': tokenizer.ByteTokenizer()}
    for pattern in ('gpt2', 'gpt4', 'o200k', None):
        found[f'bpe, pattern {pattern}'] = tokenizer.BPETokenizer.train(source, 700, pattern, ['<|endoftext|>'])
    for name in TIKTOKEN_FILES:
        try:
            found[name] = tokenizer.load(name)
            found[f'{name} in Python'] = tokenizer.BPETokenizer.from_tiktoken(name)
        except ValueError as error:
            print(str(error).splitlines()[0], file=sys.stderr)
    return found


tested = tokenizers()
names = [*tested, 'char, of each text', 'word, of each text']
failures = {name: {'texts': 0, 'bytes': 0} for name in names}
counts = {'texts': 0, 'bytes': 0}
often = settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate],
                 suppress_health_check=list(HealthCheck))


@often
@given(st.text())
def texts(text):
    counts['texts'] += 1
    own = {'char, of each text': tokenizer.CharTokenizer.from_text([text]),
           'word, of each text': tokenizer.WordTokenizer(
               sorted(set(split(text, tokenizer.WordTokenizer.pattern))))} if text else {}
    for name, tok in {**tested, **own}.items():
        ways = {tuple(tok.encode(text, 'none')), tuple(tok.encode_array(text).tolist())}
        failures[name]['texts'] += any(tok.decode(ids) != text for ids in ways) or len(ways) > 1


@often
@given(st.binary())
def byte_strings(data):
    counts['bytes'] += 1
    for name, tok in tested.items():
        failures[name]['bytes'] += tok.decode_bytes(tok.encode(data, 'none')) != data


texts()
byte_strings()
print(f'{"tokenizer":24} {"texts":>8} {"failed":>7} {"bytes":>8} {"failed":>7}')
for name in names:
    of_bytes = (counts['bytes'], failures[name]['bytes']) if name in tested else ('-', '-')
    print(f'{name:24} {counts["texts"]:>8} {failures[name]["texts"]:>7} {of_bytes[0]:>8} {of_bytes[1]:>7}')
common.finish('round_trip', n, **counts, failures=failures)
sys.exit(any(sum(failed.values()) for failed in failures.values()))
