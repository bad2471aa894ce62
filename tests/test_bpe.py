"""bpe.py against the obvious algorithms, written out here, and tiktoken, gigatoken, tokenizers.

Run: pytest tests/test_bpe.py
"""

import itertools
import random
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from conftest import load_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer import bpe as bpe_module
from tokenizer import fast
from tokenizer import patterns as bpe

CODE = ''.join(Path(path).read_text(encoding='utf-8') for path in (__file__, bpe_module.__file__))
PROSE = """Ein Zaun, l'été, can't, WE'LL: 12 345 Äpfel — 日本語の文, 한국어 문장, наше слово;
    aaaa aaaaaaa bbbb 🙂🙂 (1, 2)\r\n\tname_of_it = 'ſ' # done!!!   \n\n
the cat, the hat, the rat; to be or not to be """
BYTES = {bytes([byte]): byte for byte in range(256)}  # a vocabulary without merges
# all of Unicode but half surrogates
EVERY_CHARACTER = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


@pytest.fixture(scope='module', params=['gpt2', 'cl100k_base'])
def published(request):
    """(tiktoken's encoding, the merges recovered from it, {place: id})"""
    load_or_skip(request.param)
    encoding = tiktoken.get_encoding(request.param)
    pairs = bpe_module.recover_merges(encoding._mergeable_ranks)
    place = {token: i for i, token in enumerate([*BYTES, *(left + right for left, right in pairs)])}
    merges = bpe_module.Merges([(place[left], place[right]) for left, right in pairs])
    return encoding, merges, np.array([encoding._mergeable_ranks[token] for token in place])


def tiktoken_of(pattern, tokens=BYTES):
    """tiktoken's engine with a pattern and tokens of one's own."""
    return tiktoken.Encoding('test', pat_str=pattern, special_tokens={},
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})


def learn_plainly(counts, n_merges):
    """Byte pair encoding as one would explain it: count every pair anew for every merge."""
    pieces = [(list(piece.encode()), count) for piece, count in counts.items()]
    merges = []
    while len(merges) < n_merges:
        pair_count = Counter()
        for ids, count in pieces:
            for pair in itertools.pairwise(ids):
                pair_count[pair] += count
        if not pair_count:
            break
        merges.append(min(pair_count, key=lambda pair: (-pair_count[pair], pair)))
        pieces = [(replace(ids, merges[-1], 255 + len(merges)), count) for ids, count in pieces]
    return merges


def replace(ids, pair, new):
    """ids with `new` for every pair, from left to right."""
    done, i = [], 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            done.append(new)
            i += 2
        else:
            done.append(ids[i])
            i += 1
    return done


def join_plainly(piece, pairs):
    """All merges one after the other, in the order they were learnt."""
    ids = list(piece)
    for i, pair in enumerate(pairs):
        ids = replace(ids, pair, 256 + i)
    return ids


# --------------------------------------------------------------------------------------------------
# --------------------
# learning

@pytest.mark.parametrize('counts', [
    {'a' * n: 1 for n in (1, 2, 3, 4, 5, 7, 8, 16, 31)},
    {'aaa': 3, 'aa': 2, 'baaab': 5, 'aabaab': 1},
    {'abab': 1, 'baba': 1, 'cdcd': 1, 'dcdc': 1},  # everything tied
    {'ab': 10**12, 'abc': 10**12, 'cb': 10**12 + 1},  # more than 32 bits
    {'héé': 2, 'éh': 3, '🙂🙂': 2, '🙃': 4, '日本': 1},
    {'': 3, 'a': 9, '\x00\x00': 1, '\x7f\x00': 1},
    {},
], ids=str)
def test_learn_by_hand_made_counts(counts):
    assert bpe_module.learn(counts, 60) == learn_plainly(counts, 60)


@pytest.mark.parametrize('seed', range(40))
def test_learn_is_the_plain_algorithm(seed):
    rng = random.Random(seed)
    letters = ['a', 'ab', 'abc', 'aé🙂', string.ascii_letters][seed % 5]
    counts = {''.join(rng.choices(letters, k=rng.randint(0, 30))): rng.randint(1, 5)
              for _ in range(rng.randint(1, 60))}
    assert bpe_module.learn(counts, 120) == learn_plainly(counts, 120)


@settings(max_examples=200, database=None, derandomize=True)
@given(st.dictionaries(st.text('ab\u00e9\u00ea', max_size=12), st.integers(1, 4), max_size=12),
       st.integers(0, 40))
