"""tokenizer/sentencepiece.py against the packages sentencepiece and tokenizers. Run: pytest
tests/test_sentencepiece.py"""

import base64
import functools
import io
import json
import random
import struct
import time
import tracemalloc
from collections import Counter

import pytest
from conftest import Folder, make_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece_cases import NASTY, TRAINING, many_texts, trained_by_package, trained_here
from tokenizer_cases import CODE, many

import tokenizer
from configurator import UserError
from tokenizer import base, bytepair, formats, patterns, tokenizer_json
from tokenizer.sentencepiece import BYTE_PIECES, SentencePieceTokenizer, read_rules

sentencepiece = pytest.importorskip('sentencepiece')
model_pb2 = pytest.importorskip('sentencepiece.sentencepiece_model_pb2')
tokenizers = pytest.importorskip('tokenizers')

OPTIONS = {
    'llama': {'remove_extra_whitespaces': False, 'split_digits': True, 'allow_whitespace_only_pieces': True},
    'gemma': {'remove_extra_whitespaces': False, 'add_dummy_prefix': False, 'allow_whitespace_only_pieces': True},
    'identity': {},
    'no prefix': {'add_dummy_prefix': False},
    'over spaces': {'add_dummy_prefix': False, 'remove_extra_whitespaces': False, 'split_by_whitespace': False},
    'nmt_nfkc': {'normalization_rule_name': 'nmt_nfkc'},
    'nfkc_cf': {'normalization_rule_name': 'nfkc_cf', 'remove_extra_whitespaces': False},
    'symbols': {'user_defined_symbols': 'ing,▁▁,aba,éé,①,x', 'control_symbols': '<pad>',
                'normalization_rule_name': 'nmt_nfkc', 'remove_extra_whitespaces': False},
    'symbols over spaces': {'user_defined_symbols': 'ing,th,hin,abab', 'split_by_whitespace': False},
}


def open_both(tmp_path, content):
    """(this program's tokenizer, the package's) of a model"""
    path = tmp_path / 'tokenizer.model'
    path.write_bytes(content)
    return tokenizer.load(path), sentencepiece.SentencePieceProcessor(model_proto=content)


def same_ids(ours, theirs, texts):
    specials = set(ours.special_tokens.values())
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text, 'none') == ids, repr(text)
        if not specials.intersection(ids):
            assert ours.decode(ids) == theirs.decode(ids), repr(text)


@pytest.mark.parametrize('name', OPTIONS)
def test_reads_what_the_package_trained(name, tmp_path):
    """10,000 texts with Llama's options and with nfkc, 1,000 with others."""
    ours, theirs = open_both(tmp_path, trained_by_package(**OPTIONS[name]))
    assert ours.vocab_size == theirs.vocab_size() == 900
    assert ours.special_tokens['<unk>'] == 0 and ours.eot == theirs.eos_id() == 2
    same_ids(ours, theirs, many_texts()[:10_000 if name in ('llama', 'nmt_nfkc') else 1_000])
    copy = tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert copy.to_dict() == ours.to_dict()
    # and written again
    formats.write_model(copy.to_dict(), tmp_path / 'again.model')
    again, package = open_both(tmp_path, (tmp_path / 'again.model').read_bytes())
    assert again.to_dict() == ours.to_dict()
    same_ids(ours, package, many_texts()[:300])


def test_the_package_reads_what_was_trained_here(tmp_path):
    ours = trained_here()
    formats.write_model(ours.to_dict(), tmp_path / 'mine.model')
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'mine.model'))
    assert theirs.vocab_size() == ours.vocab_size == 900
    assert (theirs.unk_id(), theirs.bos_id(), theirs.eos_id(), theirs.pad_id()) == (0, 1, 2, -1)
    assert [theirs.id_to_piece(i) for i in range(900)] == ours.pieces
    assert theirs.is_control(ours.eot) and ours.eot == 3
    same_ids(ours, theirs, many_texts())
    assert tokenizer.load(tmp_path / 'mine.model').to_dict() == ours.to_dict()


