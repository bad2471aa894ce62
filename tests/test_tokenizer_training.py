"""tokenizer/: special tokens, training, words. Run: pytest tests/test_tokenizer_training.py"""


from pathlib import Path

import pytest
from conftest import load_or_skip
from hypothesis import given, settings
from tokenizer_cases import (
    EOT,
    PROSE,
    USER,
    make_trained,
    many,
    readable,
    same_everywhere,
    texts,
    train,
)

import tokenizer
from configurator import UserError
from tokenizer import BPETokenizer, WordTokenizer, fast


@pytest.fixture(scope='module')
def trained():
    return make_trained()


# Special tokens -----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def chat():
    return BPETokenizer.train('the cat, the hat', 262, 'gpt4', [EOT, USER, '[END]'])


def test_special_tokens_have_the_last_ids(chat):
    assert chat.special_tokens == {EOT: 259, USER: 260, '[END]': 261}
    assert (chat.vocab_size, chat.eot) == (262, 259)
    assert chat.decode([259, 260, 261]) == EOT + USER + '[END]'
    assert (BPETokenizer.train('the cat', 258, special_tokens='<|x|>').special_tokens
            == {'<|x|>': 257})


@pytest.mark.parametrize('everything', ['all', {EOT, USER, '[END]'},
                                        frozenset([EOT, USER, '[END]']),
                                        [EOT, USER, '[END]'], (USER, '[END]', EOT)],
                                        ids=['all', 'set', 'frozenset', 'list', 'tuple'])
def test_allowed_special_tokens_become_ids(chat, everything):
    text = f'{EOT}{EOT}a{USER} [END]\n<|user says |>'
    ids = chat.encode(text, everything)
    assert ids == [259, 259, 97, 260, 32, 261, *b'\n<|user says |>']
    assert chat.decode(ids) == text


def test_special_tokens_as_ordinary_text(chat):
    assert chat.encode('a[END]', 'none') == list(b'a[END]')


@pytest.mark.parametrize('allowed', ['none_raise', set(), [], {USER}, {'[END]', USER}],
                         ids=['none_raise', 'empty set', 'empty list', 'one', 'two'])
def test_special_tokens_not_allowed_are_refused(chat, allowed):
    with pytest.raises(ValueError,
                       match=r"special token '<\|endoftext\|>' \(after 'well '\)") as error:
        chat.encode('well ' + EOT, allowed)
    for remedy in ("allowed_special={'<|endoftext|>'}", "'all'", "allowed_special='none'"):
        assert remedy in str(error.value)
    assert chat.encode(b'the', allowed) == chat.encode('the', allowed)
    with pytest.raises(ValueError, match='special token'):
        chat.encode(b'well ' + EOT.encode(), allowed)


@pytest.mark.parametrize('allowed, message', [
    ({'<|endofttext|>'},
     r"'<\|endofttext\|>'.*it has: <\|endoftext\|>, .*did you mean '<\|endoftext\|>'"),
    (['x'], "'x', which is no special token"),
    ('some', "'some'; expected 'all', 'none', 'none_raise' or a set"),
    (EOT, "expected 'all'"),
    (None, 'None; expected'),
    (3, '3; expected'),
], ids=str)
def test_unknown_allowed_special(chat, allowed, message):
    with pytest.raises(ValueError, match=message):
        chat.encode('text', allowed)


def test_tokenizers_without_special_tokens():
    for tok in (tokenizer.ByteTokenizer(), tokenizer.CharTokenizer('<|endoftx>'), BPETokenizer([])):
        assert tok.special_tokens == {} and tok.eot is None
        for allowed in ('all', 'none', 'none_raise', set()):
            assert tok.decode(tok.encode(EOT, allowed)) == EOT
        with pytest.raises(ValueError, match='it has: none'):
            tok.encode(EOT, {EOT})


@pytest.mark.parametrize('specials, message', [
    ({'': 300}, "got '': 300"),
    ({5: 300}, 'got 5: 300'),
    ({'<a>': '300'}, "'<a>': '300'"),
    ({'<a>': True}, 'True'),
    ({'<a>': -1}, '-1'),
    ({'<a>': 300, '<b>': 300}, 'same id'),
    ({'<a>': 65}, 'same id'),
    (['<a>', 'x<a>x'], "'<a>' stands in 'x<a>x'"),
    (['<a><b>', '<b>'], "'<b>' stands in '<a><b>'"),
    (['<a>', '<a><b>'], "'<a>' stands in '<a><b>'"),
    (['=a=', '=b'], "'=' ends '=a=' and begins '=b'"),
    (['=b', '=a='], "'=' ends '=a=' and begins '=b'"),
    (['<|a|>|', '|>|b'], r"'\|>\|' ends '<\|a\|>\|' and begins"),
], ids=str)
def test_special_tokens_that_cannot_be(specials, message):
    """In any vocabulary; those that overlap in a new one, while files of others are read."""
    with pytest.raises(ValueError, match=message) as error:
        if isinstance(specials, list):
            BPETokenizer.train('text', 300, special_tokens=specials)
        else:
            BPETokenizer([], None, specials)
    assert '  ' not in str(error.value)  # a space too many where the message was put together


