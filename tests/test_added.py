"""tokenizer/added.py against tokenizers: added tokens that nest, overlap, strip, or are not special.

Run: pytest tests/test_added.py
"""

import json
import random

import pytest
from format_cases import byte_level_file, make_small, nasty_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_cases import many

import tokenizer
from configurator import UserError
from tokenizer import added, base, formats, patterns, tokenizer_json

tokenizers = pytest.importorskip('tokenizers')

PIECES = [' ', ' ', '  ', '\t', '\n', '\u3000', '\x85', 'a', 'b', 'ab', 'A', 'é', 'e\u0301', '\u0301', '<', '>', '<a>', '_', '٣',
          'नि', '\u200d', '\u24b6', '日', 'K', '\u212a', ';', '.', '\ua7ce']
CONTENTS = ['  ', '   ', '    ', ' a', 'a ', 'ab', 'abc', 'b', '<a>', '<a><', 'x<a>y', '<|end|>', 'é', 'e\u0301', 'a é', '\n\n', '\t',
            'K', 'Kb', '_', '日', ' \n', '<mask>', '[PAD]', 'the']


def file_with(tokens, normalizer=None, pattern='gpt4'):
    """The content of a tokenizer.json with added tokens, as {content: {flag: True}}."""
    values = {**make_small(), 'pattern': patterns.PATTERNS.get(pattern), 'special_tokens': {}}
    file = json.loads(json.dumps(tokenizer_json.hf_tokenizer(values, 'x')))
    file['normalizer'] = normalizer and {'type': normalizer}
    vocab, following = file['model']['vocab'], len(file['model']['vocab'])
    for content, flags in tokens.items():
        i = vocab.get(content, following)
        following = max(following, i + 1)
        file['added_tokens'].append({
            'id': i, 'content': content, 'single_word': False, 'lstrip': False, 'rstrip': False,
            'normalized': False, 'special': False, **flags})
    return file


def same_ids(file, texts, tmp_path):
    """Read, encoded, saved and written again: the ids of tokenizers."""
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps(file), encoding='utf-8')
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), tokenizer.load(path)
    assert tokenizer.from_dict(json.loads(json.dumps(ours.to_dict()))).to_dict() == ours.to_dict()
    formats.write_tokenizer_json(ours.to_dict(), path)
    again = tokenizers.Tokenizer.from_file(str(path))
    assert formats.read(path) == ours.to_dict()
    for text in texts:
        try:
            ids = theirs.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            # where one token takes spaces that another one is, and that one strips too
            assert type(error).__name__ == 'PanicException' and ours.encode(text, 'all')
            continue
        assert ours.encode(text, 'all') == ids == again.encode(text, add_special_tokens=False).ids, repr(text)
        assert list(ours.encode_iterable(list(text), 'all')) == ids
        if not any(token in text for token in ours.special_tokens):
            assert ours.encode(text) == ours.encode_array(text).tolist() == ids
            assert ours.encode_batch([text, 'a'])[0].tolist() == ids
    return ours


FLAGS = st.fixed_dictionaries({name: st.sampled_from([False, False, True]) for name in [*added.RULES, 'special']})