def test_scores_that_tie(tmp_path):
    """Of two pieces with one score, the leftmost pair is joined."""
    model = model_pb2.ModelProto.FromString(trained_by_package(**OPTIONS['llama']))
    for piece in model.pieces:
        piece.score = -(int(-piece.score) // 40)
    ours, theirs = open_both(tmp_path, model.SerializeToString())
    assert len(set(ours.ranks)) < 40
    same_ids(ours, theirs, many_texts()[:2_000])
    with pytest.raises(UserError, match='several pieces of the same rank; expected --out=tokenizer.model'):
        formats.write_tokenizer_json(ours.to_dict(), tmp_path / 'tokenizer.json')


def test_training_is_the_plain_algorithm():
    """Pairs are counted anew after each join, in words that begin with a space."""
    text = 'low lower lowest  newer wider\nnew 1234 low low (lowly) ' + CODE[:3000]
    counts = Counter(patterns.split(f' {text}', patterns.SENTENCEPIECE))
    words = {word: list(word.replace(' ', '▁')) for word in counts}
    chars = Counter(''.join(word * n for word, n in counts.items()).replace(' ', '▁'))
    covered, total = 0, sum(chars.values())
    tokens = []
    for char in sorted(chars, key=lambda char: (-chars[char], char)):
        if covered < 0.9995 * total:
            tokens.append(char)
        covered += chars[char]
    alphabet = tokens[:]
    assert len(alphabet) < len(chars)  # the rarest characters are left out
    for _ in range(60):
        pairs = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:], strict=False):
                if {*pair} <= {*tokens}:
                    pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], *map(tokens.index, pair)))
        tokens.append(''.join(best))
        for parts in words.values():
            i = 0
            while i < len(parts) - 1:
                if tuple(parts[i:i + 2]) == best:
                    parts[i:i + 2] = [''.join(best)]
                i += 1
    tok = SentencePieceTokenizer.train(text, 259 + len(tokens), workers=1)
    assert tok.pieces == ['<unk>', '<s>', '</s>', *BYTE_PIECES, *tokens[len(alphabet):], *alphabet]
    assert not any(len(piece) > 1 and any(char.isdigit() or char in piece[1:] and char == '▁' and piece.strip('▁')
                                          for char in piece) for piece in tokens)
    with pytest.raises(UserError, match='256 bytes, 3 special tokens, and the [0-9]+ characters that make up 99.95%'):
        SentencePieceTokenizer.train(text, 260)
    with pytest.raises(UserError, match='vocab_size at most'):
        SentencePieceTokenizer.train('low lower', 999)
    for nothing in ('', []):
        with pytest.raises(UserError, match='the text to train on is empty'):
            SentencePieceTokenizer.train(nothing, 300)


# Hugging Face's tokenizer.json --------------------------------------------------------------------

@pytest.mark.parametrize('name', ['trained here', 'llama', 'gemma', 'identity', 'no prefix', 'over spaces'])
def test_tokenizer_json(name, tmp_path):
    ours = trained_here() if name == 'trained here' else open_both(tmp_path, trained_by_package(**OPTIONS[name]))[0]
    formats.write_hf_folder(ours.to_dict(), tmp_path / 'hf')
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'hf' / 'tokenizer.json'))
    for text in many_texts()[:2_000]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, 'all') == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert theirs.encode('a').ids == [1, *ours.encode('a')]
    assert formats.read(tmp_path / 'hf') == ours.to_dict()

    # Llama 2's file lists every way to split every piece
    file = json.loads((tmp_path / 'hf' / 'tokenizer.json').read_text(encoding='utf-8'))
    file['model']['merges'] = [f'{piece[:i]} {piece[i:]}' for piece in sorted(ours.rank_of, key=ours.rank_of.get)
                               for i in range(1, len(piece))
                               if piece[:i] in ours.rank_of and piece[i:] in ours.rank_of]
    assert len(file['model']['merges']) > sum(len(piece) > 1 for piece in ours.rank_of)
    (tmp_path / 'tokenizer.json').write_text(json.dumps(file), encoding='utf-8')
    assert formats.read(tmp_path / 'tokenizer.json') == ours.to_dict()


ADDED = {'<|user|>': {'special': True, 'rstrip': True}, '<|end|>': {'special': True}, '\n\n': {}, '▁▁': {}, '  ': {},
         'the': {'single_word': True}, '<h1>': {}, 'th': {'lstrip': True}, 'zq': {}}