def test_learn_is_the_plain_algorithm_on_any_counts(counts, n_merges):
    assert bpe_module.learn(counts, n_merges) == learn_plainly(counts, n_merges)


@pytest.mark.parametrize('pattern', [None, *bpe.PATTERNS])
def test_learn_the_example_of_wikipedia(pattern):
    """aaabdaaabac: aa, then a tie between aaa and ab, here (a, b) as 'a' is the smaller id than
    aa."""
    pairs = bpe_module.learn(bpe_module.count_pieces(['aaabdaaabac'], bpe.PATTERNS.get(pattern)), 3)
    tokens = bpe_module.token_bytes(pairs)
    assert tokens[256:] == [b'aa', b'ab', b'aaab']
    assert bpe_module.Merges(pairs).join(b'aaabdaaabac') == [258, 100, 258, 97, 99]


def test_learn_ends_when_all_pieces_are_one_id():
    assert bpe_module.learn({'abc': 2, 'd': 9}, 1000) == [(97, 98), (256, 99)]


def test_learn_depends_on_nothing_but_the_counts():
    counts = bpe_module.count_pieces([CODE, PROSE], bpe.PATTERNS['gpt4'])
    pieces = list(counts)
    random.Random(0).shuffle(pieces)
    assert (bpe_module.learn({piece: counts[piece] for piece in pieces}, 500)
            == bpe_module.learn(counts, 500))


def standard_library(n_bytes):
    """Modules of the running Python, so many bytes of them, and some text in other scripts."""
    texts, size = [PROSE], 0
    for path in sorted(Path(string.__file__).parent.glob('*.py')):
        texts.append(path.read_text(encoding='utf-8'))
        size += len(texts[-1])
        if size >= n_bytes:
            break
    return texts


def test_learn_is_gigatoken_merge_for_merge():
    pytest.importorskip('gigatoken')
    texts = [*standard_library(400_000), 'a<|endoftext|>b']
    specials = ['<|endoftext|>']
    pairs = bpe_module.learn(bpe_module.count_pieces(texts, bpe.PATTERNS['gpt2'], specials), 1500)
    tokens = bpe_module.token_bytes(pairs)
    ours = [(tokens[left], tokens[right]) for left, right in pairs]
    assert len(ours) == 1500
    assert fast.learn_with_gigatoken(texts, 1500, specials) == ours


def test_learn_with_gigatoken_where_it_would_learn_otherwise():
    pytest.importorskip('gigatoken')
    letters = 'abcdefghij'
    words = ' '.join(''.join(word) for word in itertools.product(letters, repeat=3))
    for text in (words + 'a\ua7ce b\ua7cec ' * 3000,  # a letter since Unicode 17, before it none
                 # two merges, and then nothing is left to join
                 'aaaa'):
        pairs = bpe_module.learn(bpe_module.count_pieces([text], bpe.PATTERNS['gpt2']), 50)
        tokens = bpe_module.token_bytes(pairs)
        assert (fast.learn_with_gigatoken([text], 50)
                == [(tokens[left], tokens[right]) for left, right in pairs])


def test_learn_is_tokenizers_merge_for_merge():
    """With an alphabet in the order of the bytes tokenizers breaks ties as we do, by id."""
    tokenizers = pytest.importorskip('tokenizers')
    text = ' '.join(regex.findall('[!-~]+', ' '.join(standard_library(200_000))))
    alphabet = [chr(code) for code in range(ord('!'), ord('~') + 1)]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    theirs.train_from_iterator([text], tokenizers.trainers.BpeTrainer(
        vocab_size=len(alphabet) + 1000, initial_alphabet=alphabet, show_progress=False))
    ids = theirs.get_vocab()
    made = sorted((token for token in ids if len(token) > 1), key=ids.get)

    pairs = bpe_module.learn(Counter(text.split()), 1000)
    assert [token.decode() for token in bpe_module.token_bytes(pairs)[256:]] == made


def test_counting_is_the_same_in_processes(monkeypatch):
    texts = [*standard_library(100_000), '', 'a<|x|>b', '<|x|>'] * 2
    patterns = {'gpt4': bpe.PATTERNS['gpt4'], 'none': None, 'words': r'\w+'}
    for name, pattern in patterns.items():
        alone = bpe_module.count_pieces(texts, pattern, ['<|x|>'], workers=1)
        plain = Counter(piece for text in texts for part in text.split('<|x|>')
                        for piece in bpe.split(part, pattern))
        assert alone == plain
        with monkeypatch.context() as patch:
            patch.setattr(bpe_module, 'BATCH_CHARS', 5000)
            assert bpe_module.count_pieces(reversed(texts), pattern, ['<|x|>'],
                                           workers=2) == alone, name
            assert bpe_module.count_pieces(iter(texts), pattern, ['<|x|>'],
                                           workers=1) == alone, name


