"""
Constrain output to one of some choices, a regular expression or a JSON schema.

    constraint = Constraint(tokenizer, regex=r'(yes|no), because .{10,80}')
    constraint.check_length(max_new_tokens)
    matcher = constraint.matcher()  # one for each sample
    next_id = matcher.draw(logits, remaining, sample)  # (1, 1); None: the text ends

The package llguidance computes which tokens keep a match possible. That does not suffice: a model
may fill a string until max_new_tokens cuts it off. A matcher therefore keeps an ending, symbols
that complete the match within the remaining tokens. It refuses a token that leaves no ending.

The ending after a token is mostly the rest of the ending before it. If not, as when it opens a
list, a best-first search looks for an ending. It prefers symbols that close to symbols that
open. llguidance shows only which symbols may follow, so the search may miss the shortest ending.
In odd patterns it may miss every ending; then the constraint or the token is refused.
"""

import bisect
import functools
import heapq
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import torch

from configurator import UserError
from tokenizer import ByteTokenizer
from tokenizer.patterns import to_utf8

# texts that a search extends, 0.03 to 0.2 ms each: at the start; after a drawn token; and after all
# drawable tokens together, when no more remain than the ending has
TEXTS_AT_START, TEXTS_AFTER_DRAW, TEXTS_BEFORE_DRAW = 2000, 300, 100
MAX_SYMBOLS = 40  # symbols that a search tries after a text
MAX_ALIKE = 2  # texts of one length and with the same next symbols that a search extends
MAX_VERIFIED = 64  # tokens that are searched after before they are drawn
MAX_REFUSED = 8  # draws for one token; then the ending is written
LONGEST_MATCH = 4096  # characters, of a regular expression
MOST_CHOICES = 10_000  # their grammar takes seconds; 30,000 take a minute

# cost of a symbol in a search, by its first byte: low if it closes, high if it opens
PENALTY = np.full(256, 6)
for penalty, chars in enumerate((b']}', b'"', b',:', b'0aA', b" !#$%&'()*+-./;<=>?@^_`|~",
                                 b'123456789bcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ')):
    PENALTY[list(chars)] = penalty
IDLE = 3  # cost added for a symbol that leaves the next symbols unchanged


def import_llguidance():
    try:
        import llguidance
    except ImportError:
        raise UserError('choices, regex and json_schema need the package llguidance: '
                        "pip install -c constraints.txt -e '.[constrain]'") from None
    return llguidance


def llg_tokenizer(tokens):
    """Wrap a list of bytes, b'' for a token that is never allowed, for llguidance."""
    class Tokens:
        eos_token_id, bos_token_id, special_token_ids = len(tokens), None, [len(tokens)]

        def __call__(self, text):  # llguidance probes the type that it takes
            return []
    Tokens.tokens = [*tokens, b'<eos>']
    library = import_llguidance()
    return library.LLTokenizer(library.TokenizerWrapper(Tokens()))


def start_matching(tokenizer, grammar):
    """Return llguidance's matcher of an empty text; is_error() for a bad grammar."""
    # no_forcing: else a text with one continuation could be written in only one way
    header = '%llguidance {"no_forcing": true}\n'
    return import_llguidance().LLMatcher(tokenizer, header + grammar, log_level=0)


def lark(regex):
    if regex != regex.encode('utf-8', 'replace').decode():
        raise UserError(f'{regex[:60]!r} has half a surrogate pair, not a character')
    return f'/{import_llguidance().regex_to_lark(regex, "d")}/'  # d: \d is 0 to 9


def may_follow(state):
    """Return which of a matcher's tokens may follow, of bool, and padding."""
    mask = np.frombuffer(state.compute_bitmask(), np.uint8)
    return np.unpackbits(mask, bitorder='little').view(bool)


def matches_after(state, symbols):
    """Return whether the match is complete after these symbols."""
    if state.validate_tokens(symbols) < len(symbols):
        return False
    state = state.deep_copy()
    return state.consume_tokens(symbols) and state.is_accepting()