@pytest.mark.parametrize('scheme', ['prepend', 'replace', 'always', 'first', 'never'])
def test_metaspace_and_added_tokens(scheme, tmp_path, monkeypatch):
    """As Mistral's, Phi-3's and Gemma's files have them."""
    monkeypatch.setattr(base, 'STREAM_CHARS', 1)
    path = tmp_path / 'tokenizer.json'
    formats.write_tokenizer_json(trained_here().to_dict(), path)
    file = json.loads(path.read_text(encoding='utf-8'))
    if scheme == 'replace':
        file['normalizer'] = tokenizer_json.TO_BLANK
    elif scheme != 'prepend':
        file['normalizer'] = None
        file['pre_tokenizer'] = {**tokenizer_json.METASPACE, 'prepend_scheme': scheme}
    rng = random.Random(0)
    for names in ([], ['\n\n', '▁▁', 'zq'], list(ADDED)):
        vocab, following = file['model']['vocab'], len(file['model']['vocab'])
        file['added_tokens'] = file['added_tokens'][:4]
        for name in names:
            i = vocab.get(name, following)
            following += name not in vocab
            file['added_tokens'].append({'id': i, 'content': name, 'single_word': False, 'lstrip': False, 'rstrip': False,
                                         'normalized': False, 'special': False, **ADDED[name]})
        path.write_text(json.dumps(file), encoding='utf-8')
        theirs, ours = tokenizers.Tokenizer.from_file(str(path)), tokenizer.load(path)
        formats.write_tokenizer_json(ours.to_dict(), tmp_path / 'again.json')
        again = tokenizers.Tokenizer.from_file(str(tmp_path / 'again.json'))
        assert formats.read(tmp_path / 'again.json') == ours.to_dict() == tokenizer.from_dict(ours.to_dict()).to_dict()
        texts = [''.join(rng.choices([*ADDED, *ADDED, *NASTY, '</s>'], k=rng.randrange(9))) for _ in range(600)]
        for text in [*texts, *many_texts()[:200]]:
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, 'all') == ids == again.encode(text, add_special_tokens=False).ids, repr(text)
            assert list(ours.encode_iterable(list(text), 'all')) == ids
            if not any(token in text for token in ours.special_tokens):
                assert ours.encode(text) == ours.encode_array(text).tolist() == ids
        if names or scheme in ('always', 'first'):
            with pytest.raises(UserError, match='neither added tokens nor Metaspace'):
                formats.write_model(ours.to_dict(), tmp_path / 'a.model')


@pytest.mark.parametrize('legacy', [True, False])
def test_what_transformers_saves_for_llama(legacy, tmp_path):
    transformers = pytest.importorskip('transformers', minversion='5')  # where the class takes a vocabulary
    formats.write_tokenizer_json(trained_here().to_dict(), tmp_path / 'tokenizer.json')
    model = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))['model']
    theirs = transformers.LlamaTokenizer(vocab=model['vocab'], merges=list(map(tuple, model['merges'])), legacy=legacy)
    theirs.save_pretrained(tmp_path / 'llama')
    ours = tokenizer.load(tmp_path / 'llama')
    assert ours.metaspace == ('always' if legacy else 'first')
    for text in many_texts()[:500]:
        assert ours.encode(text, 'all') == theirs(text, add_special_tokens=False)['input_ids']


@settings(many, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.text('ab', min_size=2, max_size=6), max_size=9, unique=True), data=st.data(),
       texts=st.lists(st.text('ab', max_size=20), min_size=3, max_size=3))