def test_no_merge_crosses_special_tokens_or_texts(monkeypatch):
    merges = [(b'b', b'x'), (b'x', b'a'), (b'c', b'd')]
    for has_gigatoken in (fast.has_gigatoken(), False):
        monkeypatch.setattr(fast, 'has_gigatoken', lambda installed=has_gigatoken: installed)
        for pattern in ('gpt2', 'gpt4', None):
            text = 'xa<|end|>bx<|end|>' * 50 + 'cd'
            assert BPETokenizer.train(text, 260, pattern, '<|end|>').merges == merges
            texts = ['xa', 'bx'] * 50 + ['cd']
            assert BPETokenizer.train(texts, 259, pattern).merges == merges


# Training -----------------------------------------------------------------------------------------

def test_training_on_strings():
    expected = BPETokenizer.train(PROSE, 290).to_dict()
    assert BPETokenizer.train([PROSE], 290).to_dict() == expected
    assert BPETokenizer.train(iter([PROSE, '']), 290, workers=2).to_dict() == expected
    assert BPETokenizer.train('a\ud800a\ud800', 257, None).merges == [(b'a', b'\xef')]  # as U+FFFD


def test_training_with_gigatoken_changes_nothing(monkeypatch):
    pytest.importorskip('gigatoken')
    accelerated = train('gpt2', 900).to_dict()
    monkeypatch.setattr(fast, 'has_gigatoken', lambda: False)
    assert train('gpt2', 900).to_dict() == accelerated
    assert len(accelerated['merges']) == 900 - 256 - 2


@pytest.mark.parametrize('arguments, message', [
    (('text', 255), 'vocab_size is 255; expected at least 256: 256 bytes and 0 special'),
    (('text', 257, 'gpt4', ['<a>', '<b>']), 'at least 258: 256 bytes and 2 special'),
    (('text', 300.0), '300.0'),
    (('', 300), 'the text to train on is empty; expected some text'),
    (([], 300), 'empty'),
    (('aaaa', 300), 'has 2 pairs to join, and vocab_size 300 needs 44: .* at most 258'),
    (('aaaa', 300, 'gpt2'), 'has 2 pairs to join'),
    (('aaaa', 300, 'gpt4', ['<a>']), 'at most 259'),
    (('text', 257, '('), 'not a regular expression'),
    (('text', 257, 'gtp4'), 'did you mean .gpt4'),
    (('text', 257, 'gpt4', ['<a>', 'x<a>']), 'overlap'),
    (('text', 259, 'gpt4', ['<a>', '<a>']), 'twice|same'),
    (('text', 257, 'gpt4', [5]), 'got 5'),
    (([b'text'], 257), 'as strings, got bytes'),
    ((Path('a.txt'), 257), 'as strings, got PosixPath'),
    (([5], 257), 'got int'),
], ids=str)
def test_training_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train(*arguments)


def test_a_vocabulary_of_bytes_alone():
    tok = BPETokenizer.train('text', 256)
    assert tok.merges == [] and tok.encode('text') == list(b'text')


@pytest.mark.parametrize('arguments, message', [
    (([(b'ab', b'c')],), r"merge 0 joins b'ab' and b'c'; expected bytes or earlier"),
    (([(b'a', b'')],), "joins b'a' and b''"),
    (([(b'a', b'b'), (b'a', b'b')],), "merge 1 makes the token b'ab', which exists"),
    (([], None, None, range(255)), 'byte_ids has 255 ids; expected 256'),
    (([(b'a', b'b')], None, None, range(255), [255, 256]), 'byte_ids has 255 ids'),
    (([(b'a', b'b')], None, None, None, [300, 301]), 'merge_ids has 2 ids; expected 1'),
    (([(b'a', b'b')], None, None, None, [-1]), 'ids'),
    (([(b'a', b'b')], None, None, None, [97]), 'same id'),
    (([], '('), 'not a regular expression'),
], ids=str)
def test_vocabularies_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer(*arguments)


# Words --------------------------------------------------------------------------------------------

def test_words_by_hand():
    tok = WordTokenizer.train(['the cat, the dog.', 'the cat'], 100)
    # twice: ' cat' and 'the'; once, by code points: ' dog', ' the', ',', '.'
    assert tok.words == [' cat', 'the', ' dog', ' the', ',', '.']
    assert (tok.vocab_size, tok.eot, tok.special_tokens) == (8, 1, {'<|unk|>': 0, EOT: 1})
    assert tok.encode('the dog, a cat.') == [3, 4, 6, 0, 2, 7]
    assert tok.decode([3, 4, 6, 0, 2, 7]) == 'the dog,<|unk|> cat.'
    assert tok.encode(f'the{EOT} dog', {EOT}) == [3, 1, 4]
    assert WordTokenizer.train(['the cat, the dog.', 'the cat'], 4).words == [' cat', 'the']
    with pytest.raises(ValueError, match='<\\|unk\\|>'):
        tok.encode('the <|unk|>')


