"""
Output that always matches: one of some choices, a regular expression, or a JSON schema.

    constraint = Constraint(tokenizer, regex=r'(yes|no), because .{10,80}')
    constraint.check_length(max_new_tokens)
    matcher = constraint.matcher()  # one for each sample
    for remaining in range(max_new_tokens, 0, -1):
        while not matcher.accept(draw(matcher.allowed(remaining)), remaining):
            ...  # end, if matcher.may_end; else draw again

The package llguidance says which tokens keep a match possible. That is not enough: a model may fill a string until
max_new_tokens cuts it off. So a matcher always knows an ending, a text that completes the match and can be written with
the tokens that remain, and refuses a token after which it knows none. The ending after a token is mostly the rest of
the ending before it. Where it isn't (the token opens a list, say), a best-first search looks for one: it goes on from
the text with the fewest detours from its taste, which prefers what closes to what opens. Of a state of the grammar it
sees only which symbols may follow, so it may miss the shortest ending, or in odd patterns every one; then a constraint
is refused at the start, or a token on the way, but whatever is written matches.
"""

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

# A search goes on from so many texts (0.03 to 0.2 ms each): at the start; after a token that was drawn; and after all
# those that may be drawn together, when no more remain than the known ending has.
TEXTS_AT_START, TEXTS_AFTER_DRAW, TEXTS_BEFORE_DRAW = 2000, 300, 100
MAX_SYMBOLS = 40   # that a search tries after a text
MAX_ALIKE = 2      # texts it goes on from that have the same length and the same symbols to follow
MAX_VERIFIED = 64  # tokens searched after before they are drawn
MAX_REFUSED = 8    # draws for one token, after which only the known ending may come
LONGEST_MATCH = 4096  # characters, of a regular expression

# The taste of a search, by the first byte of a symbol: what ends things, then what goes on, last what begins more.
PENALTY = np.full(256, 6)
for penalty, chars in enumerate((b']}', b'"', b',:', b'0aA', b" !#$%&'()*+-./;<=>?@^_`|~",
                                 b'123456789bcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ')):
    PENALTY[list(chars)] = penalty
IDLE = 3  # added for a symbol after which the same symbols may follow as before


def import_llguidance():
    try:
        import llguidance
    except ImportError:
        raise UserError('choices, regex and json_schema need the package llguidance: '
                         "pip install -c constraints.txt -e '.[constrain]'") from None
    return llguidance


def llg_tokenizer(tokens: list[bytes]):
    """llguidance's view of these tokens (b'': never allowed) and one more, for the end of the text."""
    class Tokens:
        eos_token_id, bos_token_id, special_token_ids = len(tokens), None, [len(tokens)]

        def __call__(self, text):  # asked for once, to see what it takes; the grammars here force no tokens
            return []
    Tokens.tokens = [*tokens, b'<eos>']
    library = import_llguidance()
    return library.LLTokenizer(library.TokenizerWrapper(Tokens()))


def start_matching(tokenizer, grammar: str):
    """llguidance's matcher at the beginning of a text; .is_error() for a bad grammar."""
    # no_forcing: otherwise, where only one text can follow, only one way to write it would be allowed
    header = '%llguidance {"no_forcing": true}\n'
    return import_llguidance().LLMatcher(tokenizer, header + grammar, log_level=0)


def lark(regex: str) -> str:
    return f'/{import_llguidance().regex_to_lark(regex, "d")}/'  # d: \d is 0 to 9


def may_follow(state) -> np.ndarray:
    """One boolean for each of a matcher's tokens, and some more behind them."""
    return np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder='little').view(bool)