@pytest.mark.parametrize('pattern', [None, *bpe.PATTERNS.values()], ids=str)
def test_no_merge_crosses_documents_or_special_tokens(pattern):
    """What stands on both sides of an end is by far the most frequent pair, if it were counted."""
    documents = ['xa', 'bx'] * 50 + ['cd']
    assert (bpe_module.learn(bpe_module.count_pieces(documents, pattern), 9)
            == [(97 + 1, 120), (120, 97), (99, 100)])
    special = ['xa<|end|>bx<|end|>' * 50 + 'cd']
    assert (bpe_module.learn(bpe_module.count_pieces(special, pattern, ['<|end|>']), 9)
            == [(98, 120), (120, 97), (99, 100)])


def test_no_merge_of_gigatoken_crosses_documents_or_special_tokens():
    pytest.importorskip('gigatoken')
    merges = [(b'b', b'x'), (b'x', b'a'), (b'q', b'z')]
    # more pieces than merges
    others = [f'q{a}{b}' for a, b in itertools.product(string.ascii_letters, repeat=2)]
    assert fast.learn_with_gigatoken(['xa', 'bx'] * 5000 + ['qz'] * 4000 + others, 3) == merges
    assert (fast.learn_with_gigatoken(['xa<|end|>bx<|end|>' * 5000, *['qz'] * 4000, *others], 3,
                                      ['<|end|>'])
            == merges)