@settings(many, max_examples=300)
@given(text=texts.filter(str.strip))
def test_words_of_known_text_round_trip(text):
    text = readable(text).replace(EOT, 'x')
    same_everywhere(WordTokenizer.train(text, 1000), text)
    assert 0 not in WordTokenizer.train(text, 1000).encode_array(text)


@pytest.mark.parametrize('make, message', [
    (lambda: WordTokenizer.train('text', 2), 'vocab_size is 2; expected at least 3'),
    (lambda: WordTokenizer.train('text', '9'), 'vocab_size is 9'),
    (lambda: WordTokenizer.train('', 9), 'empty'),
    (lambda: WordTokenizer(['the', 'the']), "'the' twice"),
    (lambda: WordTokenizer(['the cat']), "got 'the cat'"),
    (lambda: WordTokenizer(['']), "got ''"),
    (lambda: WordTokenizer([3]), 'got 3'),
    (lambda: WordTokenizer(['the']).decode([3]), 'the ids 0 to 2'),
])
def test_words_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# What grows with the input ------------------------------------------------------------------------

def test_gigatoken_is_made_anew_before_it_knows_too_many_words(monkeypatch, trained):
    pytest.importorskip('gigatoken')
    monkeypatch.setattr(fast, 'FORGET_CHARS', 1000)
    tok = tokenizer.from_dict(trained['gpt2'].to_dict())
    text = 'some words, and then some more; '
    made = set()
    for _ in range(100):
        assert tok.encode_array(text).tolist() == trained['gpt2'].encode(text)
        made.add(id(tok._fast.gigatoken))
        keep = tok._fast.gigatoken  # so that no id comes back
        made.add(id(keep))
    assert len(text) * 100 > 3000 and len(made) >= 2


def test_a_stream_full_of_special_tokens_is_cut_in_linear_time():
    tok = tokenizer.BPETokenizer([], 'gpt2', {'<|user says|>': 256})
    looked_at = 0

    class Counted(str):
        def startswith(self, *arguments):
            nonlocal looked_at
            looked_at += 1
            return str.startswith(self, *arguments)

        def __getitem__(self, place):
            part = str.__getitem__(self, place)
            assert len(part) <= 20, 'the rest of the text is copied at every candidate'
            return part

    assert tok.safe_cut(Counted('<|user says|>' * 500)) == 0
    assert looked_at < 500 * 30


def test_many_special_tokens():
    names = {f'<|reserved_{i}|>': 1000 + i for i in range(2000)}
    tok = tokenizer.BPETokenizer([], 'gpt2', names)
    assert tok.encode('<|reserved_7|><|reserved_1999|>', 'all') == [1007, 2999]


@pytest.mark.parametrize('described', [
    {'merge_ids': [10**7]}, {'byte_ids': [*range(255), 2**33]},
    {'special_tokens': {'<|x|>': 10**7}}])
def test_ids_beyond_what_files_hold_are_refused(described):
    values = {'kind': 'bpe', 'pattern': None, 'special_tokens': {}, 'merges': ['a b'], **described}
    with pytest.raises(ValueError, match='9,999,999'):
        tokenizer.from_dict(values)


def test_special_token_that_is_no_text():
    with pytest.raises(ValueError, match='half a surrogate pair'):
        tokenizer.BPETokenizer([], None, {'\ud800': 256})


@pytest.mark.parametrize('ids, named', [([1.5], '1.5'), ('12', "'12'"), ([2**70], str(2**70)),
                                        ([256], '256')])
def test_what_is_no_id_is_not_decoded(ids, named):
    with pytest.raises(ValueError, match='cannot decode') as error:
        tokenizer.ByteTokenizer().decode(ids)
    assert named in str(error.value)


@pytest.mark.parametrize('text', [5, None, ['a']])
def test_what_is_no_text_is_not_encoded(text):
    with pytest.raises(ValueError, match='text or bytes'):
        tokenizer.ByteTokenizer().encode(text)


@pytest.mark.parametrize('kind', ['bpe', 'byte', 'char', 'word'])
def test_bytes_are_utf8_or_refused(kind, chat):
    tok = {'bpe': chat, 'byte': tokenizer.ByteTokenizer(), 'char': tokenizer.CharTokenizer('théй'),
           'word': WordTokenizer(['the', 'hé'])}[kind]
    for data in ('théй'.encode(), bytearray('hé'.encode())):
        assert tok.encode(data, 'none') == tok.encode(data.decode(), 'none')
    with pytest.raises(UserError, match='byte 3 of the text is 0xff, which is not UTF-8'):
        tok.encode(b'the\xff')


def test_unused_ids():
    with pytest.raises(ValueError, match='id 100261: the vocabulary does not use'):
        load_or_skip('cl100k_base').decode([5, 100261])
