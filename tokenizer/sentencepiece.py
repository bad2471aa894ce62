"""
Encode by SentencePiece's byte pairs of characters, as Llama 2 does.

A text is one piece: no pattern cuts it. Spaces become ▁, and a ▁ goes before the text. Any two
neighbours that together are a piece are joined, the piece of the lowest rank first. A character
that is no piece becomes its bytes of UTF-8, <0xE2> <0x82> <0xAC>. Kudo and Richardson (2018).

    tok = SentencePieceTokenizer.train(texts, 8192)
    tok = tokenizer.load('tokenizer.model')           # see sentencepiece_model.py
"""

import base64
import binascii
import functools
import heapq
import itertools
import struct
from collections import Counter
from dataclasses import dataclass

import numpy as np
import regex

from configurator import UserError
from tokenizer.added import AddedTokens
from tokenizer.base import (
    ENDOFTEXT,
    MAX_ID,
    check_new_specials,
    check_specials,
    id_dtype,
    read_texts,
    shown,
)
from tokenizer.bpe import count_pieces, learn
from tokenizer.bytepair import MergeTokenizer, remember
from tokenizer.patterns import SENTENCEPIECE, split_specials, to_utf8
from tokenizer.workers import encode_in_processes

BLANK = '▁'  # U+2581, the space in pieces
BASIC = ('<unk>', '<s>', '</s>')  # the first special tokens of a vocabulary trained here
COVERAGE = 0.9995  # of the characters in training are pieces, as in SentencePiece
LARGEST_RULES = 1 << 22  # bytes; nmt_nfkc has 240,007
LONGEST_RULE = 32  # bytes that a rule replaces; nmt_nfkc has 12
MOST_PREFIXES = 1 << 20  # of all rules; nmt_nfkc has 262,842


def byte_piece(byte: int) -> str:
    """Return the piece of a byte: 10 -> '<0x0A>'."""
    return f'<0x{byte:02X}>'


BYTE_PIECES = [byte_piece(byte) for byte in range(256)]