@settings(many, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_added_tokens(monkeypatch, tmp_path, data):
    """Some of CONTENTS with any flags, in texts of them and what stands at their borders."""
    monkeypatch.setattr(base, 'STREAM_CHARS', 1)
    names = data.draw(st.lists(st.sampled_from(CONTENTS), min_size=1, max_size=5, unique=True))
    tokens = {name: data.draw(FLAGS) for name in names}
    file = file_with(tokens, data.draw(st.sampled_from([None, 'NFC'])), data.draw(st.sampled_from(['gpt4', 'gpt2', None])))
    parts = st.lists(st.sampled_from([*names, *names, *PIECES]), max_size=12).map(''.join)
    try:
        same_ids(file, data.draw(st.lists(parts, min_size=1, max_size=6)), tmp_path)
    except UserError as error:
        # é is named like another byte, and a special token cannot be a byte or a merge's
        assert ('é' in names and 'has the id of the bytes' in str(error)
                or any(tokens[name]['special'] and name in ('b', 'K', '_', 'é', 'ab', 'abc', 'the') for name in names))


@pytest.mark.parametrize('normalizer', [None, 'NFC'])
def test_runs_of_spaces_as_in_gpt_neox(normalizer, tmp_path, monkeypatch):
    """Two to 24 spaces are tokens, looked for in normalized text; the rest is cut by GPT-2's pattern."""
    monkeypatch.setattr(base, 'STREAM_CHARS', 8)
    tokens = {'<|endoftext|>': {'special': True}, '<|padding|>': {'special': True},
              **{' ' * n: {'normalized': True} for n in range(24, 1, -1)}}
    code = 'def f(x):\n        if x:\n            return {"a":   x}  # done\n' + ' ' * 60 + '\n'
    rng = random.Random(0)
    texts = [code, code.replace('    ', '\t'), *(''.join(rng.choices(PIECES, k=30)) for _ in range(200))]
    ours = same_ids(file_with(tokens, normalizer, 'gpt2'), texts, tmp_path)
    assert ours.added_tokens[' ' * 24] == 602 and len(ours.added_tokens) == 23 and ours._added.can_cut
    assert ours.decode(ours.encode(code)) == code
    assert ours.added_tokens['        '] in ours.encode(code)
    assert len(list(ours.cut_safely([code] * 40))) > 20

    @settings(many, max_examples=200)
    @given(nasty_text)
    def same(text):
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
        if '<|endoftext|>' not in text:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    same()


def test_nested_special_tokens(tmp_path):
    tokens = dict.fromkeys(['<a>', '<a><b>', '<b>', '<b><c', '<x<a>y>'], {'special': True})
    ours = same_ids(file_with(tokens), ['<a><b>', '<a><a><b><c', '<x<a>y>', '<x<a><b>', 'a<b><c>d', '<a'], tmp_path)
    assert not ours.token_rules  # none of them needs a rule
    assert [ours.decode([i]) for i in ours.encode('<a><b><c', 'all')][:1] == ['<a><b>']
    with pytest.raises(UserError, match='the text has the special token'):
        ours.encode('<x<a>y>')
    with pytest.raises(UserError, match='overlap'):  # a new vocabulary needs none
        tokenizer.BPETokenizer.train('text', 300, special_tokens=['<a>', '<a><b>'])


def test_a_token_that_merges_make_too(tmp_path):
    """An added 'ab' has the id of the merge a b, and is cut out of abc, where a (bc) stood before."""
    file = byte_level_file(['b c', 'a b'])
    file['added_tokens'] = [{'id': 257, 'content': 'ab', 'single_word': False, 'lstrip': False, 'rstrip': False,
                             'normalized': False, 'special': False}]
    ours = same_ids(file, ['abc', 'ab', 'bc', 'cab'], tmp_path)
    assert ours.encode('abc') == [257, 99] and ours.decode([257, 99]) == 'abc'
    with pytest.raises(UserError, match='has no added tokens, such as'):
        formats.write_tiktoken(ours.to_dict(), tmp_path / 'a.tiktoken')


@pytest.mark.parametrize('change, message', [
    ({'token_rules': {'<a>': ['strip']}}, "rules of the added token '<a>' are .*expected a list of normalized"),
    ({'token_rules': {'<a>': 'lstrip'}}, 'expected a list'), ({'token_rules': ['<a>']}, 'token_rules'),
    ({'added_tokens': {'  ': 97}}, 'two tokens have the same id'), ({'added_tokens': {'  ': '5'}}, 'special tokens are'),
])
def test_descriptions_that_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        tokenizer.from_dict({**make_small(), **change})
