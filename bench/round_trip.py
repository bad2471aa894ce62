"""
Encode and decode 10,000 texts with every tokenizer.

    $ python -m bench.round_trip             # a minute or two
    $ python -m bench.round_trip --n=100000

hypothesis draws the texts, among them odd ones such as single surrogates. Char and word
vocabularies are made from each text. OpenAI's vocabularies are left out where tiktoken cannot get
them. Prints a table of failures, then a JSON line; any failure gives exit status 1.
"""

import os
import sys

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tokenizer
from bench import common
from configurator import Count, override
from tokenizer.bytepair import TIKTOKEN_FILES
from tokenizer.patterns import split

# Settings -----------------------------------------------------------------------------------------
n: Count = 10_000  # texts
config = override(globals())
# --------------------------------------------------------------------------------------------------


def tokenizers():
    """Return {name: tokenizer} of all that accept any text."""
    with open(os.path.join(common.ROOT, 'train.py'), encoding='utf-8') as file:
        source = file.read()
    known = {'byte': tokenizer.ByteTokenizer()}
    for pattern in ('gpt2', 'gpt4', 'o200k', None):
        known[f'bpe, pattern {pattern}'] = tokenizer.BPETokenizer.train(source, 700, pattern,
                                                                        ['<|endoftext|>'])
    for name in TIKTOKEN_FILES:
        try:
            known[name] = tokenizer.load(name)
            known[f'{name} in Python'] = tokenizer.BPETokenizer.from_tiktoken(name)
        except ValueError as error:
            print(str(error).splitlines()[0], file=sys.stderr)
    return known


tested = tokenizers()
names = [*tested, 'char, of each text', 'word, of each text']
failures = dict.fromkeys(names, 0)
counts = {'texts': 0}
often = settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate],
                 suppress_health_check=list(HealthCheck))


@often
@given(st.text())
def check_text(text):
    counts['texts'] += 1
    of_text = {}
    if text:
        words = sorted(set(split(text, tokenizer.WordTokenizer.pattern)))
        of_text = {'char, of each text': tokenizer.CharTokenizer.from_text([text]),
                   'word, of each text': tokenizer.WordTokenizer(words)}
    for name, tok in {**tested, **of_text}.items():
        ways = {tuple(tok.encode(text, 'none')), tuple(tok.encode_array(text).tolist())}
        failures[name] += len(ways) > 1 or any(tok.decode(ids) != text for ids in ways)


check_text()
print(common.table([['tokenizer', 'texts', 'failed'], *(
    [name, counts['texts'], failures[name]] for name in names)]))
common.finish('round_trip', n, **counts, failures=failures)
sys.exit(any(failures.values()))