@pytest.mark.parametrize('seed', range(20))
def test_learning_with_gigatoken_ends_where_learning_ends(seed):
    """gigatoken alone goes on with pairs that occur nowhere."""
    pytest.importorskip('gigatoken')
    rng = random.Random(seed)
    letters = ['a', 'ab ', 'abcd ef\n', 'aé🙂 '][seed % 4]
    texts = [''.join(rng.choices(letters, k=rng.randint(0, 300))) for _ in range(3)]
    pairs = bpe_module.learn(bpe_module.count_pieces(texts, bpe.PATTERNS['gpt2']), 1000)
    tokens = bpe_module.token_bytes(pairs)
    ours = [(tokens[left], tokens[right]) for left, right in pairs]
    for n_merges in (0, 1, len(pairs) // 2, len(pairs) - 1, len(pairs), len(pairs) + 1, 1000):
        assert fast.learn_with_gigatoken(texts, n_merges) == ours[:n_merges]


def test_gigatoken_says_nothing_on_the_terminal(capfd):
    pytest.importorskip('gigatoken')
    fast.learn_with_gigatoken([CODE], 3)
    print('still heard')
    assert capfd.readouterr() == ('still heard\n', '')


def test_batches_keep_all_texts_in_order():
    texts = ['aaa', '', 'b', 'cccccc', 'd']
    assert list(bpe.batches(texts, 4)) == [['aaa', '', 'b'], ['cccccc'], ['d']]
    assert list(bpe.batches([], 4)) == []


# --------------------------------------------------------------------------------------------------
# --------------------
# joining

def merges_of(*texts, n=60):
    return bpe_module.Merges(bpe_module.learn(bpe_module.count_pieces(texts, None), n))


LEARNT = [merges_of('a' * 50), merges_of('abaababaab' * 5 + 'bbb'),
          merges_of('aabb', 'abab', 'baab', 'aaaabbbb' * 3),
          merges_of(PROSE, n=200), bpe_module.Merges([])]
pieces_of_bytes = st.one_of(st.binary(max_size=60), st.text('ab', max_size=120).map(str.encode),
                            st.lists(st.sampled_from(['a' * 7, 'b', 'ab', 'a' * 16, ' ']),
                                     max_size=20)
                            .map(''.join).map(str.encode),
                            st.text(PROSE, max_size=60).map(str.encode))


@settings(max_examples=400, database=None, derandomize=True)
@given(pieces_of_bytes)
def test_join_is_all_merges_in_their_order(piece):
    for merges in LEARNT:
        expected = join_plainly(piece, merges.pairs)
        assert merges.join(piece) == expected
        if piece:
            assert merges.join_long(piece) == expected


@pytest.mark.parametrize('length', [bpe_module.LONG, bpe_module.LONG + 1, 3000])
def test_join_of_long_pieces(length):
    rng = random.Random(length)
    for merges in LEARNT:
        for letters in ('a', 'ab', 'aaaaab', PROSE):
            piece = ''.join(rng.choices(letters, k=length)).encode()
            assert merges.join(piece) == join_plainly(piece, merges.pairs)


def test_join_takes_the_long_way_beyond_a_length(monkeypatch):
    monkeypatch.setattr(bpe_module.Merges, 'join_long', lambda self, piece: [len(piece)])
    assert bpe_module.Merges([]).join(b'x' * bpe_module.LONG) == [120] * bpe_module.LONG
    assert bpe_module.Merges([]).join(b'x' * (bpe_module.LONG + 1)) == [bpe_module.LONG + 1]


def test_every_token_is_what_its_bytes_encode_to(published):
    encoding, merges, ids = published
    tokens = bpe_module.token_bytes(merges.pairs)
    assert len(tokens) == len(encoding._mergeable_ranks)
    assert ({token: i for token, i in zip(tokens, ids.tolist(), strict=True)}
            == encoding._mergeable_ranks)
    assert [merges.join(token) for token in tokens] == [[i] for i in range(len(tokens))]


def test_long_pieces_as_tiktoken_joins_them(published):
    """Quadratic time would take hours."""
    encoding, merges, ids = published
    for piece in (b'a' * 300_000, b' ' * 299_999, b'\xff' * 200_001,
                  random.Random(0).randbytes(300_000),
                  ''.join(random.Random(1).choices(string.ascii_lowercase, k=200_000)).encode(),
                  (CODE.replace(' ', '').replace('\n', '') * 2).encode()):
        expected = encoding._core_bpe.encode_single_piece(piece)
        assert ids[merges.join(piece)].tolist() == expected


def test_recover_merges_of_what_was_learnt():
    # the last has tokens of more than bpe.LONG bytes
    for merges in (*LEARNT, merges_of('a' * 5000)):
        tokens = bpe_module.token_bytes(merges.pairs)
        recovered = bpe_module.recover_merges({token: rank for rank, token in enumerate(tokens)})
        assert recovered == [(tokens[left], tokens[right]) for left, right in merges.pairs]


def test_recover_merges_leaves_out_tokens_that_no_merge_makes():
    assert bpe_module.recover_merges({**BYTES, b'abc': 256}) == []
    assert (bpe_module.recover_merges({**BYTES, b'ab': 256, b'abcd': 257, b'abb': 258})
            == [(b'a', b'b'), (b'ab', b'b')])


def test_printable_is_the_alphabet_of_gpt2():
    assert bpe.printable(b' the\n\x00\xff\xad') == 'ĠtheĊĀÿŃ'
    assert bpe.from_printable('ĠtheĊĀÿŃ') == b' the\n\x00\xff\xad'
    assert sorted(bpe.CHAR_TO_BYTE.values()) == list(range(256))
    assert not any(char.isspace() for char in bpe.CHAR_TO_BYTE)
    with pytest.raises(KeyError):
        bpe.from_printable('日')


# --------------------------------------------------------------------------------------------------
# --------------------
# pieces

texts = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(
    ['\r\n', '  ', *" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u3000'’sſStTreEvVLmMdDK09٣½²aAéÉßǅʰª",
     *'Жжʕʔ中각ि́🙂_-/.!<|>\ua7ce\U0001fac8']), max_size=80).map(''.join))


@settings(max_examples=600, database=None, derandomize=True)
@given(texts)
def test_pieces_are_the_text_cut(text):
    for pattern in (*bpe.PATTERNS.values(), None, r'\w+', r'(a|b)+|\d(?=\d)', r'x*',
                    r'(?s)(?<=.).|\b', '', r'\S\K\s'):
        pieces = bpe.split(text, pattern)
        assert ''.join(pieces) == text and '' not in pieces


@pytest.mark.parametrize('pattern, pieces', [
    (None, ['hello all, 12']),
    (r'(l)+', ['he', 'll', 'o a', 'll', ', 12']),  # a group, and gaps between the matches
    (r'(\w)(\w)?', ['he', 'll', 'o', ' ', 'al', 'l', ', ', '12']),
    (r'x', ['hello all, 12']),
    (r'(?=l)', ['he', 'l', 'lo a', 'l', 'l, 12']),  # matches of nothing cut too
    (r'\w+|\W+', ['hello', ' ', 'all', ', ', '12']),
    (bpe.PATTERNS['gpt2'], ['hello', ' all', ',', ' 12']),
])
def test_split_by_patterns_of_ones_own(pattern, pieces):
    assert bpe.split('hello all, 12', pattern) == pieces
    assert bpe.split('', pattern) == []


