r"""Find the final answer in the text of a model: a number, or the letter of a choice.

    number_in('She makes 9 * 2 = 18 dollars. The answer is $18.')    # '18'
    letter_in('Iron rusts, so the answer is **(B)**.')               # 'B'
    is_formatted('So it is \\boxed{18}.', 'boxed')                   # True

The last mark counts: <answer>18</answer>, \boxed{18}, #### 18, or "the answer is 18". Without a
mark the last sentence with a number counts, and a letter that begins the text. A text that names
several answers has none, so a list of all choices is not right. What stands between <think> and
</think> does not count.
"""

import re
from fractions import Fraction

BOXED = r'\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}'  # braces nested twice
FORMS = {'answer': r'<answer>(?:(?!<answer>).)*?</answer>', 'boxed': BOXED}

MARK = re.compile(rf'''
    <answer>(?P<tag>.*?)</answer>
  | {BOXED.replace('((', '(?P<boxed>(', 1)}
  | [#]{{4}}(?P<line>[^\n]*)
  | (?:\b(?:answer|option|choice)\b[^.:=!?\n]{{0,60}}?(?:\b(?:is|was|be)\b|[:=])
     | \b(?:no|wait|sorry|actually|correction)\b\W{{1,3}}(?:it|that)(?:['’]s|\ is|\ was)\b)
    (?=(?P<sentence>[\s*_:]*(?:[^\n]|\n(?!\s*\n)){{0,2000}}))''', re.X | re.S | re.I)

# Marks --------------------------------------------------------------------------------------------

def is_formatted(text, form):
    """Return whether a text has exactly one answer in a form of FORMS, at its end.

    At most ten characters may follow, such as '$.'.
    """
    places = list(re.finditer(FORMS[form], text, re.S))
    return len(places) == 1 and len(text.rstrip()) - places[0].end() <= 10


def marked(text):
    """Return [(kind of mark, text behind it), ...], without what the model thought."""
    text = text.rpartition('</think>')[2].partition('<think>')[0]
    return text, [(match.lastgroup, match[match.lastgroup]) for match in MARK.finditer(text)]


# Numbers ------------------------------------------------------------------------------------------

DIGITS = r'(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?|\.\d+'
NUMBER = re.compile(rf'(?<![\w.^])(-?)[$€£]?(-?)({DIGITS})(?:/({DIGITS}))?'
                    r'(?![\d/]|\.\d|[eE][-+]?\d|(?:st|nd|rd|th)\b)')
DENIED = re.compile(r"(?:\bnot|n['’]t|\bnever|\brather\ than|\binstead\ of)\s+(?:be\s+|just\s+)?"
                    r'[-$€£]*[\d.,]*\d(?:,?\s+(?:n?or|and)\s+[-$€£]*[\d.,]*\d)*')
# a number may be followed by its unit and circumstances, and these may hold other numbers
CIRCUMSTANCES = re.compile(r'[^\d=+*/×^-]*?(?:\(|\b(?:because|since|as|for|in|per|after|from|of|on|'
                           r'at|with|by)\b)')
LATEX = [(r'\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}', r'\1/\2'), (r'\\(?:times|cdot)\b', '×'),
         (r'\{,\}|\\[,!;]|[\u2009\u202f\xa0](?=\d{3})', ''), (r'\\([$%])', r'\1'),
         (r'\^?\\[a-zA-Z]+|[{}]|</?answer>', ''), ('[−‒]', '-'), (r'\*\*|__', '')]


def number_in(text):
    """Return a text's final number as plain() writes it, or None."""
    text, marks = marked(text)
    for kind, content in reversed(marks):
        content = cleaned(content)
        if kind != 'sentence':
            return number_of(content)
        content, start = sentences(content)[0], r"[\s:\"'(\[~≈]*(?:[-$€£.]*\d|not\b|either\b)"
        if re.match(start, content):
            return number_of(content)
    with_numbers = [part for part in sentences(cleaned(text)) if NUMBER.search(part)]
    return number_of(with_numbers[-1]) if with_numbers else None


def cleaned(text):
    """Return a text without LaTeX's commands, bold type and typographic signs."""
    for pattern, plain_text in LATEX:
        text = re.sub(pattern, plain_text, text)
    return text


def sentences(text):
    """Split a text into sentences, at least one."""
    return [part for part in re.split(r'(?<=[.!?])\s+|\n+', text.strip()) if part] or ['']


def number_of(sentence):
    """Return the one number that a sentence gives as its result, or None.

    That is its only number, the only one behind its last '=', or one that begins it and is followed
    by nothing but circumstances: '18 dollars for 2 days', but not '16 or 18'.
    """
    sentence = DENIED.sub('', sentence)
    for part in (sentence.rpartition('=')[2], sentence):
        matches = list(NUMBER.finditer(part))
        values = {plain(match) for match in matches}
        if len(values) == 1:
            return values.pop()
    if not matches or re.search(r'[\w=]', sentence[: matches[0].start()]):
        return None
    between = sentence[matches[0].end() : matches[1].start()]
    is_alone = CIRCUMSTANCES.match(between) and not re.search(r'\b(?:or|and)\b', sentence)
    return plain(matches[0]) if is_alone else None