@dataclass(eq=False, repr=False)
class SentencePieceTokenizer(MergeTokenizer):
    """Encode by pieces of characters, with bytes for all others.

    pieces: the text of every id, with ▁ for the space and '<0x0A>' for a byte
    special_tokens: {text: id}; encode() makes them only where it is allowed to
    ranks: by id, the order of joining (None: the ids); of equal ranks the leftmost pair is joined,
        and a piece with the rank -1 is never made
    user_defined_symbols: pieces that are cut out of a text before anything is joined
    add_dummy_prefix: a space goes before a text
    remove_extra_whitespaces: spaces around a text go, and of several spaces one stays
    precompiled_charsmap: SentencePiece's rules of normalization in base64 (None: identity)
    bos_token: the special token that Hugging Face's libraries put before every text
    added_tokens: {text: id} of pieces that are cut out of a text before it is normalized
    token_rules: {text: rules} of special and added tokens, see added.py
    metaspace: 'always' or 'first', as in Hugging Face's Metaspace: the dummy prefix goes before no
        space, and with 'first' not behind a special token (None: before each part of a text)
    """

    pieces: list
    special_tokens: dict[str, int] | None = None
    ranks: list[int] | None = None
    user_defined_symbols: list[str] = ()
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    precompiled_charsmap: str | None = None
    bos_token: str | None = None
    added_tokens: dict[str, int] | None = None
    token_rules: dict[str, list[str]] | None = None
    metaspace: str | None = None

    kind = 'sentencepiece'

    def __post_init__(self):
        self.pieces, self.special_tokens = list(self.pieces), dict(self.special_tokens or {})
        self.user_defined_symbols = list(self.user_defined_symbols or ())
        self.vocab_size = len(self.pieces)
        self._id_of = {piece: i for i, piece in enumerate(self.pieces)
                       if isinstance(piece, str) and piece}
        self.added_tokens, self.token_rules = dict(self.added_tokens or {}), self.token_rules or {}
        self._check()
        self._added = AddedTokens(self.added_tokens, self.token_rules, None)
        self._token_of = {i: piece.replace(BLANK, ' ').encode() for i, piece in
                          enumerate(self.pieces)}
        self._token_of |= {self._id_of[piece]: bytes([byte])
                           for byte, piece in enumerate(BYTE_PIECES)}
        self._token_of |= {i: token.encode() for token, i in self.special_tokens.items()}
        reserved = {*self.special_tokens, *BYTE_PIECES, '\0'}  # the package ignores a piece \0
        ranks = range(self.vocab_size) if self.ranks is None else self.ranks
        self.rank_of = {piece: ranks[i] for piece, i in self._id_of.items()
                         if piece not in reserved and ranks[i] >= 0}
        self._byte_ids = [self._id_of[piece] for piece in BYTE_PIECES]
        # Text may be cut where no piece crosses: before a run of ▁ and around a line end.
        joined = [piece for piece in self.rank_of if len(piece) > 1]
        words = not any(regex.search(f'[^{BLANK}]{BLANK}', piece) for piece in joined)
        lines = not any('\n' in piece and piece.strip('\n') for piece in joined)
        self._is_cut_at_blanks = words
        rest = '\n' if lines else ''
        self._cut = regex.compile(f'{BLANK}+[^{BLANK}{rest}]*|[^{BLANK}{rest}]+'
                                  + ('|\n+' if lines else '')) if words else None
        self._rules = read_rules(self.precompiled_charsmap)
        self._may_change = first_of_rules(self._rules)
        self._known = {}  # ids of words

    def _check(self):
        """Raise UserError for pieces, ranks or options that encode nothing well-defined."""
        if len(self._id_of) < self.vocab_size or self.vocab_size > MAX_ID + 1:
            odd = next((piece for i, piece in enumerate(self.pieces)
                        if not isinstance(piece, str) or self._id_of.get(piece) != i), '')
            raise UserError(f'the piece {shown(odd)} is empty, no text, or there twice; expected '
                            f'up to {MAX_ID + 1:,} different texts')
        if odd := next((piece for piece in self.pieces
                        if to_utf8(piece) != piece.encode('utf-8', 'surrogatepass')), None):
            raise UserError(f'the piece {shown(odd)} has half a surrogate pair')
        if missing := [piece for piece in BYTE_PIECES if piece not in self._id_of]:
            raise UserError(f'{len(missing)} of the 256 bytes are no pieces (such as '
                            f'{missing[0]}); expected all, for characters that are no pieces '
                            f'(byte_fallback)')
        check_specials(self.special_tokens)
        if self.metaspace not in (None, 'always', 'first') or (
                self.metaspace and not self.add_dummy_prefix):
            raise UserError(f"metaspace is {shown(self.metaspace)}; expected 'always' or 'first' "
                            f'with add_dummy_prefix, or None')
        for token, i in [*self.special_tokens.items(), *self.added_tokens.items()]:
            if self._id_of.get(token) != i or token in BYTE_PIECES:
                raise UserError(f'the special or added token {shown(token)} has the id {i}; '
                                f'expected the id of that piece')
        if self.ranks is not None and (len(self.ranks) != self.vocab_size or any(
                type(rank) is not int for rank in self.ranks)):
            raise UserError(f'ranks has {len(self.ranks)} entries; expected {self.vocab_size} '
                            f'whole numbers, one for each piece')
        for symbol in self.user_defined_symbols:
            if (not isinstance(symbol, str) or symbol not in self._id_of
                    or symbol in self.special_tokens or ' ' in symbol):
                raise UserError(f'user_defined_symbols has {shown(symbol)}; expected pieces that '
                                f'are not special, without spaces')
        if self.bos_token is not None and (not isinstance(self.bos_token, str)
                                           or self.bos_token not in self.special_tokens):
            raise UserError(f'bos_token is {shown(self.bos_token)}, which is no special token; '
                            f'expected {", ".join(self.special_tokens) or "none"}')

    @property
    def eot(self):
        """Return the id of <|endoftext|> or </s>, or None."""
        return self.special_tokens.get(ENDOFTEXT, self.special_tokens.get('</s>'))

    @classmethod
    def from_values(cls, values: dict) -> 'SentencePieceTokenizer':
        """Make the tokenizer that to_dict() described."""
        return cls(**{key: value for key, value in values.items()
                      if key in cls.__dataclass_fields__})

    @classmethod
    def train(cls, texts, vocab_size: int, special_tokens=(), workers: int | None = None):
        """Learn pieces from texts, for vocab_size ids; return the tokenizer.

        texts: one string, or an iterable of strings. The ids are <unk> <s> </s>, special_tokens,
        256 bytes, joined pieces, and the characters that make up COVERAGE of the texts. No piece
        has a space or line end after another character; digits stand alone, as in Llama 2. Raises
        UserError.
        """
        specials = [*BASIC, *(token for token in special_tokens if token not in BASIC)]
        check_new_specials(specials)
        texts = (f' {text}' for text in read_texts(texts) if text)
        counts = count_pieces(texts, SENTENCEPIECE, specials, workers)
        if not counts:
            raise UserError('the text to train on is empty; expected some text')
        chars = Counter()
        for piece, count in counts.items():
            for char in piece.replace(' ', BLANK):
                chars[char] += count
        del chars['\0']  # SentencePiece knows it as a byte only
        by_count = sorted(chars, key=lambda char: (-chars[char], char))
        covered = itertools.accumulate(chars[char] for char in by_count)
        enough = COVERAGE * chars.total()
        n_chars = next(i for i, total in enumerate(covered, 1) if total >= enough)
        n_merges = vocab_size - len(specials) - 256 - n_chars
        if n_merges < 0:
            raise UserError(f'vocab_size is {vocab_size}; expected at least '
                            f'{vocab_size - n_merges}: 256 bytes, {len(specials)} special tokens, '
                            f'and the {n_chars} characters that make up {COVERAGE:.2%} of the text')
        alphabet = by_count[:n_chars]
        place = {char: i for i, char in enumerate(alphabet)}

        def spell(piece):
            return [place.get(char, -1) for char in piece.replace(' ', BLANK)]

        tokens = list(alphabet)
        for left, right in learn(counts, n_merges, spell, n_chars):
            tokens.append(tokens[left] + tokens[right])
        if len(tokens) - n_chars < n_merges:
            raise UserError(f'the text has {len(tokens) - n_chars:,} pairs to join, and vocab_size '
                            f'{vocab_size:,} needs {n_merges:,}: train on more text, or with '
                            f'vocab_size at most {vocab_size - n_merges + len(tokens) - n_chars:,}')
        pieces = [*specials, *BYTE_PIECES, *tokens[n_chars:], *alphabet]
        return cls(pieces, {token: i for i, token in enumerate(specials)}, bos_token='<s>')

    def encode_parts(self, text: str, allowed, fast: bool = False) -> list[int]:
        ids, is_first = [], True
        specials = {token: self.special_tokens[token] for token in allowed}
        for part, token_id in self._added.split(text, specials):
            if token_id is None:
                ids += self.encode_part(part, is_first)
            else:
                ids.append(token_id)
            is_first = False
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_parts(text, ()) if self.added_tokens else self.encode_part(text)

    def encode_part(self, text: str, is_first: bool = True) -> list[int]:
        """Encode text without special tokens. is_first: nothing stands before it."""
        text = self.normalize(text, is_first)
        ids = []
        for i, part in enumerate(split_specials(text, self.user_defined_symbols)):
            if i % 2:
                ids.append(self._id_of[part])
                continue
            for word in self._cut.findall(part) if self._cut else [part]:
                word_ids = self._known.get(word)
                if word_ids is None:
                    word_ids = self.encode_word(word)
                    remember(self._known, word, word_ids)
                ids += word_ids
        return ids

    def forget(self):
        self._known.clear()

    def normalize(self, text: str, is_first: bool = True) -> str:
        """Return text as it is joined: normalized, with ▁ for spaces."""
        text = to_utf8(text).decode('utf-8')
        if not text:
            return ''
        if self._rules:
            text = self.replace_by_rules(text)
        if self.remove_extra_whitespaces:
            text = regex.sub(' +', ' ', text).strip(' ')
        text = text.replace(' ', BLANK)
        stays = self.metaspace and (text.startswith(BLANK)
                                    or self.metaspace == 'first' and not is_first)
        text = (BLANK if self.add_dummy_prefix and not stays else '') + text
        return text.rstrip(BLANK) if self.remove_extra_whitespaces else text

    def replace_by_rules(self, text: str) -> str:
        """Replace the longest rule that begins at each place, from left to right."""
        longest_first = sorted(self.user_defined_symbols, key=len, reverse=True)
        symbols = regex.compile('|'.join(map(regex.escape, longest_first)))
        longest = len(longest_first[0]) if longest_first else 0
        parts, done = [], 0
        while match := self._may_change.search(text, done):
            start = match.start()
            # a symbol is kept as it is, and may begin before the first character of a rule
            symbol = symbols.search(text, done, start + longest) if longest else None
            if symbol and symbol.start() <= start:
                parts.append(text[done:symbol.end()])
                done = symbol.end()
                continue
            end = next((end for end in range(min(len(text), start + LONGEST_RULE), start, -1)
                        if text[start:end] in self._rules), None)
            parts.append(text[done:start])
            parts.append(text[start] if end is None else self._rules[text[start:end]])
            done = start + 1 if end is None else end
        return ''.join(parts) + text[done:]

    def encode_word(self, word: str) -> list[int]:
        """Join the characters of a word, and replace those that are no pieces by bytes.

        The pair whose piece has the lowest rank is joined first, of equal ones the leftmost.
        """
        parts, rank_of = list(word), self.rank_of
        previous, following = list(range(-1, len(parts))), list(range(1, len(parts) + 1))
        heap = [(rank, i) for i, (left, right) in enumerate(itertools.pairwise(parts))
                if (rank := rank_of.get(left + right)) is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = following[i]
            # an earlier join has taken one of the two
            if not parts[i] or j == len(parts) or rank_of.get(parts[i] + parts[j]) != rank:
                continue
            parts[i], parts[j] = parts[i] + parts[j], ''
            following[i] = after = following[j]
            before = previous[i]
            if before >= 0 and (rank := rank_of.get(parts[before] + parts[i])) is not None:
                heapq.heappush(heap, (rank, before))
            if after < len(parts):
                previous[after] = i
                if (rank := rank_of.get(parts[i] + parts[after])) is not None:
                    heapq.heappush(heap, (rank, i))
        ids = []
        for part in parts:
            if part in rank_of:
                ids.append(self._id_of[part])
            elif part:
                ids += [self._byte_ids[byte] for byte in part.encode()]
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode_ordinary(text), dtype=id_dtype(self.vocab_size))

    def encode_batch(self, texts: list[str], workers: int | None = None) -> list[np.ndarray]:
        return encode_in_processes(self, texts, workers)

    def decode(self, ids) -> str:
        """Decode ids to text, without the space that encode() puts in front.

        decode_bytes() keeps that space, so that the bytes of parts add up to those of the whole.
        """
        text = super().decode(ids)
        if self.remove_extra_whitespaces:
            return text.lstrip(' ')
        return text.removeprefix(' ') if self.add_dummy_prefix else text

    @property
    def dropped_at_cut(self):
        return 1 if self.add_dummy_prefix else 0  # the space at which cuts() cuts comes back

    def cuts(self, text: str):
        stripped = self.remove_extra_whitespaces and not self.add_dummy_prefix
        if not self._is_cut_at_blanks or self._rules or stripped or not self._added.can_cut:
            return
        for match in regex.finditer(r'(?r)(?<=[^\s▁]) (?=[^\s▁])', text):
            start, end = match.span()
            # text between special tokens gets a space in front too
            if not any(text.endswith(token, 0, start) or text.startswith(token, end)
                       or token.startswith(text[end:])
                       for token in [*self.special_tokens, *self.added_tokens]):
                yield start

    def to_dict(self) -> dict:
        # options with their usual value are left out
        rare = {'ranks': self.ranks, 'user_defined_symbols': self.user_defined_symbols,
                'remove_extra_whitespaces': self.remove_extra_whitespaces,
                'precompiled_charsmap': self.precompiled_charsmap, 'bos_token': self.bos_token,
                'added_tokens': self.added_tokens, 'token_rules': self.token_rules,
                'metaspace': self.metaspace}
        return {'kind': 'sentencepiece', 'special_tokens': dict(self.special_tokens),
                'add_dummy_prefix': self.add_dummy_prefix,
                **{key: value for key, value in rare.items() if value},
                'pieces': list(self.pieces)}


