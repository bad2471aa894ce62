"""constrain.py: whatever a model that knows nothing writes, matches; by the packages jsonschema and re."""

import json
import re
import sys

import pytest
import torch
from conftest import load_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from flatgpt import constrain
from flatgpt.constrain import Constraint

pytest.importorskip('llguidance')
jsonschema = pytest.importorskip('jsonschema')

TEXT = '{"name": "Ann", "age": 30, "tags": [true, false, null, -1.5e+3]} yes or no, maybe so: é 안녕 😀 (a|b)'
BPE = tokenizer.BPETokenizer.train([TEXT * 3], 300, special_tokens=['<|endoftext|>', '<|user|>'])


def bpe_with_gaps():
    """Tokens of several bytes at 1000 + 2i, the special one in between."""
    merges = BPE.merges
    return tokenizer.BPETokenizer(merges, 'gpt4', {'<|endoftext|>': 1001}, merge_ids=[
        1000 + 2 * i for i in range(len(merges))])


MAKERS = {
    'char': lambda: tokenizer.CharTokenizer.from_text(TEXT + 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,\\'),
    'byte': tokenizer.ByteTokenizer,
    'word': lambda: tokenizer.WordTokenizer(
        [*'abcxeE0123456789{}[]":,.-+ 😀', ' x', 'yes', ' yes', 'no', ' no', ' maybe', 'maybe', ' so', 'name', 'age',
         'tags', 'true', 'false', 'null', '안녕']),
    'bpe': lambda: BPE,
    'bpe with gaps': bpe_with_gaps,
    'gpt2': lambda: load_or_skip('gpt2'),
    'cl100k_base': lambda: load_or_skip('cl100k_base'),
}
made = {}


@pytest.fixture(params=MAKERS)
def tok(request):
    return get(request.param)


def get(name):
    if name not in made:
        made[name] = MAKERS[name]()
    return made[name]


def least(constraint):
    """The least max_new_tokens that check_length() takes; an error says the same number."""
    for n in range(1000):
        try:
            constraint.check_length(n)
        except ValueError as error:
            said = int(re.search(r'--max_new_tokens=(\d+)', str(error))[1])
            assert said > n
        else:
            assert n == 0 or n == said
            return n


def write(constraint, tok, max_new_tokens, seed, greedy=False):
    """What a model with random logits writes that goes on while it can (greedy: that takes its likeliest id)."""
    generator = torch.Generator().manual_seed(seed)
    constraint.check_length(max_new_tokens)
    matcher, ids = constraint.matcher(), []
    for remaining in range(max_new_tokens, 0, -1):
        logits = 3 * torch.randn(tok.vocab_size, generator=generator)
        taken = False
        while not taken:
            allowed = matcher.allowed(remaining)
            assert allowed.shape == (tok.vocab_size,) and allowed.dtype == torch.bool
            assert not allowed[list(tok.special_tokens.values())].any()
            if not allowed.any():
                break
            drawable = logits.masked_fill(~allowed, -torch.inf)
            i = drawable.argmax() if greedy else torch.multinomial(drawable.softmax(0), 1, generator=generator)
            taken = matcher.accept(int(i), remaining)
            if not taken and matcher.may_end:
                break
        if not taken:
            break
        ids.append(int(i))
    assert matcher.may_end
    assert tok.decode_bytes(ids) == matcher.text
    return matcher.text.decode('utf-8')  # which no part of a character would survive


def write_some(constraint, tok, seed=0):
    """Texts written with as few tokens as possible, a few more, and many."""
    n = least(constraint)
    return [write(constraint, tok, n + more, seed + i, greedy)
            for i, (more, greedy) in enumerate([(0, False), (0, True), (1, False), (3, False), (4, True), (25, False)])]


# ----------------------------------------------------------------------------------------------------------------------
# every tokenizer

def test_choices(tok):
    choices = ['yes', 'no', 'maybe so', 'no, maybe', '안녕 😀']
    texts = {write(Constraint(tok, choices=choices), tok, n, seed) for n in (4, 30) for seed in range(12)}
    assert texts <= set(choices) and len(texts) >= 3


def test_regex(tok):
    for regex in (r'(yes|no)(, maybe){1,3}', r'\d+(\.\d+)?', r'(a|b| x){4}', r'[^x]*: (yes|no)'):
        for text in write_some(Constraint(tok, regex=regex), tok):
            assert re.fullmatch(regex, text), (regex, text)


PERSON = {'type': 'object', 'additionalProperties': False, 'required': ['name', 'age', 'tags'], 'properties': {
    'name': {'type': 'string'}, 'age': {'type': 'integer'},
    'tags': {'type': 'array', 'items': {'anyOf': [{'type': 'boolean'}, {'type': 'number'}]}}}}


def test_json_schema(tok):
    for schema in (PERSON, json.dumps(PERSON)):
        for text in write_some(Constraint(tok, json_schema=schema), tok):
            jsonschema.validate(json.loads(text), PERSON)
            assert list(json.loads(text)) == ['name', 'age', 'tags']


# ----------------------------------------------------------------------------------------------------------------------
# any constraint

@settings(max_examples=25)
@given(choices=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8),
       name=st.sampled_from(['byte', 'bpe', 'gpt2']), seed=st.integers(0, 2**32))