class Vocabulary:
    """List a tokenizer's tokens, and the symbols that a search writes.

    Symbols are the bytes, if each byte of UTF-8 is a token, else the tokens.
    """

    def __init__(self, tokenizer):
        special = set(tokenizer.special_tokens.values())
        self.tokens = [b'' if i in special else token_bytes(tokenizer, i)
                       for i in range(tokenizer.vocab_size)]
        self.id_of = {}
        for i, token in enumerate(self.tokens):
            if b'\xff' in token:  # llguidance marks special tokens by \xff
                self.tokens[i] = b''
            elif token:
                # SentencePiece's later 'A', which texts have, replaces its byte <0x41>
                if token in self.id_of:
                    self.tokens[self.id_of[token]] = b''
                self.id_of[token] = i
        self.longest = max(map(len, self.id_of), default=0)
        self.llg_tokens = llg_tokenizer(self.tokens)
        utf8 = [bytes([byte]) for byte in range(0xf5) if byte not in (0xc0, 0xc1)]
        self.has_bytes = all(byte in self.id_of for byte in utf8)
        self.symbols = [bytes([byte]) for byte in range(255)] if self.has_bytes else self.tokens
        self.llg_symbols = llg_tokenizer(self.symbols) if self.has_bytes else self.llg_tokens
        self.penalty = [int(PENALTY[symbol[0]]) if symbol else math.inf for symbol in self.symbols]
        self.order = np.array(sorted(range(len(self.symbols)), key=lambda i: (
            self.penalty[i], len(self.symbols[i]), self.symbols[i])))  # those to try first in front

    def spell(self, i):
        """Return the symbols of a token, [] for a token that no text has."""
        token = self.tokens[i] if i < len(self.tokens) else b''
        return list(token) if self.has_bytes else [i] * (token != b'')

    def write(self, text):
        """Return the fewest ids that write these bytes, None if no ids do."""
        fewest = [0] + [math.inf] * len(text)  # tokens that write the first n bytes
        last = [b''] * len(fewest)  # the last of them
        for start in range(len(text)):
            for end in range(start + 1, min(len(text), start + self.longest) + 1):
                if fewest[start] + 1 < fewest[end] and text[start:end] in self.id_of:
                    fewest[end], last[end] = fewest[start] + 1, text[start:end]
        if fewest[-1] == math.inf:
            return None
        ids, end = [], len(text)
        while end:
            ids.append(self.id_of[last[end]])
            end -= len(last[end])
        return ids[::-1]

    def to_ids(self, symbols):
        return self.write(bytes(symbols)) if self.has_bytes else symbols

    def fits(self, symbols, n_tokens):
        return len(symbols) <= n_tokens or len(self.to_ids(symbols)) <= n_tokens

    def in_order(self, state):
        """Return the symbols that may follow, those to try first in front."""
        return self.order[may_follow(state)[self.order]]

    def cannot_write(self, text):
        """Return the end of an error message: why no tokens write these bytes."""
        written = b' '.join(self.id_of)
        lacking = ' '.join(repr(char) for char in sorted(set(text.decode('utf-8')))
                           if char.encode('utf-8') not in written)
        reason = f'no token has {lacking}' if lacking else 'its tokens do not join to that'
        return f'cannot be written with this tokenizer: {reason}; a byte or BPE tokenizer can'


vocabulary = functools.lru_cache(maxsize=4)(Vocabulary)  # 0.3 s for 50,000 ids


def token_bytes(tokenizer, i):
    """Return the bytes of an id, b'' of an unused one."""
    try:
        return tokenizer.decode_bytes([i])
    except ValueError:
        return b''