def plain(match):
    """Normalize a number: '1,080' -> '1080', '$18.00' -> '18', '2/4' -> '0.5'."""
    before, behind, digits, divisor = match.groups()
    sign = '-' if bool(before) != bool(behind) else ''
    if divisor:
        digits, divisor = (part.replace(',', '') for part in (digits, divisor))
        if len(digits + divisor) > 100 or not float(divisor):
            return f'{sign}{digits}/{divisor}'
        value = Fraction(digits) / Fraction(divisor)
        if 10**20 % value.denominator:
            return f'{sign}{value}'
        digits = f'{value.numerator * 10**20 // value.denominator:021}'
        digits = f'{digits[:-20]}.{digits[-20:]}'
    whole, _, decimals = digits.replace(',', '').partition('.')
    whole, decimals = whole.lstrip('0') or '0', decimals.rstrip('0')
    return f'{sign * ((whole, decimals) != ("0", ""))}{whole}{"." * bool(decimals)}{decimals}'


# Letters ------------------------------------------------------------------------------------------

LETTERS = 'ABCDEFGHIJ'  # names of the choices
BRACKETED, BARE = r'[(\[]\s*([A-Ja-j])\s*[)\]]', r'([A-J])(?![\w+’\'-])'
LETTER = re.compile(rf'(?<![\w.’\'-])(?:{BRACKETED}|{BARE})')
LISTED = re.compile(r'[.,;:)]\s+\S|\s*[-–=:]\s')  # follows a letter in a list of choices
LINE = re.compile(r'\n\W*$')
WORD = re.compile(r'\s+(?!or\b|and\b|is\b)\w')  # follows the article A and the pronoun I
CHOSEN = re.compile(rf'{BRACKETED}|\b[B-HJ]\W*$|'
                    r'\b[A-J]\W?\s+is\s+(?:the\s+)?(?:correct|right|best)')
JOINED = re.compile(r'\W*(?:(?:or|and|nor)\b\W*)?')  # between two letters that are both given
DENIED_LETTER = re.compile(rf"(?:\bnot|n['’]t|\bnever|\brather than|\binstead of)\s+(?:be\s+)?"
                           rf'(?:{BRACKETED}|{BARE})(?:,?\s+(?:n?or|and)\s+(?:{BRACKETED}|{BARE}))*')


def letter_in(text):
    """Return the letter of the choice that a text names, or None."""
    text, marks = marked(text)
    for kind, content in reversed(marks):
        letter = letter_of(content)
        if letter or kind != 'sentence' or LETTER.search(bare(content)):
            return letter
    if re.match(r'\W*[A-J](?:\s*$|[.):\],;\n]|\s+[-–=]\s|\s+(?:is|because|since)\b)', bare(text)):
        return letter_of(text)
    last = sentences(text)[-1]
    return letter_of(last) if CHOSEN.search(bare(last)) else None


def bare(text):
    """Return a text with bold letters in brackets, and without other marks."""
    text = re.sub(r'\\[a-zA-Z]+\s*\{\s*\(?([A-Ja-j])\)?[.:]?\s*\}', r'(\1)', text)
    text = re.sub(r'(?<!\w)[*_`$]{1,3}\(?([A-J])\)?[.:]?[*_`$]{1,3}(?!\w)', r'(\1)', text)
    return re.sub(r'[*_`$]|</?answer>', '', text)


def letter_of(content):
    """Return the one letter that a text gives as its choice, or None.

    That is its only letter, or one that begins it where no other is listed: 'B, since C is soft',
    but not 'B or C', and not 'A. air B. iron'.
    """
    content = DENIED_LETTER.sub('', bare(content)).strip()
    if re.fullmatch('[a-j]', content):
        return content.upper()
    items = [(match, (match[1] or match[2]).upper()) for match in LETTER.finditer(content)]
    first = next((match for match, _ in items if re.fullmatch(r'\W*', content[: match.start()])),
                 None)
    items = [(match, letter) for match, letter in items if match is first or match[1]
             or letter not in 'AI' or not WORD.match(content, match.end())]
    letters = {letter for _, letter in items}
    if len(letters) < 2:
        return letters.pop() if letters else None
    listed = {letter for match, letter in items if match[1] or LISTED.match(content, match.end())
              or LINE.search(content, 0, match.start())}
    if not first or listed - {items[0][1]}:
        return None
    is_joined = JOINED.fullmatch(content, first.end(), items[1][0].start())
    is_apart = re.match(r'\s*[^\w\s]|\s+(?:is|because|since|as)\b', content[first.end() :])
    return items[0][1] if is_apart and not is_joined else None