class Vocabulary:
    """What a tokenizer can write, and the symbols that a search writes: bytes where each is a token, else tokens."""

    def __init__(self, tokenizer):
        special = set(tokenizer.special_tokens.values())
        self.tokens = [b'' if i in special else token_bytes(tokenizer, i) for i in range(tokenizer.vocab_size)]
        self.id_of = {}
        for i, token in enumerate(self.tokens):
            if token in self.id_of or b'\xff' in token:  # llguidance marks its special tokens with this byte
                self.tokens[i] = b''
            elif token:
                self.id_of[token] = i
        self.longest = max(map(len, self.id_of), default=0)
        self.llg_tokens = llg_tokenizer(self.tokens)
        utf8 = [bytes([byte]) for byte in range(0xf5) if byte not in (0xc0, 0xc1)]  # the bytes that occur in it
        self.has_bytes = all(byte in self.id_of for byte in utf8)
        self.symbols = [bytes([byte]) for byte in range(255)] if self.has_bytes else self.tokens
        self.llg_symbols = llg_tokenizer(self.symbols) if self.has_bytes else self.llg_tokens
        self.penalty = [int(PENALTY[symbol[0]]) if symbol else math.inf for symbol in self.symbols]
        order = sorted(range(len(self.symbols)), key=lambda i: (self.penalty[i], len(self.symbols[i]), self.symbols[i]))
        self.order = np.array(order)  # the symbols, those to be tried first in front

    def spell(self, i: int) -> list[int]:
        """The symbols of a token, [] for one that no text has."""
        token = self.tokens[i] if i < len(self.tokens) else b''
        return list(token) if self.has_bytes else [i] * (token != b'')

    def write(self, text: bytes) -> list[int] | None:
        """The fewest ids that write text; None when none do."""
        fewest = [0] + [math.inf] * len(text)  # tokens up to here,
        last = [b''] * len(fewest)             # the last of which is this
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

    def to_ids(self, symbols: list[int]) -> list[int]:
        return self.write(bytes(symbols)) if self.has_bytes else symbols

    def fits(self, symbols: list[int], tokens: int) -> bool:
        return len(symbols) <= tokens or len(self.to_ids(symbols)) <= tokens

    def cannot_write(self, text: bytes) -> str:
        """The second half of an error message: what of text is in no token."""
        written = b' '.join(self.id_of)
        lacking = [repr(char) for char in sorted(set(text.decode('utf-8'))) if char.encode('utf-8') not in written]
        reason = f'no token has {" ".join(lacking)}' if lacking else 'its tokens do not join to that'
        return f'cannot be written with this tokenizer: {reason}. A byte or BPE tokenizer can write any text'


vocabulary = functools.lru_cache(maxsize=4)(Vocabulary)  # 0.3 s for 50,000 ids


def token_bytes(tokenizer, i: int) -> bytes:
    try:
        return tokenizer.decode_bytes([i])
    except ValueError:  # an id that the vocabulary does not use
        return b''