def test_any_choices(choices, name, seed):
    assert set(write_some(Constraint(get(name), choices=choices), get(name), seed)) <= set(choices)


letters = st.text('abcxyz019 _é안', min_size=1, max_size=3)
regexes = st.recursive(
    letters | st.sampled_from(['[a-z]', '[^a-z]', '.', r'\d', '[0-9a-f]', 'é', '[가-힣]', r'\.', r'\{']),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map('{0[0]}{0[1]}'.format), st.tuples(inner, inner).map('({0[0]}|{0[1]})'.format),
        st.tuples(inner, st.sampled_from(['*', '+', '?', '{2}', '{1,3}', '{2,}'])).map('({0[0]}){0[1]}'.format)),
    max_leaves=6)


@settings(max_examples=25)
@given(regex=regexes, name=st.sampled_from(['byte', 'bpe', 'gpt2']), seed=st.integers(0, 2**32))
def test_any_regex(regex, name, seed):
    for text in write_some(Constraint(get(name), regex=regex), get(name), seed):
        assert re.fullmatch(regex, text), text


scalars = st.one_of(
    st.sampled_from([{'type': 'null'}, {'type': 'boolean'}, {'type': 'number'}, {'type': 'integer'}, {}]),
    st.tuples(st.integers(-50, 50), st.integers(0, 500)).map(
        lambda pair: {'type': 'integer', 'minimum': pair[0], 'maximum': pair[0] + pair[1]}),
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(
        lambda pair: {'type': 'string', 'minLength': pair[0], 'maxLength': pair[0] + pair[1]}),
    st.sampled_from(['^[A-Z]{3}-[0-9]{4}$', '^(ab|cd)+$', '^[a-z ]*@x$', r'[0-9a-z]+@\w+\.com', 'END']).map(
        lambda pattern: {'type': 'string', 'pattern': pattern}),
    st.lists(st.text(max_size=5) | st.integers() | st.none(), min_size=1, max_size=3).map(lambda one: {'enum': one}))


def object_schema(pairs):
    names = list(dict.fromkeys(name for name, _, _ in pairs))
    return {'type': 'object', 'properties': {name: schema for name, schema, _ in pairs}, 'additionalProperties': False,
            'required': [name for name in names if any(needed for key, _, needed in pairs if key == name)]}