def parse_schema(schema):
    """Parse a JSON schema -> dict. Raises UserError for parts that llguidance ignores."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f'json_schema is not JSON ({error}): {schema[:60]!r}') from None
    if not isinstance(schema, dict):
        raise UserError(f'json_schema is {str(schema)[:60]!r}: expected an object such as '
                        f'{{"type": "integer"}}')
    for part in dicts_in(schema):
        if isinstance(part.get('items'), list):
            raise UserError('json_schema: "items" is a list, as in old drafts: expected '
                            '"prefixItems"')
        for bound, others, sign, remedy in (
                ('exclusiveMinimum', ('maximum', 'exclusiveMaximum'), 1, '"minimum": 0.001'),
                ('exclusiveMaximum', ('minimum', 'exclusiveMinimum'), -1, '"maximum": -0.001')):
            is_small = any(isinstance(part.get(other), int | float) and sign * part[other] < 1
                           for other in others)
            is_integer = part.get('type') == 'integer'
            if part.get(bound) == 0 and not is_integer and (is_small or 'multipleOf' in part):
                raise UserError(f'json_schema: "{bound}": 0 would allow 0 in so small a range: '
                                f'expected an inclusive bound such as {remedy}')
        least, required = part.get('minProperties', 0), part.get('required', [])
        if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
            raise UserError(f'json_schema: "minProperties": {least} is not possible with '
                            f'{len(required)} required properties, since free keys may be equal; '
                            f'name more in "required"')
    return schema


def dicts_in(value):
    """Yield all schemas inside a schema and itself, without data such as a "const"."""
    if isinstance(value, dict):
        yield value
        value = [inner for key, inner in value.items()
                 if key not in ('const', 'enum', 'default', 'examples')]
    for inner in value if isinstance(value, list) else ():
        yield from dicts_in(inner)


class Constraint:
    """Describe the allowed output, by one of choices, regex and json_schema.

    choices: a list of texts. regex: a regular expression of the whole text, in the syntax of Rust's
    regex crate: no look-around, no backreferences; \\d is 0 to 9, \\w and \\s are Unicode's.
    json_schema: a dict or its JSON; the output has no blanks between its parts, and the keys of an
    object are in the schema's order.

    Raises UserError if it cannot be expressed, matched, or written with this tokenizer.
    """

    def __init__(self, tokenizer, choices=None, regex=None, json_schema=None):
        values = {'choices': choices, 'regex': regex, 'json_schema': json_schema}
        given = [name for name, value in values.items() if value is not None]
        if len(given) != 1:
            raise UserError(f'got {" and ".join(given) or "none"}: expected one of choices, regex '
                            f'and json_schema')
        self.name, self.vocabulary = given[0], vocabulary(tokenizer)
        self.choices, value = None, values[self.name]
        self.literals = []  # a match of each "pattern" in a schema, as symbols
        if choices is not None:
            if isinstance(choices, str) or not choices:
                raise UserError(f"choices is {choices!r}: expected a list of texts, ['yes', 'no']")
            if len(choices) > MOST_CHOICES:
                raise UserError(f'choices: {len(choices):,} texts; expected {MOST_CHOICES:,} or '
                                f'fewer')
            self.choices = [self.check_choice(choice) for choice in choices]
            grammar = 'start: ' + ' | '.join(json.dumps(choice) for choice in choices)
        elif regex is not None:
            grammar = f'start: {lark(regex)}'
        else:
            schema = parse_schema(json_schema)
            matches = [self.shortest_match(part['pattern']) for part in dicts_in(schema)
                       if isinstance(part.get('pattern'), str)]
            self.literals = [match for match in matches if match]
            grammar = 'start: %json ' + json.dumps(
                {**schema, 'x-guidance': {'whitespace_flexible': False}})
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        shown = f'{self.name}={text[:60]!r}'
        self.start = start_matching(self.vocabulary.llg_tokens, grammar)
        if self.start.is_error():
            message = self.start.get_error()
            reason = re.search(r'^error: (.*)', message, re.MULTILINE) or re.match(
                r'(?:at \d+\(\d+\): )?(?:failed to compile JSON schema: )?(.*)', message)
            raise UserError(f'{shown} is not possible: {reason[1]}')
        self.search_start = start_matching(self.vocabulary.llg_symbols, grammar)
        self.ending = self.find_shortest(regex)
        if self.ending is None:
            if not self.vocabulary.has_bytes:  # bytes may show a match, or raise the error below
                match = bytes(Constraint(ByteTokenizer(), **values).ending)
                raise UserError(f'{self.name}: a text that matches, {match.decode()!r}, '
                                + self.vocabulary.cannot_write(match))
            raise UserError(f'{shown}: found no text that matches. There is none, or it is too '
                            f'long or too hard to find; simplify it')

    def find_shortest(self, regex):
        """Return the symbols of a short text that matches, None if none was found."""
        if regex is not None and (ending := self.shortest_match(regex)) is not None:
            return ending
        endings = [self.complete(self.search_start, b'', haste, TEXTS_AT_START)
                   for haste in (1, 0.01)]
        return min((ending for ending in endings if ending is not None), default=None,
                   key=lambda ending: len(self.vocabulary.to_ids(ending)))

    def check_choice(self, choice):
        """Return the bytes of a choice. Raises UserError if no tokens write it."""
        if not isinstance(choice, str) or not choice:
            raise UserError(f'choices: {choice!r}: expected texts of at least one character')
        text = to_utf8(choice)
        if text != choice.encode('utf-8', 'surrogatepass'):
            raise UserError(f'the choice {choice!r} has half a surrogate pair, not a character')
        if self.vocabulary.write(text) is None:
            raise UserError(f'the choice {choice!r} ' + self.vocabulary.cannot_write(text))
        return text

    def check_length(self, max_new_tokens):
        """Raise UserError if the shortest match that was found takes more tokens."""
        ids = self.vocabulary.to_ids(self.ending)
        if len(ids) > max_new_tokens:
            text = b''.join(self.vocabulary.tokens[i] for i in ids).decode('utf-8')
            text = text if len(text) <= 60 else text[:57] + '...'
            raise UserError(f'max_new_tokens={max_new_tokens}: the shortest text found for this '
                            f'{self.name}, {text!r}, takes {len(ids)}: expected '
                            f'--max_new_tokens={len(ids)} or more')

    def matcher(self):
        """Return a Matcher of an empty text. Each sample needs its own."""
        return Matcher(self)

    def shortest_match(self, regex):
        """Return symbols of the shortest text that matches, None if there is none.

        The grammar of matches with at most n characters has no dead ends, so any path in it is a
        match; n is found by bisection.
        """
        if self.vocabulary.has_bytes:  # all characters would take much longer
            chars = {*map(chr, range(128)), *regex}
        else:
            chars = set(b' '.join(self.vocabulary.id_of).decode('utf-8'))
        one_of = ''.join(f'\\x{{{ord(char):x}}}' for char in sorted(chars))

        def find(most):
            grammar = f'start: TEXT\nTEXT: {lark(regex)} & /[{one_of}]{{0,{most}}}/'
            state, path = start_matching(self.vocabulary.llg_symbols, grammar), []
            while not state.is_accepting():
                allowed = self.vocabulary.in_order(state)
                if not len(allowed) or not state.consume_token(int(allowed[0])):
                    return None
                path.append(int(allowed[0]))
            return path

        find, enough = functools.cache(find), 1
        while find(enough) is None:
            enough *= 2
            if enough > LONGEST_MATCH:
                return None
        return find(bisect.bisect_left(range(enough), True, lo=enough // 2 + 1,
                                       key=lambda n: find(n) is not None))

    def complete(self, state, text, haste, n_texts, most=math.inf):
        """Search symbols that complete the match; -> symbols, or None.

        state: the matcher of symbols, after text. haste: cost of a byte, in steps of PENALTY; a low
        one takes the first ending, a high one looks for a shorter one. n_texts: texts to extend at
        most. most: bytes of an ending at most.
        """
        vocabulary = self.vocabulary
        if self.choices is not None:
            endings = [vocabulary.write(choice[len(text):]) for choice in self.choices
                       if choice.startswith(text)]
            fewest = min((ids for ids in endings if ids is not None), key=len, default=None)
            return fewest and [symbol for i in fewest for symbol in vocabulary.spell(i)]
        if state.is_accepting():
            return []
        serial = itertools.count()  # the first of equally good texts comes first
        heap = [(0, next(serial), (0, 0, state.compute_bitmask()), [], state)]
        alike = Counter()
        for _ in range(n_texts):
            if not heap:
                return None
            cost, _, (length, turns, mask), path, state = heapq.heappop(heap)
            allowed = vocabulary.in_order(state)
            steps = [([i], vocabulary.penalty[i]) for i in allowed[:MAX_SYMBOLS].tolist()]
            if len(allowed) > MAX_SYMBOLS:
                steps += [(literal, 0) for literal in self.literals
                          if state.validate_tokens(literal) == len(literal)]
            options = []
            for step, penalty in steps:
                after = state.deep_copy()
                if not after.consume_tokens(step):  # beyond llguidance's limits
                    continue
                if after.is_accepting():
                    return path + step
                next_mask = after.compute_bitmask()
                has_turned = next_mask != mask
                n_bytes = length + sum(len(vocabulary.symbols[i]) for i in step)
                kind = n_bytes, turns + has_turned, next_mask
                options.append((penalty + IDLE * (not has_turned), step, kind, after))
            least = min((penalty for penalty, *_ in options), default=0)  # a cost of all options
            byte_cost = haste if len(options) > 1 else haste / 10
            for penalty, step, kind, after in options:
                alike[kind] += 1
                if kind[0] <= most and alike[kind] <= MAX_ALIKE:
                    next_cost = cost + penalty - least + (kind[0] - length) * byte_cost
                    heapq.heappush(heap, (next_cost, next(serial), kind, path + step, after))
        return None


class Matcher:
    """Follow the text of one sample, and keep an ending that fits."""

    def __init__(self, constraint):
        self.constraint, self.vocabulary = constraint, constraint.vocabulary
        self.state = constraint.start.deep_copy()
        self.search_state = constraint.search_start.deep_copy()
        self.text, self.ending = b'', constraint.ending
        self.refused = []  # ids drawn for the next token after which no ending was found

    @property
    def may_end(self):
        """Return whether the text so far matches."""
        return self.search_state.is_accepting()

    def draw(self, logits, remaining, sample):
        """Append a token drawn by sample(logits (1, V)) -> (1, 1), and return it.

        None ends the text: it matches, and the drawn token may not follow. remaining: tokens that
        the text may still have.
        """
        while True:
            allowed = self.allowed(remaining).to(logits.device)
            if self.may_end and not allowed.any():
                return None
            next_id = sample(logits if self.may_end else logits.masked_fill(~allowed, -torch.inf))
            if self.accept(next_id.item(), remaining):
                return next_id
            if self.may_end:
                return None
            if len(self.refused) > MAX_REFUSED:  # the ending too: llguidance has given up
                raise ValueError(f'the {self.constraint.name} is too hard to follow; simplify it')

    def allowed(self, remaining):
        """Return the ids that may be drawn, (vocab_size,) of bool.

        At least one is allowed unless may_end. An id that accept() refuses is no longer allowed.
        """
        mask = may_follow(self.state)[:len(self.vocabulary.tokens)]
        mask[self.refused] = False
        is_last_draw = len(self.refused) >= MAX_REFUSED
        if self.may_end or len(self.ending) < remaining and not is_last_draw:
            return torch.from_numpy(mask)
        ids = self.vocabulary.to_ids(self.ending)
        if len(ids) > remaining:
            raise ValueError(f'{remaining} tokens are fewer than check_length() allows')
        if len(ids) == remaining or is_last_draw:
            drawable = np.flatnonzero(mask).tolist()
            if len(drawable) > MAX_VERIFIED or is_last_draw:
                drawable = []
            n_texts = TEXTS_BEFORE_DRAW // max(1, len(drawable))
            mask[:] = False
            mask[[ids[0], *(i for i in drawable if self.after(i, remaining, n_texts))]] = True
        return torch.from_numpy(mask)

    def accept(self, i, remaining):
        """Append token i, the first of `remaining`; -> False if it is refused."""
        after = self.after(i, remaining, TEXTS_AFTER_DRAW)
        if after is None:
            self.refused += [i] * (i < len(self.vocabulary.tokens))
            return False
        self.search_state, self.ending = after
        if not self.state.consume_token(i):
            raise ValueError(f'token {i} is allowed as bytes only: {self.state.get_error()}')
        self.text, self.refused = self.text + self.vocabulary.tokens[i], []
        return True

    def after(self, i, remaining, n_texts):
        """Return (matcher of symbols, ending) after token i, None if there is none."""
        symbols, state = self.vocabulary.spell(i), self.search_state.deep_copy()
        if (not symbols or state.validate_tokens(symbols) < len(symbols)
                or not state.consume_tokens(symbols)):
            return None
        text = self.text + self.vocabulary.tokens[i]
        # the ending without as many symbols, each rest of it from the shortest, the first ending
        rests = (self.ending[start:] for start in (len(symbols), *range(len(self.ending), -1, -1)))
        for ending in itertools.chain(rests, [self.constraint.ending]):
            if matches_after(state, ending) and self.vocabulary.fits(ending, remaining - 1):
                return state, ending
        # an ending of tokens that are longer on average is not worth the search
        most = (remaining - 1) * min(self.vocabulary.longest, 8)
        for haste in (0.01, 1):
            ending = self.constraint.complete(state, text, haste, n_texts, most)
            if ending is not None and self.vocabulary.fits(ending, remaining - 1):
                return state, ending
        return None
