"""
Find added tokens in text, as Hugging Face's tokenizers does.

A tokenizer.json may add tokens to a vocabulary: special ones, and runs of spaces or words that are
cut out of any text (GPT-NeoX, Pythia, Phi-2). They may nest and overlap: the leftmost is taken,
then the longest.
"""

import itertools

import regex

from configurator import UserError
from tokenizer.base import check_specials, shown
from tokenizer.patterns import AS_IN_UNICODE_16, normalize, to_utf8

# normalized: looked for in normalized text, after the other tokens have been cut out
# lstrip, rstrip: takes the white space before it, behind it
# single_word: not inside a word
RULES = ('normalized', 'lstrip', 'rstrip', 'single_word')
WORD = regex.compile(r'[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]')  # \w in Rust
BLANKS = regex.compile(r'\p{White_Space}*')


class AddedTokens:
    """Cut text at added tokens.

    tokens: {text: id} of those in any text. rules: {text: names in RULES}, also of special tokens.
    form: the normal form of text, 'NFC' or None.
    """

    def __init__(self, tokens: dict[str, int], rules: dict[str, list[str]], form: str | None):
        check_specials(tokens)
        for token, names in rules.items():
            if not isinstance(names, list) or any(name not in RULES for name in names):
                raise UserError(f'the rules of the added token {shown(token)} are {shown(names)}; '
                                f'expected a list of {", ".join(RULES)}')
        self.tokens, self.rules, self.form = tokens, rules, form
        self.searchers = {}  # by the special tokens that are looked for too

    @property
    def can_cut(self) -> bool:
        """Return whether text may be cut wherever no token stands.

        Neighbours matter to some rules, and normalized text may have tokens that the text has not.
        """
        names = set(itertools.chain.from_iterable(self.rules.values()))
        late = [token for token, rules in self.rules.items() if 'normalized' in rules]
        return names <= {'normalized'} and (self.form is None or not ''.join(late).strip(' \n\t'))

    def searcher(self, allowed: tuple[str, ...], is_late: bool):
        """Return (regular expression, {match: token}) of tokens, normalized or not."""
        if (allowed, is_late) not in self.searchers:
            self.searchers[allowed, is_late] = self.make_searcher(allowed, is_late)
        return self.searchers[allowed, is_late]

    def make_searcher(self, allowed: tuple[str, ...], is_late: bool):
        tokens = [token for token in {**self.tokens, **dict.fromkeys(allowed)}
                  if ('normalized' in self.rules.get(token, ())) == is_late]
        named = {normalize(token, self.form) if is_late else token: token for token in tokens}
        longest_first = sorted(filter(None, named), key=len, reverse=True)
        return regex.compile('|'.join(map(regex.escape, longest_first)) or '(?!)'), named

    def split(self, text: str, special_tokens: dict[str, int]):
        """Yield (text, None) and (token, id). Text is in the normal form then.

        special_tokens: {text: id} of those that are looked for too.
        """
        ids, allowed = {**self.tokens, **special_tokens}, tuple(special_tokens)
        text = to_utf8(text).decode('utf-8')
        for part, is_token in self.cut(text, *self.searcher(allowed, False)):
            if is_token:
                yield part, ids[part]
                continue
            late = self.cut(normalize(part, self.form), *self.searcher(allowed, True))
            for late_part, is_late_token in late:
                yield late_part, ids[late_part] if is_late_token else None

    def cut(self, text: str, pattern, named: dict[str, str]):
        """Yield (part, whether it is a token), as tokenizers does."""
        done = 0
        for match in pattern.finditer(text):
            token, (start, end) = named[match[0]], match.span()
            rules = self.rules.get(token, ())
            if 'single_word' in rules and (is_word(text[start - 1:start] if start else '')
                                           or is_word(text[end:end + 1])):
                continue
            if 'lstrip' in rules:
                while start > done and BLANKS.fullmatch(text[start - 1]):
                    start -= 1
                start = max(start, done)
            if 'rstrip' in rules:
                end = BLANKS.match(text, end).end()
            if start >= end:  # its spaces belong to the token before; tokenizers may panic here
                done = max(done, end)
                continue
            if done < start:
                yield text[done:start], False
            yield token, True
            done = end  # which may be before the spaces that the token before took
        if done < len(text):
            yield text[done:], False


def is_word(char: str) -> bool:
    """Return whether a character, or none, belongs to a word."""
    return bool(WORD.match(char.translate(AS_IN_UNICODE_16)))