schemas = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, min_size=1, max_size=3).map(lambda some: {'anyOf': some}),
    st.tuples(inner, st.integers(0, 3)).map(lambda pair: {'type': 'array', 'items': pair[0], 'minItems': pair[1]}),
    st.lists(st.tuples(st.sampled_from(['a', 'b', 'a longer "name"', 'é']), inner, st.booleans()), max_size=4).map(
        object_schema)), max_leaves=5)


@settings(max_examples=25)
@given(schema=schemas, name=st.sampled_from(['byte', 'bpe', 'gpt2']), seed=st.integers(0, 2**32))
def test_any_json_schema(schema, name, seed):
    for text in write_some(Constraint(get(name), json_schema=schema), get(name), seed):
        jsonschema.validate(json.loads(text), schema)


# ----------------------------------------------------------------------------------------------------------------------
# what is allowed

def test_accepts_exactly_what_can_still_become_a_choice():
    """With one token per character, a choice can be reached when it is no longer than what remains."""
    choices = ['ab', 'abcde', 'b', 'bcda', 'ca', 'é']
    tok = tokenizer.CharTokenizer('abcdeé')

    def check(text, remaining):
        for i, char in enumerate(tok.chars):
            expected = any(choice.startswith(text + char) and len(choice) <= len(text) + remaining
                           for choice in choices)
            matcher = constraint.matcher()
            for k, known in enumerate(text):
                assert matcher.accept(tok.chars.index(known), remaining + len(text) - k)
            assert matcher.may_end == (text in choices)
            assert matcher.allowed(remaining)[i] or not expected
            assert matcher.accept(i, remaining) == expected, (text, char, remaining)
            if expected and remaining > 1:
                check(text + char, remaining - 1)

    constraint = Constraint(tok, choices=choices)
    for n in range(1, 7):
        check('', n)


def test_all_ways_to_write_a_text_are_allowed():
    tok = get('gpt2')
    allowed = Constraint(tok, choices=['hello']).matcher().allowed(5)
    assert {tok.decode([i]) for i in allowed.nonzero()[:, 0].tolist()} == {'h', 'he', 'hel', 'hell', 'hello'}


def test_every_text_of_the_least_length_is_written():
    """Not only the one ending that is known."""
    tok = get('gpt2')
    for kind in ({'choices': ['yes', 'no', 'no way at all']}, {'regex': 'yes|no|no way at all'}):
        constraint = Constraint(tok, **kind)
        assert {write(constraint, tok, 1, seed) for seed in range(30)} == {'yes', 'no'}


def test_digits_of_a_regex_are_ascii():
    for regex in (r'\d', r'[\d.]', r'(\d)'):
        matcher = Constraint(get('byte'), regex=regex).matcher()
        allowed = matcher.allowed(9).nonzero()[:, 0].tolist()
        assert bytes(allowed).strip(b'.') == b'0123456789'


def test_regex_of_the_least_length():
    for regex, n in ((r'(ax{50}|bx{3})c', 5), (r'.*\d{3}END', 6), (r'(.|\n)*Total: \$\d+\.\d{2}', 12),
                     (r'(\w+ ){20}', 40), ('a{200}', 200)):
        assert least(Constraint(get('byte'), regex=regex)) == n


@pytest.mark.parametrize('schema, n', [
    ({'type': 'array', 'items': {'type': 'object', 'required': ['a'], 'properties': {'a': {'type': 'string'}}},
      'minItems': 4}, len('[{"a":""},{"a":""},{"a":""},{"a":""}]')),
    ({'$ref': '#/$defs/tree', '$defs': {'tree': {'type': 'object', 'required': ['kids', 'v'], 'properties': {
        'kids': {'type': 'array', 'items': {'$ref': '#/$defs/tree'}}, 'v': {'anyOf': [
            {'$ref': '#/$defs/tree'}, {'type': 'null'}]}}}}}, len('{"kids":[],"v":null}')),
    ({'type': 'object', 'required': [f'property_{i}' for i in range(12)], 'properties': {
        f'property_{i}': {'type': ['string', 'array', 'object', 'integer'][i % 4]} for i in range(12)}},
     1 + sum(len(f'"property_{i}":{value},') for i, value in enumerate(['""', '[]', '{}', '0'] * 3))),
    ({'type': 'string', 'format': 'date'}, len('"2000-01-01"'))])