def test_split_by_a_pattern_whose_groups_are_as_long_as_the_text():
    assert bpe.split('abcd', r'(\w)(\w)') == ['ab', 'cd']


def test_split_as_published():
    """The patterns' differences, in an example."""
    text = "I'LL pay $12345\n\n  ToDAY  \n"
    assert bpe.split(text, bpe.PATTERNS['gpt2']) == [
        'I', "'", 'LL', ' pay', ' $', '12345', '\n\n ', ' ToDAY', '  \n']
    assert bpe.split(text, bpe.PATTERNS['gpt4']) == [
        'I', "'LL", ' pay', ' $', '123', '45', '\n\n', ' ', ' ToDAY', '  \n']
    assert bpe.split(text, bpe.PATTERNS['o200k']) == [
        "I'LL", ' pay', ' $', '123', '45', '\n\n', ' ', ' To', 'DAY', '  \n']


@pytest.mark.parametrize('pattern', ['(', '[a', '*', r'(?P<x', r'(?r)\w+', 5])
def test_bad_patterns_are_named(pattern):
    with pytest.raises(ValueError, match='split pattern') as error:
        bpe.split('text', pattern)
    assert repr(pattern) in str(error.value) and 'gpt2, gpt4, o200k' in str(error.value)


DRIFT = ('tiktoken and the package regex disagree about these characters, as one of them is at a '
         'newer Unicode: update patterns.SINCE_UNICODE_16')


@pytest.mark.parametrize('kind', [r'\p{Lu}', r'\p{Ll}', r'\p{Lt}', r'\p{Lm}', r'\p{Lo}', r'\p{M}',
                                  r'\p{N}', r'\s',
                                  r'(?i:[sdmtlvre])'])
def test_all_of_unicode_is_of_the_same_kinds_as_in_tiktoken(kind):
    """tiktoken leaves out what its pattern does not match, so it says itself which characters are
    of a kind."""
    theirs = bytes(tiktoken_of(kind).encode_ordinary(EVERY_CHARACTER)).decode()
    # what lies between two matches begins with a zero
    pieces = bpe.split('\0'.join(EVERY_CHARACTER), kind)
    ours = ''.join(piece for piece in pieces if piece[0] != '\0')
    different = [f'U+{ord(char):04X}' for char in sorted(set(ours) ^ set(theirs))]
    assert ours == theirs, f'{DRIFT}: {different[:20]}'


# A vocabulary in which each of these characters joins with whatever byte it meets in the same
# piece: so the ids tell
# where the pieces end.
BORDERS = "'(Wx1 S\n"
PAIRS = sorted({pair for byte in range(256) for char in BORDERS.encode()
                for pair in ((byte, char), (char, byte))})
IN_CONTEXT = [f"'{char}(W x{char}1 {char}Sa {char}S\n" for char in EVERY_CHARACTER
              if ord(char) < 0x3400 or 0xA000 <= ord(char) < 0xAC00 or 0xFB00 <= ord(char) < 0x12000
              # of Han, Hangul and the like, some
              or 0x1CC00 <= ord(char) < 0x20000 or ord(char) % 307 == 0]


@pytest.mark.parametrize('name', bpe.PATTERNS)
def test_pieces_end_where_tiktoken_ends_them(name):
    merges, pattern = bpe_module.Merges(PAIRS), bpe.PATTERNS[name]
    text = ''.join(IN_CONTEXT)
    ours = [i for piece in bpe.split(text, pattern) for i in merges.join(piece.encode())]
    theirs = tiktoken_of(pattern, bpe_module.token_bytes(PAIRS)).encode_ordinary(text)
    assert ours == theirs, f'{DRIFT} (pattern {name})'


@pytest.mark.parametrize('name', fast.GIGATOKENS)
def test_pieces_end_where_gigatoken_ends_them(name):
    pytest.importorskip('gigatoken')
    tokens, pattern = bpe_module.token_bytes(PAIRS), bpe.PATTERNS[name]
    # what gigatoken is given
    text = ''.join(lines for lines in IN_CONTEXT if not bpe.has_newer(lines))
    theirs = fast.FastEncoder(tokens, pattern, None).gigatoken.encode(text)
    assert theirs.tolist() == tiktoken_of(pattern,
                                          tokens).encode_ordinary(text), DRIFT.replace('regex',
                                                                                       'gigatoken')
