"""
Read and write SentencePiece's tokenizer.model.

    read_model(path)           the description of a model of kind BPE (see sentencepiece.py)
    write_model(values, path)

A file is read exactly or refused by name. It is a protocol buffer: the packages sentencepiece and
protobuf hold its schema.
"""

import base64
import math

import numpy as np

from configurator import UserError
from tokenizer.base import write_file
from tokenizer.sentencepiece import BYTE_PIECES, SentencePieceTokenizer
from tokenizer.vocabulary import read_bytes

LARGEST_MODEL = 1 << 24  # bytes; a message takes 60 times its size in memory. Gemma 3's has 4.7 MB
KINDS = {1: 'unigram', 2: 'BPE', 3: 'word', 4: 'char'}  # of TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type


def model_class():
    """Return the class of SentencePiece's files. Raises UserError without packages."""
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError:
        raise UserError("SentencePiece's files need the packages sentencepiece and protobuf: "
                        'pip install sentencepiece protobuf') from None
    return ModelProto


def is_model(path, content: bytes) -> bool:
    """Return whether a file is, or is meant to be, SentencePiece's."""
    return str(path).endswith('.model') or content[:1] == b'\n' and b'<unk>' in content[:100]


def read_model(path) -> dict:
    """Read a tokenizer.model; return its description. Raises UserError."""
    content, model = read_bytes(path), model_class()()
    if len(content) > LARGEST_MODEL:
        raise UserError(f'{path} has {len(content):,} bytes; expected a SentencePiece model of at '
                        f'most {LARGEST_MODEL:,}')
    try:
        model.ParseFromString(content)
    except Exception as error:  # google.protobuf.message.DecodeError, not imported for its name
        raise UserError(f'{path} is damaged, or no SentencePiece model ({error}): fetch it '
                        f'again') from None
    if not model.pieces:
        raise UserError(f'{path} is damaged, or no SentencePiece model: expected pieces, found '
                        f'none. Fetch it again')
    check_model(path, model)
    values = {'kind': 'sentencepiece', 'special_tokens': {},
              'add_dummy_prefix': model.normalizer_spec.add_dummy_prefix,
              'remove_extra_whitespaces': model.normalizer_spec.remove_extra_whitespaces,
              'user_defined_symbols': []}
    scores = []
    for i, piece in enumerate(model.pieces):
        if piece.type in (UNKNOWN, CONTROL):
            values['special_tokens'][piece.piece] = i
        elif piece.type == USER_DEFINED:
            values['user_defined_symbols'].append(piece.piece)
        is_byte = piece.piece in BYTE_PIECES
        if is_byte != (piece.type == BYTE) or piece.type == UNUSED or not math.isfinite(
                piece.score):
            raise UserError(f'{path}: piece {i}, {piece.piece!r}, has the type {piece.type} and '
                            f'the score {piece.score}, which this program cannot do; expected a '
                            f'finite score, and type 6 for the bytes <0x00> to <0xFF> alone')
        scores.append(-piece.score if piece.type in (NORMAL, USER_DEFINED) else math.inf)
    ranks = np.unique(scores, return_inverse=True)[1].tolist()
    # the usual case: each piece has a lower score than the one before
    joined = [rank for rank, score in zip(ranks, scores, strict=True) if score < math.inf]
    values['ranks'] = None if joined == sorted(set(joined)) else ranks
    if model.normalizer_spec.precompiled_charsmap:
        values['precompiled_charsmap'] = base64.b64encode(
            model.normalizer_spec.precompiled_charsmap).decode()
    if '<s>' in values['special_tokens']:
        values['bos_token'] = '<s>'
    values['pieces'] = [piece.piece for piece in model.pieces]
    try:
        return SentencePieceTokenizer.from_values(values).to_dict()
    except UserError as error:
        raise UserError(f'{path}: {error}') from None


def check_model(path, model):
    """Raise UserError for a kind or an option that is encoded otherwise here."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != 2:
        kind = KINDS.get(trainer.model_type, trainer.model_type)
        raise UserError(f'{path} is a SentencePiece model of kind {kind}; expected BPE '
                        f'(--model_type=bpe), as this program has no {kind} encoder')
    if not trainer.byte_fallback:
        raise UserError(f'{path} has byte_fallback=false, with which characters outside the '
                        f'vocabulary are lost; expected a model with --byte_fallback=true')
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        option = ('treat_whitespace_as_suffix=true' if trainer.treat_whitespace_as_suffix else
                  'escape_whitespaces=false')
        raise UserError(f'{path} has {option}, which this program cannot do; expected the default')
    if model.denormalizer_spec.precompiled_charsmap:
        raise UserError(f'{path} has denormalization rules; expected none, as decoded text would '
                        f'differ here')
    n_unknown = sum(piece.type == UNKNOWN for piece in model.pieces)
    if n_unknown != 1:
        raise UserError(f'{path} has {n_unknown} unknown pieces; expected one, <unk>')


def write_model(values: dict, path):
    """Write a description as a tokenizer.model. Raises UserError."""
    if values.get('kind') != 'sentencepiece':
        raise UserError(f'{path} cannot be written: this format is for SentencePiece tokenizers, '
                        f'and this one is of kind {values.get("kind")!r}. Expected one of python '
                        f'-m tokenizer train --kind=sentencepiece')
    tok = SentencePieceTokenizer.from_values(values)
    if tok.metaspace or tok.added_tokens or tok.token_rules or min(tok.ranks or [0]) < 0:
        raise UserError(f'{path} cannot be written: SentencePiece has neither added tokens nor '
                        f'Metaspace nor pieces that are never joined; expected '
                        f'--out=tokenizer.json')
    if '<unk>' not in tok.special_tokens:
        raise UserError(f'{path} cannot be written: SentencePiece needs the special token <unk>, '
                        f'which this tokenizer lacks')
    model = model_class()()
    ids, symbols = tok.special_tokens, set(tok.user_defined_symbols)
    lowest = min((rank for rank in tok.rank_of.values()), default=0)
    for text in tok.pieces:
        kind = (UNKNOWN if text == '<unk>' else CONTROL if text in ids else
                BYTE if text in BYTE_PIECES else USER_DEFINED if text in symbols else NORMAL)
        # whole numbers up to 2^24 are exact in fp32
        score = lowest - tok.rank_of[text] if text in tok.rank_of else 0
        model.pieces.add(piece=text, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, tok.vocab_size
    trainer.unk_id, trainer.pad_id = ids['<unk>'], -1
    trainer.bos_id, trainer.eos_id = ids.get('<s>', -1), ids.get('</s>', -1)
    normalizer.name = 'precompiled' if tok.precompiled_charsmap else 'identity'
    normalizer.add_dummy_prefix = tok.add_dummy_prefix
    normalizer.remove_extra_whitespaces = tok.remove_extra_whitespaces
    normalizer.precompiled_charsmap = base64.b64decode(tok.precompiled_charsmap or '')
    write_file(path, model.SerializeToString())