def test_json_of_the_least_length(schema, n):
    constraint = Constraint(get('byte'), json_schema=schema)
    assert least(constraint) == n
    for text in write_some(constraint, get('byte')):
        jsonschema.validate(json.loads(text), schema)


def test_goes_on_when_more_may_follow():
    """may_end comes true on the way, and the text can go on to another end."""
    tok = get('byte')
    matcher = Constraint(tok, regex=r'(.|\n)*Answer: (yes|no)').matcher()
    text = b'Well. Answer: no? Answer: yes'
    ends = []
    for k, i in enumerate(text):
        assert matcher.accept(i, 200 - k)
        ends.append(matcher.may_end)
    assert [k + 1 for k, end in enumerate(ends) if end] == [len(b'Well. Answer: no'), len(text)]


def test_refuses_what_cannot_follow_and_ids_that_write_nothing():
    tok = get('bpe with gaps')
    matcher = Constraint(tok, regex='ab+').matcher()
    for i in (ord('b'), tok.eot, 1003, 999, tok.vocab_size, 10**6, 0xff):
        assert not matcher.accept(i, 9)
    assert matcher.accept(ord('a'), 9) and not matcher.may_end
    assert not matcher.accept(ord('a'), 8) and matcher.text == b'a'
    assert matcher.accept(ord('b'), 8) and matcher.may_end


def test_matchers_are_independent():
    constraint = Constraint(get('byte'), choices=['ab', 'cd'])
    one, two = constraint.matcher(), constraint.matcher()
    assert one.accept(ord('a'), 2) and two.accept(ord('c'), 2)
    assert one.accept(ord('b'), 1) and two.accept(ord('d'), 1)
    assert (one.text, two.text) == (b'ab', b'cd')


def test_a_token_after_which_the_tokenizer_cannot_go_on_is_refused():
    tok = tokenizer.CharTokenizer('ab')
    matcher = Constraint(tok, regex='aé|bb').matcher()
    assert not matcher.accept(0, 9) and matcher.accept(1, 9)


def test_write_takes_the_fewest_tokens():
    """Against all ways to cut the text."""
    vocabulary = constrain.vocabulary(BPE)
    tokens = {token for token in vocabulary.tokens if token}

    def fewest(text):
        return 0 if not text else 1 + min(fewest(text[k:]) for k in range(1, len(text) + 1) if text[:k] in tokens)

    for text in (b'maybe so', b'"name": ', b'false, ', '안녕 '.encode()):
        ids = vocabulary.write(text)
        assert BPE.decode_bytes(ids) == text and len(ids) == fewest(text)


# ----------------------------------------------------------------------------------------------------------------------
# errors