@functools.lru_cache(maxsize=4)
def read_rules(charsmap: str | None) -> dict[str, str]:
    """Return SentencePiece's rules of normalization {text: replacement}.

    charsmap holds the size of a double-array trie (Darts), the trie, and the replacements, which
    end with zeros. Raises UserError for a damaged one.
    """
    if not charsmap:
        return {}
    damaged = UserError('precompiled_charsmap, the rules of normalization, is damaged; fetch the '
                        'file again')
    try:
        content = base64.b64decode(charsmap, validate=True)
        if len(content) > LARGEST_RULES:
            raise ValueError
        size, = struct.unpack_from('<I', content)
        units = np.frombuffer(content, '<u4', size // 4, 4).tolist()
    except (binascii.Error, ValueError, TypeError, struct.error):
        raise damaged from None
    texts = content[4 + size:]
    # a unit with label b is a child of base ^ b, where its parent's offset leads to
    children = {}
    for place, unit in enumerate(units):
        if not unit >> 31:
            children.setdefault(place ^ unit & 0xff, []).append(place)
    rules, waiting, n_visited = {}, [(0, b'')], 0
    while waiting:
        place, key = waiting.pop()
        n_visited += 1
        unit = units[place] if units else 0
        base = place ^ (unit >> 10 << ((unit & 1 << 9) >> 6))
        if n_visited > MOST_PREFIXES or len(key) > LONGEST_RULE:
            raise damaged
        if unit >> 8 & 1 and key:
            try:
                start = units[base] & 0x7fffffff
                replacement = texts[start:texts.index(b'\0', start)]
                rules[key.decode('utf-8')] = replacement.decode('utf-8')
            except (IndexError, ValueError):  # the text does not end, or is no UTF-8
                raise damaged from None
        waiting += [(child, key + bytes([units[child] & 0xff])) for child in children.get(base, ())]
    return rules


def first_of_rules(rules: dict[str, str]):
    """Compile what a rule may begin with: a character, or two that begin a longer one."""
    def any_of(chars):
        return f'[{"".join(map(regex.escape, sorted(chars)))}]'

    longer = [rule for rule in rules if len(rule) > 1]
    ways = [any_of({rule for rule in rules if len(rule) == 1})] if len(longer) < len(rules) else []
    if longer:
        ways.append(any_of({rule[0] for rule in longer})
                    + f'(?={any_of({rule[1] for rule in longer})})')
    return regex.compile('|'.join(ways)) if ways else None