def test_any_merges(tmp_path, tokens, data, texts):
    """Also tokens that no merges make, and several merges for a token."""
    pieces = ['a', 'b', *tokens]
    pairs = [[left, right] for left in pieces for right in pieces if left + right in tokens]
    merges = data.draw(st.lists(st.sampled_from(pairs), max_size=14)) if pairs else []
    path = tmp_path / 'tokenizer.json'
    formats.write_tokenizer_json(SentencePieceTokenizer([*BYTE_PIECES, 'a', 'b', '▁']).to_dict(), path)
    file = json.loads(path.read_text(encoding='utf-8'))
    for token in tokens:
        file['model']['vocab'][token] = len(file['model']['vocab'])
    file['model']['merges'] = merges
    path.write_text(json.dumps(file), encoding='utf-8')
    theirs, ours = tokenizers.Tokenizer.from_file(str(path)), tokenizer.load(path)
    formats.write_tokenizer_json(ours.to_dict(), path)
    again = tokenizers.Tokenizer.from_file(str(path))
    for text in [*texts, *tokens, 'c a']:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids == again.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize('change, message', [
    ({'normalizer': None}, 'normalizer is null.*expected Prepend'),
    ({'normalizer': {'type': 'NFKC'}}, 'normalizer is .*NFKC'),
    ({'pre_tokenizer': {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}},
     'pre_tokenizer is .*Metaspace.*expected none'),
    ({'normalizer': None, 'pre_tokenizer': {'type': 'Metaspace', 'replacement': '_', 'split': False}},
     'normalizer is null.*or the pre_tokenizer Metaspace with split false'),
    ({'decoder': {'type': 'ByteLevel'}}, 'decoder is .*ByteLevel.*expected Replace, ByteFallback'),
    ({'added_tokens': [{'id': 0, 'content': '<unk>', 'special': True, 'normalized': True}]},
     "'<unk>' is looked for in normalized text, with ▁ before it"),
    ({'added_tokens': [{'id': 950, 'content': '<x>', 'special': True}]}, 'tokenizers gives it 900'),
    ({'merges': [['t', 'h', 'e']]}, r'merges\[0\].*is no merge'),
    ({'merges': ['▁ Q']}, r'merges.0.: ..▁., .Q.. is no merge; expected two tokens of the vocabulary'),
    ({'vocab': {'a': 0, 'b': 2}}, 'the ids are not 0 to'),
    ({'vocab': {'a': 0, 'b': 1}, 'merges': []}, '256 of the 256 bytes are no pieces'),
    ({'dropout': 0.1}, 'dropout is 0.1'),
])
def test_what_a_tokenizer_json_is_refused_for(change, message, tmp_path):
    path = tmp_path / 'tokenizer.json'
    formats.write_tokenizer_json(trained_here().to_dict(), path)
    file = json.loads(path.read_text(encoding='utf-8'))
    for key, value in change.items():
        (file['model'] if key in file['model'] else file)[key] = value
    if 'vocab' in change:
        file['added_tokens'] = []
    path.write_text(json.dumps(file), encoding='utf-8')
    with pytest.raises(UserError, match=message) as error:
        formats.read(path)
    assert 'tokenizer.json' in str(error.value)


def test_what_is_not_exported(tmp_path):
    for name, message in [('nmt_nfkc', 'normalization rules'), ('symbols', 'normalization rules'),
                          ('symbols over spaces', 'user_defined_symbols')]:
        ours, _ = open_both(tmp_path, trained_by_package(**OPTIONS[name]))
        with pytest.raises(UserError, match=f'{message}.*expected --out=tokenizer.model'):
            formats.write_tokenizer_json(ours.to_dict(), tmp_path / 'tokenizer.json')
    with pytest.raises(UserError, match="of kind 'byte'"):
        formats.write_model({'kind': 'byte'}, tmp_path / 'a.model')
    with pytest.raises(UserError, match='needs the special token <unk>'):
        formats.write_model(SentencePieceTokenizer(BYTE_PIECES).to_dict(), tmp_path / 'a.model')


# As every tokenizer -------------------------------------------------------------------------------

def variants():
    yield trained_here()
    for name in ('llama', 'gemma', 'identity', 'no prefix'):
        path_free = model_pb2.ModelProto.FromString(trained_by_package(**OPTIONS[name]))
        yield SentencePieceTokenizer(
            [piece.piece for piece in path_free.pieces], {'<unk>': 0, '<s>': 1, '</s>': 2},
            add_dummy_prefix=path_free.normalizer_spec.add_dummy_prefix,
            remove_extra_whitespaces=path_free.normalizer_spec.remove_extra_whitespaces)


