"""
Turn the tokens and merges in a file into a description, and back.

A description is the plain dict that BPETokenizer.to_dict() returns and from_dict() reads:

    kind            'bpe'
    pattern         regular expression that cuts text into pieces, or None: text is one piece
    special_tokens  {text: id}
    byte_ids        ids of the 256 bytes; None: byte b has id b
    merge_ids       id of each merge's token; None: 256, 257, ...
    ignore_merges   True: a piece that is itself a token becomes that token at once
    normalizer      'NFC': the form in which text is cut into pieces (only where there is one)
    bos_token       the special token that Hugging Face's libraries put before a text (likewise)
    visible_tokens  special tokens that they keep in decoded text (likewise)
    added_tokens    {text: id} of tokens that are cut out of any text (likewise)
    token_rules     {text: rules} of special and added tokens, see added.py (likewise)
    merges          'left right' in GPT-2's byte alphabet, in their order

Many files list more merges than byte pair encoding can reach; one per token suffices. In any text,
a token's bytes are joined in the same order as when they stand alone, unless a
neighbour takes some of them. So the last join of the token alone (bpe.final_parts) gives the merge
that makes it.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass

from configurator import UserError
from tokenizer.base import MAX_ID, check_regular, clip
from tokenizer.bpe import MOST_SQUARES, are_long, final_parts
from tokenizer.patterns import from_printable, printable

READABLE = ("tiktoken's *.tiktoken, Hugging Face's tokenizer.json (byte-level BPE), "
            "SentencePiece's tokenizer.model (BPE), GPT-2's vocab.json with merges.txt or "
            'encoder.json with vocab.bpe, or a folder with one of these')


@dataclass
class Vocabulary:
    """Hold the vocabulary in a file, in bytes, however the file writes it.

    path: for error messages. ids: {token: id} without special tokens. merges: [(left, right)].
    """

    path: str
    ids: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    special_tokens: dict[str, int]

    def describe(self, pattern: str | None, ignore_merges: bool = False) -> dict:
        """Return the description. Raises UserError where it could not give the file's ids.

        That is where bytes are missing, two tokens share an id, or no merges make a token.
        """
        self.check_ids()
        (merges, whole), ids = self.find_merges(ignore_merges), self.ids
        byte_ids = [ids[bytes([byte])] for byte in range(256)]
        merge_ids = [ids[left + right] for left, right in merges]
        specials = sorted(self.special_tokens.items(), key=lambda item: item[1])
        return {
            'kind': 'bpe', 'pattern': pattern, 'special_tokens': dict(specials),
            'merges': [f'{printable(left)} {printable(right)}' for left, right in merges],
            'byte_ids': None if byte_ids == list(range(256)) else byte_ids,
            'merge_ids': None if merge_ids == list(range(256, 256 + len(merges))) else merge_ids,
            'ignore_merges': ignore_merges and whole}  # otherwise it changes nothing

    def check_ids(self):
        """Raise UserError unless all bytes are tokens, and all ids differ."""
        missing = [byte for byte in range(256) if bytes([byte]) not in self.ids]
        if missing:
            names = ', '.join(f'0x{byte:02x}' for byte in missing[:10])
            more = f' and {len(missing) - 10} more' if len(missing) > 10 else ''
            raise UserError(f'{self.path}: {len(missing)} of the 256 bytes are no tokens '
                            f'({names}{more}); expected all. In tokenizers, train with '
                            f'initial_alphabet=ByteLevel.alphabet()')
        names, specials = {}, self.special_tokens.items()
        for name, i in [*((repr(token), i) for token, i in self.ids.items()), *specials]:
            if type(i) is not int or not 0 <= i <= MAX_ID:
                raise UserError(f'{self.path}: the token {name} has the id {i!r}; expected a whole '
                                f'number from 0 to {MAX_ID:,}')
            if i in names:
                raise UserError(f'{self.path}: the tokens {names[i]} and {name} have the same id '
                                f'{i}; expected one id for each')
            names[i] = name

    def find_merges(self, ignore_merges) -> tuple[list[tuple[bytes, bytes]], bool]:
        """Return one merge for every token, in order, and whether some are never reached."""
        # the last place counts of a pair that is listed twice, as in tokenizers
        order = {pair: i for i, pair in enumerate(self.merges)}
        rank = rank_in(order)
        ways = Counter(left + right for left, right in order)
        made = {token for token in self.ids if len(token) == 1}
        merges = []
        for left, right in sorted(order, key=order.get):
            token, parts_made = left + right, left in made and right in made
            if ignore_merges or ways[token] > 1 or not parts_made:
                if final_parts(token, rank) != [left, right]:
                    continue  # another merge makes this token, or none does
                if not parts_made:
                    raise UserError(f'{self.path}: the merge {printable(left)!r} '
                                    f'{printable(right)!r} stands before one of its parts is made; '
                                    f'expected merges in the order they were learnt')
            merges.append((left, right))
            made.add(token)

        # The other tokens are unused ids or, with ignore_merges, whole pieces. Each gets a merge
        # that is never reached, a join of two tokens that its bytes never come to.
        never_made = sorted(self.ids.keys() - made, key=lambda token: (len(token), self.ids[token]))
        for token in never_made:
            parts = final_parts(token, rank)
            pair = next(((token[:i], token[i:]) for i in range(1, len(token))
                         if [token[:i], token[i:]] != parts
                         and token[:i] in made and token[i:] in made), None)
            if pair is None or ways[token] == 0 and not ignore_merges:
                raise UserError(f'{self.path}: no merges lead to the token {printable(token)!r} '
                                f'(id {self.ids[token]}); expected a merge for every token of more '
                                f'than one byte')
            merges.append(pair)
            made.add(token)
        return merges, bool(never_made)


def check_lengths(path, tokens):
    """Raise UserError for tokens so long that finding their merges takes minutes."""
    if are_long(tokens):
        raise UserError(f'{path}: the longest of {len(tokens):,} tokens has '
                        f'{max(map(len, tokens)):,} bytes, and the squares of all lengths sum to '
                        f'{sum(len(token) ** 2 for token in tokens):,}; expected '
                        f'{MOST_SQUARES:,} or less')


def rank_in(order: dict[tuple[bytes, bytes], int]):
    """Return the rank() that final_parts() takes, for merges {(left, right): place}."""
    return lambda left, right: order.get((left, right), math.inf)


def from_alphabet(path, vocab: dict[str, int], pairs, special_tokens):
    """Return the Vocabulary that a file writes in GPT-2's byte alphabet.

    pairs: (place in the file, [left, right]). Raises UserError for any other content.
    """
    tokens = {}
    for text, i in vocab.items():
        if text not in special_tokens:
            try:
                tokens[text] = from_printable(text)
            except KeyError:
                raise UserError(f'{path}: the token {text!r} (id {i}) is neither special nor '
                                f"written in GPT-2's byte alphabet; expected a byte-level "
                                f'vocabulary') from None
    check_lengths(path, tokens.values())
    merges = []
    for place, pair in pairs:
        if (not isinstance(pair, list) or len(pair) != 2
                or not all(isinstance(part, str) and part for part in pair)):
            raise UserError(f'{path}, {place}: {short(pair)} is no merge; expected two tokens with '
                            f'a space between')
        joined = ''.join(pair)
        if joined in special_tokens and joined.isascii():
            continue  # learnt from special tokens in text, which are cut out before merging
        for text in (*pair, joined):
            if text not in tokens:
                raise UserError(f'{path}, {place}: the merge {" ".join(pair)!r} needs the token '
                                f'{text!r}; expected it in the vocabulary')
        merges.append((tokens[pair[0]], tokens[pair[1]]))
    ids = {token: vocab[text] for text, token in tokens.items()}
    return Vocabulary(path, ids, merges, special_tokens)


def tokens_of(values: dict) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """Return the tokens {bytes: id} and the merges of a description."""
    if values.get('kind') != 'bpe':
        raise UserError(f'this format is for BPE tokenizers, and this one is of kind '
                        f'{values.get("kind")!r}; prepare the data with --tokenizer=bpe')
    merges = [tuple(from_printable(part) for part in merge.split(' '))
              for merge in values['merges']]
    tokens = [*(bytes([byte]) for byte in range(256)), *(left + right for left, right in merges)]
    ids = [*(values['byte_ids'] or range(256)), *(values['merge_ids'] or range(256, len(tokens)))]
    return dict(zip(tokens, ids, strict=True)), merges


def read_bytes(path) -> bytes:
    """Read a file. Raises UserError where there is none, and for a pipe or a device."""
    check_regular(path)
    try:
        with open(path, 'rb') as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f'{path} does not exist; expected {READABLE}') from None


def read_utf8(path) -> str:
    """Read a text file, without a mark. Raises UserError at bytes that are not UTF-8."""
    try:
        return read_bytes(path).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: byte {error.start} is not UTF-8 ({error.object[error.start]:#04x}'
                        f'); the file is damaged: fetch it again') from None


def unique(items):
    """Make a JSON object, as object_pairs_hook. Raises UserError for a repeated key."""
    values = dict(items)
    if len(values) < len(items):
        repeated = next(key for key, n in Counter(key for key, _ in items).items() if n > 1)
        raise UserError(f'the key {short(repeated)} stands there twice; expected it once')
    return values


def read_json(path):
    """Read a JSON file. Raises UserError for damage and repeated keys."""
    text = read_utf8(path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged or truncated ({error}): fetch it again') from None


def is_vocab(content) -> bool:
    """Return whether content is {token: id}."""
    return isinstance(content, dict) and all(type(i) is int for i in content.values())


def to_json(values) -> str:
    """Write values as readable JSON."""
    return json.dumps(values, ensure_ascii=False, indent=2) + '\n'


def short(value) -> str:
    """Write a value for an error message, in at most 100 characters."""
    return clip(json.dumps(value, ensure_ascii=False))