def parse_schema(schema: dict | str) -> dict:
    """The schema as a dict. ValueError for what the library would pass over in silence, besides what is no schema."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f'json_schema is no JSON ({error}): {schema[:60]!r}') from None
    if not isinstance(schema, dict):
        raise UserError(f'json_schema is {str(schema)[:60]!r}; expected an object such as {{"type": "integer"}}')
    for part in dicts_in(schema):
        if isinstance(part.get('items'), list):
            raise UserError('json_schema: a list of "items" is of an old draft; call it "prefixItems"')
        for bound, others, sign, instead in (
                ('exclusiveMinimum', ('maximum', 'exclusiveMaximum'), 1, '"minimum": 0.001'),
                ('exclusiveMaximum', ('minimum', 'exclusiveMinimum'), -1, '"maximum": -0.001')):
            is_small = any(isinstance(part.get(other), int | float) and sign * part[other] < 1 for other in others)
            if part.get(bound) == 0 and part.get('type') != 'integer' and (is_small or 'multipleOf' in part):
                raise UserError(f'json_schema: "{bound}": 0 would let 0 pass in so small a range; give a bound that '
                                 f'may be reached, such as {instead}')
        least, required = part.get('minProperties', 0), part.get('required', [])
        if isinstance(least, int) and isinstance(required, list) and least > len(required) + 1:
            raise UserError(f'json_schema: "minProperties": {least} is not possible beside {len(required)} required '
                             f'properties, as free keys could be the same; name more in "required"')
    return schema


def dicts_in(value):
    """All schemas in a schema, itself among them, and no data such as a "const"."""
    if isinstance(value, dict):
        yield value
        value = [inner for key, inner in value.items() if key not in ('const', 'enum', 'default', 'examples')]
    for inner in value if isinstance(value, list) else ():
        yield from dicts_in(inner)


class Constraint:
    """What the output must be: exactly one of

    choices: texts, one of which it is. regex: a regular expression that it matches as a whole, in the syntax of Rust's
    regex crate: no look-around, no backreferences; \\d is 0 to 9, \\w and \\s are Unicode's. json_schema: a dict or its
    JSON; the output is JSON without blanks between its parts, an object's keys in the schema's order.

    ValueError when it can't be expressed, nothing matches, or this tokenizer can't write what does.
    """

    def __init__(self, tokenizer, choices=None, regex: str | None = None, json_schema: dict | str | None = None):
        values = {'choices': choices, 'regex': regex, 'json_schema': json_schema}
        given = [name for name, value in values.items() if value is not None]
        if len(given) != 1:
            raise UserError(f'expected one of choices, regex and json_schema, got {" and ".join(given) or "none"}')
        self.name, self.vocabulary = given[0], vocabulary(tokenizer)
        self.choices = None   # the texts, or None
        self.literals = []    # symbols that match a whole "pattern" of a JSON schema
        if choices is not None:
            if isinstance(choices, str) or not choices:
                raise UserError(f"choices is {choices!r}; expected a list of texts to choose from, such as "
                                 f"['yes', 'no']")
            self.choices = [self.check_choice(choice) for choice in choices]
            grammar = 'start: ' + ' | '.join(json.dumps(choice) for choice in choices)
        elif regex is not None:
            grammar = f'start: {lark(regex)}'
        else:
            schema = parse_schema(json_schema)
            patterns = [part['pattern'] for part in dicts_in(schema) if isinstance(part.get('pattern'), str)]
            self.literals = [found for pattern in patterns if (found := self.shortest_match(pattern))]
            grammar = 'start: %json ' + json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})
        value = values[self.name]
        shown = repr((json.dumps(value) if isinstance(value, dict) else str(value))[:60])
        self.start = start_matching(self.vocabulary.llg_tokens, grammar)
        if self.start.is_error():
            message = self.start.get_error()
            reason = re.search(r'^error: (.*)', message, re.MULTILINE) or re.match(
                r'(?:at \d+\(\d+\): )?(?:failed to compile JSON schema: )?(.*)', message)
            raise UserError(f'{self.name}={shown} is not possible: {reason[1]}')
        self.search_start = start_matching(self.vocabulary.llg_symbols, grammar)
        ending = self.shortest_match(regex) if regex is not None else None
        if ending is None:
            endings = [self.complete(self.search_start, b'', haste, TEXTS_AT_START) for haste in (1, 0.01)]
            ending = min((ending for ending in endings if ending is not None), default=None,
                         key=lambda ending: len(self.vocabulary.to_ids(ending)))
        if ending is None:
            if not self.vocabulary.has_bytes:  # bytes may show a text, or raise the error below
                example = bytes(Constraint(ByteTokenizer(), **values).ending)
                raise UserError(f'{self.name}: a text that matches, such as {example.decode("utf-8")!r}, '
                                 + self.vocabulary.cannot_write(example))
            raise UserError(f'{self.name}={shown}: found no text that matches. Either there is none, or '
                             f'it is too long or too hard to find; write it in a simpler way')
        self.ending = ending

    def check_choice(self, choice) -> bytes:
        if not isinstance(choice, str) or not choice:
            raise UserError(f'choices are texts of at least one character, got {choice!r}')
        text = to_utf8(choice)
        if text != choice.encode('utf-8', 'surrogatepass'):
            raise UserError(f'the choice {choice!r} has half a surrogate pair, which is no character')
        if self.vocabulary.write(text) is None:
            raise UserError(f'the choice {choice!r} ' + self.vocabulary.cannot_write(text))
        return text

    def check_length(self, max_new_tokens: int):
        """ValueError when the shortest text that was found takes more tokens."""
        ids = self.vocabulary.to_ids(self.ending)
        if len(ids) > max_new_tokens:
            text = b''.join(self.vocabulary.tokens[i] for i in ids).decode('utf-8')
            text = text if len(text) <= 60 else text[:57] + '...'
            raise UserError(f'max_new_tokens={max_new_tokens} is too few for this {self.name}: the shortest text '
                             f'found, {text!r}, takes {len(ids)}. Give it --max_new_tokens={len(ids)} or more')

    def matcher(self):
        """A Matcher at the beginning of a text. Each sample needs its own."""
        return Matcher(self)

    def shortest_match(self, regex: str) -> list[int] | None:
        """Symbols of a text with the fewest characters that matches a regular expression; None when there is none.

        Exact where a search guesses: in the grammar of matches with at most n characters, every beginning leads to one.
        """
        if self.vocabulary.has_bytes:  # any character takes much longer than these
            chars = {*map(chr, range(128)), *regex}
        else:
            chars = set(b' '.join(self.vocabulary.id_of).decode('utf-8'))
        one_of = ''.join(f'\\x{{{ord(char):x}}}' for char in sorted(chars))

        def find(most):
            grammar = f'start: TEXT\nTEXT: {lark(regex)} & /[{one_of}]{{0,{most}}}/'
            state, path = start_matching(self.vocabulary.llg_symbols, grammar), []
            while not state.is_accepting():
                allowed = self.in_order(state)
                if not len(allowed) or not state.consume_token(int(allowed[0])):
                    return None
                path.append(int(allowed[0]))
            return path

        enough = 1
        while (shortest := find(enough)) is None:
            enough *= 2
            if enough > LONGEST_MATCH:
                return None
        too_few = enough // 2
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if (shorter := find(middle)) is None:
                too_few = middle
            else:
                enough, shortest = middle, shorter
        return shortest

    def in_order(self, state) -> np.ndarray:
        """The symbols that may follow, those to be tried first in front."""
        return self.vocabulary.order[may_follow(state)[self.vocabulary.order]]

    def complete(self, state, text: bytes, haste: float, texts: int, most: float = math.inf) -> list[int] | None:
        """Symbols that complete the match, or None when none were found.

        state: the matcher of symbols, after text. haste: what a byte costs, in steps of PENALTY: with little, the first
        ending that shows is taken; with more, a shorter one, if there is time. texts: how many to go on from at most.
        most: bytes that an ending may have.
        """
        if self.choices is not None:
            endings = [self.vocabulary.write(choice[len(text):]) for choice in self.choices if choice.startswith(text)]
            fewest = min((ids for ids in endings if ids is not None), key=len, default=None)
            return None if fewest is None else [symbol for i in fewest for symbol in self.vocabulary.spell(i)]
        if state.is_accepting():
            return []
        serial = itertools.count()  # of texts as good as each other, the one found first
        heap = [(0, next(serial), (0, 0, state.compute_bitmask()), [], state)]
        alike = Counter()
        for _ in range(texts):
            if not heap:
                return None
            cost, _, (length, turns, mask), path, state = heapq.heappop(heap)
            allowed = self.in_order(state)
            steps = [([symbol], self.vocabulary.penalty[symbol]) for symbol in allowed[:MAX_SYMBOLS].tolist()]
            if len(allowed) > MAX_SYMBOLS:
                steps += [(literal, 0) for literal in self.literals if state.validate_tokens(literal) == len(literal)]
            found = []
            for step, penalty in steps:
                after = state.deep_copy()
                if not after.consume_tokens(step):  # beyond the library's limits
                    continue
                if after.is_accepting():
                    return path + step
                next_mask = after.compute_bitmask()
                turned = next_mask != mask
                grown = length + sum(len(self.vocabulary.symbols[i]) for i in step)
                found.append((penalty + IDLE * (not turned), step, (grown, turns + turned, next_mask), after))
            least = min((penalty for penalty, *_ in found), default=0)  # what can't be avoided is no detour
            for penalty, step, kind, after in found:
                alike[kind] += 1
                if kind[0] <= most and alike[kind] <= MAX_ALIKE:
                    size = (kind[0] - length) * (haste if len(found) > 1 else haste / 10)
                    heapq.heappush(heap, (cost + penalty - least + size, next(serial), kind, path + step, after))
        return None


class Matcher:
    """The text of one sample as it grows. See the top of this file."""

    def __init__(self, constraint):
        self.constraint, self.vocabulary = constraint, constraint.vocabulary
        self.state, self.search_state = constraint.start.deep_copy(), constraint.search_start.deep_copy()
        self.text, self.ending = b'', constraint.ending
        self.refused = []  # ids drawn as the next that lead where no ending was found

    @property
    def may_end(self) -> bool:
        """The text so far matches in full."""
        return self.search_state.is_accepting()

    def allowed(self, remaining: int) -> torch.Tensor:
        """-> (vocab_size,) bool: the ids that may come next, when `remaining` tokens can be written, this one included.

        accept() may refuse one of them, which is then no longer allowed. Unless may_end, one is always left.
        """
        mask = may_follow(self.state)[:len(self.vocabulary.tokens)]
        mask[self.refused] = False
        if self.may_end or len(self.ending) < remaining and len(self.refused) < MAX_REFUSED:
            return torch.from_numpy(mask)
        ids = self.vocabulary.to_ids(self.ending)
        assert len(ids) <= remaining, f'{remaining} tokens cannot complete this match; ask check_length() before'
        if len(ids) == remaining or len(self.refused) >= MAX_REFUSED:
            drawable = np.flatnonzero(mask).tolist()
            if len(drawable) > MAX_VERIFIED or len(self.refused) >= MAX_REFUSED:
                drawable = []
            texts = TEXTS_BEFORE_DRAW // max(1, len(drawable))
            mask[:] = False
            mask[[ids[0], *(i for i in drawable if self.after(i, remaining, texts))]] = True
        return torch.from_numpy(mask)

    def accept(self, i: int, remaining: int) -> bool:
        """Append token i, the first of `remaining`, and say True; or, when it can't be or no ending is found after it,
        leave all as it was and say False."""
        after = self.after(i, remaining, TEXTS_AFTER_DRAW)
        if after is None:
            self.refused += [i] * (i < len(self.vocabulary.tokens))
            return False
        self.search_state, self.ending = after
        taken = self.state.consume_token(i)
        assert taken, f'token {i} is allowed byte by byte and not as a whole: {self.state.get_error()}'
        self.text += self.vocabulary.tokens[i]
        self.refused = []
        return True

    def draw(self, logits: torch.Tensor, remaining: int, sample) -> torch.Tensor | None:
        """
        Append a token drawn by sample(logits (1, V)) -> (1, 1), and return it.

        None: the text ends, since it is complete and the model continues with what may not follow.
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

    def after(self, i: int, remaining: int, texts: int):
        """-> (matcher of symbols, ending) after token i, or None when it can't follow or no ending is found."""
        symbols, state = self.vocabulary.spell(i), self.search_state.deep_copy()
        if not symbols or state.validate_tokens(symbols) < len(symbols) or not state.consume_tokens(symbols):
            return None
        text = self.text + self.vocabulary.tokens[i]
        # the ending without as many symbols, or any rest of it, the shortest first, or the one of the beginning
        rests = (self.ending[start:] for start in (len(symbols), *range(len(self.ending), -1, -1)))
        for ending in itertools.chain(rests, [self.constraint.ending]):
            if ends(state, ending) and self.vocabulary.fits(ending, remaining - 1):
                return state, ending
        for haste in (0.01, 1):
            # an ending of tokens that are longer on average is not worth the search
            most = (remaining - 1) * min(self.vocabulary.longest, 8)
            ending = self.constraint.complete(state, text, haste, texts, most)
            if ending is not None and self.vocabulary.fits(ending, remaining - 1):
                return state, ending
        return None


def ends(state, symbols: list[int]) -> bool:
    """Whether the match is complete after these symbols."""
    if state.validate_tokens(symbols) < len(symbols):
        return False
    state = state.deep_copy()
    return state.consume_tokens(symbols) and state.is_accepting()