@pytest.mark.parametrize('kind, said', [
    ({}, 'got none'),
    ({'choices': ['a'], 'regex': 'a'}, 'got choices and regex'),
    ({'choices': []}, 'choices is []: expected a list'),
    ({'choices': 'yes,no'}, "choices is 'yes,no': expected a list"),
    ({'choices': ['a', '']}, "choices: '': expected texts of at least one character"),
    ({'choices': [3]}, 'choices: 3: expected texts'),
    ({'choices': ['a\ud800']}, 'surrogate'),
    ({'regex': '['}, 'unclosed character class'),
    ({'regex': 'a(?=b)'}, 'look-ahead'),
    ({'regex': r'(a)\1'}, 'backreferences are not supported'),
    ({'regex': r'a\b'}, 'lookarounds not supported'),
    ({'regex': r'[^\s\S]'}, 'no text that matches'),
    ({'json_schema': '{"type": '}, 'json_schema is not JSON'),
    ({'json_schema': '[1]'}, 'expected an object'),
    ({'json_schema': {'type': 'strin'}}, 'strin'),
    ({'json_schema': {'not': {'type': 'null'}}}, '"not"'),
    ({'json_schema': {'type': 'array', 'uniqueItems': True}}, 'uniqueItems'),
    ({'json_schema': {'type': 'array', 'contains': {}}}, 'contains'),
    ({'json_schema': {'oneOf': [{'type': 'string'}, {'minLength': 2}]}}, 'oneOf'),
    ({'json_schema': {'type': 'string', 'format': 'phone'}}, 'phone'),
    ({'json_schema': {'type': 'string', 'pattern': r'(a)\1'}}, 'backreferences'),
    ({'json_schema': {'type': 'integer', 'minimum': 3, 'maximum': 2}}, 'minimum (3) is greater than maximum (2)'),
    ({'json_schema': {'items': {'type': 'array', 'items': [{}]}}}, 'prefixItems'),
    ({'json_schema': {'type': 'object', 'minProperties': 3, 'required': ['a']}}, '"minProperties": 3'),
    ({'json_schema': {'$ref': '#/missing'}}, '/missing'),
    ({'json_schema': {'$ref': '#'}}, 'no text that matches')])
def test_errors(kind, said):
    with pytest.raises(ValueError) as error:
        Constraint(get('byte'), **kind)
    assert said in str(error.value) and '\n' not in str(error.value)


def test_what_a_tokenizer_cannot_write():
    tok = tokenizer.CharTokenizer('abc yesno')
    with pytest.raises(ValueError, match=r"the choice 'né' cannot be written .* no token has 'é'"):
        Constraint(tok, choices=['yes', 'né'])
    with pytest.raises(ValueError, match="regex: .* no token has 'x'"):
        Constraint(tok, regex='ax+')
    with pytest.raises(ValueError, match="json_schema: .* no token has '\"' ':' '{' '}'"):
        Constraint(tok, json_schema={'type': 'object', 'required': ['a'], 'properties': {'a': {'const': 'b'}}})
    with pytest.raises(ValueError, match="'nope' cannot be written with this tokenizer: its tokens do not join"):
        Constraint(tokenizer.WordTokenizer(['no', 'pep']), choices=['nope'])


def test_check_length():
    constraint = Constraint(get('byte'), choices=['hello', 'good day'])
    constraint.check_length(5)
    with pytest.raises(ValueError, match=r"max_new_tokens=4: .* 'hello', takes 5: expected --max_new_tokens=5"):
        constraint.check_length(4)


def test_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'llguidance', None)
    with pytest.raises(ValueError, match='pip install .*constrain'):
        Constraint(get('byte'), choices=['a'])


@pytest.mark.parametrize('schema, refused', [
    ({'type': 'number', 'exclusiveMinimum': 0, 'maximum': 0.5}, True), ({'anyOf': [
        {'exclusiveMaximum': 0, 'minimum': -0.5, 'type': 'number'}]}, True),
    ({'type': 'number', 'exclusiveMinimum': 0, 'multipleOf': 0.1}, True),
    ({'type': 'number', 'exclusiveMinimum': 0}, False),
    ({'type': 'integer', 'exclusiveMinimum': 0, 'maximum': 5}, False),
    ({'const': {'items': [1], 'exclusiveMinimum': 0, 'maximum': 0.5}}, False)])
def test_bounds_that_the_library_would_pass_over(schema, refused):
    """An exclusive 0 in a small range is refused; what is only data is no schema."""
    if refused:
        with pytest.raises(ValueError, match='exclusiveM.*: 0 would allow 0'):
            Constraint(tokenizer.ByteTokenizer(), json_schema=schema)
    else:
        jsonschema.validate(json.loads(bytes(Constraint(tokenizer.ByteTokenizer(), json_schema=schema).ending)), schema)