NASTY_TEXT = st.lists(st.sampled_from([*NASTY, ' ', ' ', 'word', ' word', '<|user', ' says|>']), max_size=30).map(''.join)


@functools.cache
def with_special(special):
    """The variants, with one more special token."""
    return [SentencePieceTokenizer([*(piece if piece != special else '<gone>' for piece in tok.pieces), special],
                                   {**tok.special_tokens, special: len(tok.pieces)},
                                   add_dummy_prefix=tok.add_dummy_prefix,
                                   remove_extra_whitespaces=tok.remove_extra_whitespaces)
            for tok in variants()]


@settings(many, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=NASTY_TEXT, special=st.sampled_from(['<|a b|>', 'ab', ' word', '<|user says|>']))
def test_streams_give_the_same_ids(monkeypatch, text, special):
    monkeypatch.setattr(base, 'STREAM_CHARS', 1)
    for tok in with_special(special):
        for allowed in ('all', 'none'):
            ids = tok.encode(text, allowed)
            assert list(tok.encode_iterable(list(text), allowed)) == ids
        assert tok.encode_array(text).tolist() == ids == tok.encode_batch([text])[0].tolist()


def test_streams_are_cut():
    tok, block = trained_here(), 'International representatives characterize characteristics.\n' * 400
    tracemalloc.start()
    count = sum(1 for _ in tok.encode_iterable(block for _ in range(200)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(tok.encode(block * 200)) and peak < 10_000_000


def test_bytes_of_parts_add_up():
    tok = trained_here()
    for text in many_texts()[:500]:
        ids = tok.encode(text, 'none')
        assert b''.join(tok.decode_bytes([i]) for i in ids) == tok.decode_bytes(ids)
        assert tok.decode_bytes(ids).decode().removeprefix(' ') == tok.decode(ids) == text.replace('▁', ' ')
    half = tok.encode('€', 'none')[:-1]  # <0xE2> <0x82>
    assert tok.decode_bytes(half) == b' \xe2\x82' and tok.decode(half) == '\ufffd'
    assert tok.decode([*tok.encode('a'), tok.eot]) == 'a<|endoftext|>'
    with pytest.raises(UserError, match='cannot decode token id 900'):
        tok.decode([900])
    with pytest.raises(UserError, match='the text has the special token'):
        tok.encode('a<|endoftext|>')


def test_a_constraint_writes_pieces_not_bytes():
    """A and <0x41> are the same text; a model has learnt the first."""
    pytest.importorskip('llguidance')
    from flatgpt.constrain import Vocabulary
    tok = trained_here()
    vocabulary = Vocabulary(tok)
    assert vocabulary.has_bytes and vocabulary.id_of[b'a'] == tok.pieces.index('a')
    ids = vocabulary.write('ein €'.encode())
    assert [tok.pieces[i] for i in ids][-4:] == ['▁', '<0xE2>', '<0x82>', '<0xAC>']
    assert vocabulary.tokens[tok.pieces.index('<0x61>')] == b''


def test_pieces_met_before_are_forgotten_in_time(monkeypatch):
    monkeypatch.setattr(bytepair, 'KNOWN_PIECES', 50)
    tok = tokenizer.from_dict(trained_here().to_dict())
    for text in TRAINING:
        assert tok.encode_ordinary(text) == trained_here().encode_ordinary(text)
        assert len(tok._known) <= 50


def test_prepare_train_sample_and_export(tmp_path):
    """From a .model to a run, its samples, and a folder for Hugging Face."""
    (tmp_path / 'text.txt').write_text(make_text(20_000), encoding='utf-8')
    folder = Folder(tmp_path)
    folder.start('tokenizer', 'train', kind='sentencepiece', input='text.txt', vocab_size=325, out='my.model').wait().ok()
    tok = tokenizer.load(tmp_path / 'my.model')
    said = folder.start('data/text/prepare.py', input='text.txt', tokenizer='my.model',
                        out_dir=tmp_path / 'data' / 'tiny').wait().ok().out
    assert '325 ids' in said
    meta = json.loads((tmp_path / 'data' / 'tiny' / 'meta.json').read_text(encoding='utf-8'))
    assert meta['tokenizer'] == tok.to_dict() and meta['tokenizer']['kind'] == 'sentencepiece'
    folder.train(max_iters=2, eval_interval=2).ok()
    assert folder.checkpoint()['tokenizer'] == tok.to_dict()
    assert 'the cat' in folder.sample(start='the cat', max_new_tokens=20, num_samples=1).ok().out
    out = folder.start('tokenizer', 'export', tokenizer='my.model', out='hf').wait().ok().out
    assert 'AutoTokenizer' in out
    assert tokenizer.load(tmp_path / 'hf').to_dict() == tok.to_dict()
    folder.start('tokenizer', 'export', tokenizer='my.model', out='a.tiktoken').refused('joins of bytes only')
    folder.start('tokenizer', 'train', kind='bpe', input='text.txt', vocab_size=300,
                 out='b.model').refused('--kind=sentencepiece')


# Refusals -----------------------------------------------------------------------------------------

def changed_model(change):
    model = model_pb2.ModelProto.FromString(trained_by_package(**OPTIONS['llama']))
    change(model)
    return model.SerializeToString()


def set_piece(i, **fields):
    def change(model):
        for key, value in fields.items():
            setattr(model.pieces[i], key, value)
    return change


@pytest.mark.parametrize('change, message', [
    (lambda model: setattr(model.trainer_spec, 'byte_fallback', False), 'has byte_fallback=false'),
    (lambda model: setattr(model.trainer_spec, 'model_type', 4), 'of kind char; expected BPE'),
    (lambda model: setattr(model.trainer_spec, 'treat_whitespace_as_suffix', True), 'treat_whitespace_as_suffix=true'),
    (lambda model: setattr(model.normalizer_spec, 'escape_whitespaces', False), 'escape_whitespaces=false'),
    (lambda model: setattr(model.denormalizer_spec, 'precompiled_charsmap', b'x'), 'denormalization rules'),
    (lambda model: setattr(model.normalizer_spec, 'precompiled_charsmap', b'xxxx'), 'precompiled_charsmap.*damaged'),
    (set_piece(0, type=3), 'has 0 unknown pieces'), (set_piece(5, type=2), 'has 2 unknown pieces'),
    (set_piece(5, piece='x'), "piece 5, 'x', has the type 6"), (set_piece(5, type=1), 'has the type 1'),
    (set_piece(300, type=5), 'has the type 5'), (set_piece(300, score=float('nan')), 'the score nan'),
    (set_piece(300, piece=''), "the piece '' is empty"), (set_piece(300, piece='th'), 'there twice'),
    (set_piece(300, piece='a b', type=4), "user_defined_symbols has 'a b'"),
    (lambda model: model.pieces.pop(7), r'1 of the 256 bytes are no pieces \(such as <0x04>\)'),
    (lambda model: model.pieces.__delitem__(slice(None)), 'expected pieces, found none'),
])
def test_what_a_model_is_refused_for(change, message, tmp_path):
    if message == 'there twice':
        model = model_pb2.ModelProto.FromString(trained_by_package(**OPTIONS['llama']))
        other = model.pieces[301].piece
        message, change = 'there twice', set_piece(300, piece=other)
    (tmp_path / 'tokenizer.model').write_bytes(changed_model(change))
    with pytest.raises(UserError, match=message) as error:
        tokenizer.load(tmp_path / 'tokenizer.model')
    assert 'tokenizer.model' in str(error.value)


@pytest.mark.parametrize('change, message', [
    ({'pieces': [*BYTE_PIECES, 5]}, 'the piece 5 is empty, no text'), ({'pieces': [*BYTE_PIECES, ['a']]}, 'no text'),
    ({'pieces': [*BYTE_PIECES, '\ud800']}, 'half a surrogate pair'), ({'pieces': 'abc'}, 'pieces'),
    ({'special_tokens': {'<x>': 0}}, "special or added token '<x>' has the id 0"),
    ({'special_tokens': {'<s>': [1]}}, 'special tokens are'), ({'bos_token': ['<s>']}, 'bos_token is'),
    ({'bos_token': '<q>'}, "bos_token is '<q>', which is no special token"),
    ({'ranks': [1]}, 'ranks has 1 entries; expected 900'), ({'ranks': [0.5] * 900}, 'whole numbers'),
    ({'user_defined_symbols': [['a']]}, 'user_defined_symbols has'), ({'metaspace': 'last'}, "metaspace is 'last'"),
    ({'metaspace': 'first', 'add_dummy_prefix': False}, 'with add_dummy_prefix, or None'),
    ({'added_tokens': {'zzz': 3}}, "added token 'zzz' has the id 3"), ({'token_rules': {'a': [['x']]}}, 'rules of the'),
    ({'precompiled_charsmap': 'é'}, 'precompiled_charsmap'), ({'precompiled_charsmap': 7}, 'precompiled_charsmap'),
    ({'add_dummy_prefix': 'yes'}, 'add_dummy_prefix'), ({'remove_extra_whitespaces': 1}, 'remove_extra_whitespaces'),
], ids=str)
def test_descriptions_that_are_refused(change, message):
    """From a meta.json or a checkpoint."""
    with pytest.raises(UserError, match=message):
        tokenizer.from_dict({**trained_here().to_dict(), **change})


def test_unigram_is_refused(tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(trained_by_package(model_type='unigram'))
    with pytest.raises(UserError, match='SentencePiece model of kind unigram; expected BPE'):
        tokenizer.load(tmp_path / 'tokenizer.model')


def test_damaged_models_are_refused_or_read(tmp_path):
    """Cut anywhere or with any bit flipped: a tokenizer or an error, and the memory of the file."""
    rng, path = random.Random(0), tmp_path / 'tokenizer.model'
    whole = trained_by_package(**OPTIONS['llama'])
    cases = [whole[:length] for length in range(0, len(whole), 397)]
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        cases.append(bytes(damaged))
    refused = 0
    for content in cases:
        path.write_bytes(content)
        try:
            tok = tokenizer.load(path)
        except UserError as error:
            assert 'tokenizer.model' in str(error)
            refused += 1
        else:
            assert all(0 <= i < tok.vocab_size for i in tok.encode('a text é'))
    assert refused > 60
    path.write_bytes(b'\n\x02\x08\x01' * (1 << 22) + b'\n')
    with pytest.raises(UserError, match='has 16,777,217 bytes; expected .* of at most 16,777,216'):
        tokenizer.load(path)


def charsmap(units, texts=b'x\0'):
    content = struct.pack(f'<I{len(units)}I', 4 * len(units), *units) + texts
    return base64.b64encode(content).decode()


def test_hostile_rules():
    """Tries that lead in circles or to exponentially many places, and replacements without end."""
    started = time.perf_counter()
    circle = [(place ^ 1) << 10 | 1 for place in range(256)]
    shared = [(256 * (place // 256 + 1)) << 10 | place & 255 for place in range(2560)]
    for damaged in ('!', charsmap([]), charsmap(circle), charsmap(shared), charsmap([1 << 10, 0x101, 0], b'x'),
                    base64.b64encode(b'\xff\xff\xff\xff').decode(), base64.b64encode(bytes(1 << 23)).decode()):
        try:
            assert len(read_rules(damaged)) < 1 << 20
        except UserError as error:
            assert 'precompiled_charsmap' in str(error)
    assert time.perf_counter() - started < 10
    with pytest.raises(UserError, match='precompiled_charsmap'):
        read_rules(charsmap(circle))


def test_no_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'sentencepiece.sentencepiece_model_pb2', None)
    with pytest.raises(UserError, match='pip install sentencepiece protobuf'):
        formats.write_model(trained_here().to_dict(), tmp_path / 'a.model')
    trained_here().save(tmp_path / 'own.json')  # which needs neither
    assert tokenizer.load(tmp_path / 'own.json').to_dict() == trained_here().to_dict()


def test_long_words_take_little_time():
    tok = SentencePieceTokenizer([*BYTE_PIECES, 'a', 'aa', 'aaaa', 'aaaaaaaa'], add_dummy_prefix=False)
    started = time.perf_counter()
    assert tok.encode('a' * 80_000) == [259] * 10_000
    assert time.perf_counter() - started < 10
    assert list(tok.encode_iterable(io.StringIO('ab'))) == tok.encode('ab')
