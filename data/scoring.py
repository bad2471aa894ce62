"""
Prepare a text or a split for eval.py: tokens, windows, bytes.

    text = open_file('book.txt', 'text', text_tokenizer)  # or open_split(data_dir, 'val', ...)
    windows, block_size, stride = windows_over(text, None, block_size, stride)
    for x, y in batches(text.tokens, windows, vocab_size): ...
    n_bytes, reason = count_bytes(text, counts, text_tokenizer)
"""

import os
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch

import tokenizer
from configurator import UserError
from data.datasets import load_meta, prepare_command
from data.documents import kind_of, list_files, read_documents, read_text
from data.encode import SEPARATOR
from data.tokens import gather, open_tokens, row_of
from flatgpt import huggingface
from tokenizer.chat import bos_ids


@dataclass
class Text:
    """Hold tokens and their origin."""

    source: str  # path
    tokens: object  # see data.tokens.open_tokens
    vocab_size: int | None = None  # ids are below it; None: the dataset does not record it
    bytes_unknown: str = ''  # why the bytes of the tokens cannot be counted


def open_file(path, text_key, text_tokenizer, max_tokens=None):
    """Encode a file or a folder, at least its first max_tokens tokens; -> Text.

    Special tokens in the text are ordinary text. Each document ends with a blank line, whatever
    the tokenizer, so all tokenizers read the same bytes. Raises UserError for fewer than 2 ids.
    """
    dtype = tokenizer.id_dtype(text_tokenizer.vocab_size)  # 2 or 4 bytes of memory a token
    ids = bytearray(np.array(bos_ids(text_tokenizer), dtype).tobytes())
    for piece in text_tokenizer.cut_safely(read_pieces(path, text_key)):
        ids += text_tokenizer.encode_array(piece).tobytes()
        if max_tokens is not None and len(ids) >= max_tokens * dtype.itemsize:
            break
    tokens = np.frombuffer(ids, dtype)
    if len(tokens) < 2:
        raise UserError(f'{path} has {len(tokens)} token(s); expected 2 or more, because the first '
                        f'is not predicted')
    return Text(path, tokens)


def read_pieces(path, text_key):
    """Yield the text of a file or a folder in pieces."""
    files = list_files(path, text_key)
    if len(files) == 1 and kind_of(files[0], text_key) == 'text':
        yield from read_text(files[0])
    else:
        for text in read_documents(path, text_key):
            yield text + SEPARATOR


def open_split(data_dir, split, text_tokenizer):
    """Open a split of a dataset; -> Text.

    text_tokenizer: the model's. Raises UserError if the split is missing or has another tokenizer.
    """
    path = os.path.join(data_dir, f'{split}.bin')
    if not os.path.exists(path):
        raise UserError(f'there is no {path}; prepare it: {prepare_command(data_dir)}\n'
                        f'or name another --dataset, or a text: --input=FILE')
    meta = load_meta(data_dir)
    # the context may be longer than the split
    tokens = open_tokens(data_dir, split, meta, meta['row'] - 1 if meta['row'] else 1)
    if meta['tokenizer'] is None:
        return Text(path, tokens, meta['vocab_size'], f'{data_dir} names no tokenizer')
    if not huggingface.same_tokenizer(meta['tokenizer'], text_tokenizer.to_dict()):
        prepared = tokenizer.from_dict(meta['tokenizer'])
        raise UserError(f'{data_dir} was prepared with another tokenizer ({prepared.kind}, '
                        f"{prepared.vocab_size:,} ids) than the model's ({text_tokenizer.kind}, "
                        f'{text_tokenizer.vocab_size:,} ids); evaluate the text itself, which any '
                        f'tokenizer encodes: --input=FILE')
    return Text(path, tokens, meta['vocab_size'])


@dataclass
class Windows:
    """Iterate over windows of a text, as (start, end, first).

    A window has the tokens start ... end - 1 and scores those from `first` on.
    """

    starts: range | np.ndarray
    n_tokens: int  # of the text
    length: int  # tokens of a window; at the end of the text it may be shorter
    stride: int  # tokens from a window of the text to the next

    def __len__(self):
        return len(self.starts)

    def __iter__(self):
        n_before = max(1, self.length - self.stride)
        for start in map(int, self.starts):
            end = min(start + self.length, self.n_tokens)
            yield start, end, start + n_before if start else 1


def sliding_windows(n_tokens, block_size, stride):
    """Cover a text with overlapping Windows.

    They start `stride` tokens apart (1 to block_size), so every token but the first is scored
    once, with at least block_size - stride tokens before it. With stride = block_size a window has
    one token more, the target of its last one: these are whole_windows().
    """
    length = block_size + (stride == block_size)
    starts = range(0, max(n_tokens > 1, n_tokens - length + stride), stride)
    return Windows(starts, n_tokens, length, stride)


def windows_over(text, max_tokens, block_size, stride):
    """Cut a Text into Windows; -> (Windows, block_size, stride).

    max_tokens: None for all tokens; stride: None or 0 for block_size. A window of conversations is
    a row. Raises UserError if block_size is shorter, or for overlap.
    """
    n_tokens, stride = min(len(text.tokens), max_tokens or len(text.tokens)), stride or block_size
    if stride > block_size:
        raise UserError(f'stride={stride}: expected at most block_size={block_size}')
    row = row_of(text.tokens)
    if row is None:
        return sliding_windows(n_tokens, block_size, stride), block_size, stride
    if stride != block_size or n_tokens < len(text.tokens):
        raise UserError(f'{text.source} has conversations in rows of {row} tokens, which are '
                        f'evaluated whole; leave out --stride and --max_tokens')
    if row > block_size + 1:
        raise UserError(f'{text.source} has conversations in rows of {row} tokens; expected '
                        f'{block_size + 1} or fewer; prepare it with --block_size={block_size}')
    return Windows(range(0, n_tokens, row), n_tokens, row, row), row - 1, row - 1


def batches(tokens, windows, vocab_size, batch_size=None, at_once=2**13):
    """Yield inputs x and targets y, int64 (B, T), of equal windows; y is -1 unscored.

    batch_size: windows in a batch, None for as many as have at_once tokens.
    """
    for length, group in groupby(windows, key=lambda window: window[1] - window[0] - 1):
        size = batch_size or max(1, at_once // length)
        while part := list(islice(group, size)):
            starts, _, first = map(np.array, zip(*part, strict=True))
            x, y = gather(tokens, starts, length, vocab_size)
            positions = starts[:, None] + np.arange(1, length + 1)  # (B, T)
            y[torch.from_numpy(positions < first[:, None])] = -1
            yield x, y


def count_bytes(text, counts, text_tokenizer):
    """Count the UTF-8 bytes of a Text; -> (bytes, ''), or (None, the reason).

    counts: of each id. Special tokens have no bytes.
    """
    if text.bytes_unknown:
        return None, text.bytes_unknown
    special_tokens = text_tokenizer.special_tokens
    if text_tokenizer.kind == 'word' and counts[special_tokens['<|unk|>']]:
        return None, 'the vocabulary lacks words of this text, and <|unk|> stands for any word'
    n_bytes = sum(len(text_tokenizer.decode_bytes([id])) * int(counts[id])
                  for id in np.flatnonzero(counts).tolist() if id not in special_tokens.values())
    return n_bytes, '' if n_bytes else 'the predicted tokens are special ones, which have no bytes'
