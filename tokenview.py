"""Tokens on a terminal: what `python tokenizer.py` prints.

    show(name, tokenizer, text)       the text with its tokens in colours, then a line for each: id, bytes, text
    compare(tokenizers, texts)        a table of counts, bytes per token and compression, a row for each text
"""

import os
import sys
import unicodedata

import tokenizer as tokenizers

BACKGROUNDS = [153, 157, 223, 218, 189]  # of the terminal's 256 colours: light, for black letters
COLUMNS_PER_TABLE = 3                    # tokenizers side by side in 80 columns

# One text in several languages, article 1 of the Universal Declaration of Human Rights, so that the counts of tokens
# can be compared from row to row; then code, sums and emoji.
SAMPLES = {
    'English': 'All human beings are born free and equal in dignity and rights. They are endowed with reason '
               'and conscience and should act towards one another in a spirit of brotherhood.',
    'German': 'Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und '
              'Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.',
    'Spanish': 'Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están '
               'de razón y conciencia, deben comportarse fraternalmente los unos con los otros.',
    'Russian': 'Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и '
               'совестью и должны поступать в отношении друг друга в духе братства.',
    'Greek': 'Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι '
             'προικισμένοι με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα '
             'αδελφοσύνης.',
    'Arabic': 'يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم '
              'بعضا بروح الإخاء.',
    'Hindi': 'सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा '
             'की देन प्राप्त है और परस्पर उन्हें भाईचारे के भाव से बर्ताव करना चाहिए।',
    'Chinese': '人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。',
    'Japanese': 'すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理'
                '性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。',
    'Korean': '모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 '
              '양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.',
    'Python': 'def fizzbuzz(n):\n    for i in range(1, n + 1):\n        if i % 15 == 0:\n'
              '            print("FizzBuzz")\n        elif i % 5 == 0:\n            print("Buzz")\n'
              '        else:\n            print(i)\n',
    'C': '#include <stdio.h>\n\nint main(void)\n{\n\tfor (int i = 0; i < 10; i++)\n'
         '\t\tprintf("%d\\n", i * i);\n\treturn 0;\n}\n',
    'sums': '127 + 677 = 804\n1234 + 4321 = 5555\n99999 * 10001 = 1000089999\n3.14159 / 2.71828 = 1.15573\n',
    'emoji': '😀 😃 😄 👍🏽 👩‍👩‍👧‍👦 🇰🇷 🚀✨ ¯\\_(ツ)_/¯',
}


def has_color(stream) -> bool:
    """Whether to print colours: on a terminal, unless the environment says NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get('NO_COLOR')


def visible(token: bytes, line_ends: bool = False) -> str:
    """A token's text; bytes that are no whole character, and control characters, as \\xNN or \\n."""
    text = token.decode('utf-8', 'backslashreplace')
    return ''.join(char if unicodedata.category(char)[0] != 'C' or char == '\u200d' else
                   repr(char)[1:-1] + ('\n' if line_ends and char == '\n' else '') for char in text)


def show(name: str, tokenizer, text: str, color: bool):
    """Print the tokens of text: in colours (without them, each between bars), then one by one."""
    ids = tokenizer.encode(text, 'all')
    tokens = [tokenizer.decode_bytes([i]) for i in ids]
    size = len(tokenizers.to_utf8(text))
    per_token = f', {size / len(ids):.2f} bytes per token' if ids else ''
    print(f'{name}: {len(text):,} characters, {size:,} bytes, {len(ids):,} tokens{per_token}\n')
    if color:
        for i, token in enumerate(tokens):
            background = f'\033[30;48;5;{BACKGROUNDS[i % len(BACKGROUNDS)]}m'
            # the colour ends before a line end: else the terminal paints the rest of the line
            print(background + visible(token, True).replace('\n', f'\033[0m\n{background}') + '\033[0m', end='')
        print('\n')
    else:
        print('|' + '|'.join(visible(token, True) for token in tokens) + '|\n')
    print(f'{"id":>8}  {"bytes":32}  text')
    for i, token in zip(ids, tokens, strict=True):
        print(f'{i:>8}  {token.hex(" "):32}  "{visible(token)}"')


def compare(named: dict, texts: dict[str, str]):
    """Print, for each text and tokenizer: tokens, bytes per token, and bytes of text per byte of a .bin file.

    named: {name: tokenizer}, texts: {name: text}.
    """
    names = list(named)
    width = max(len(row) for row in [*texts, 'all'])
    for first in range(0, len(names), COLUMNS_PER_TABLE):
        group = names[first:first + COLUMNS_PER_TABLE]
        print(f'{"":{width}}  {"":>7}' + ''.join(f' {name[-19:]:>19}' for name in group))
        print(f'{"":{width}}  {"bytes":>7}' + f' {"tokens":>7}{"B/tok":>6}{"compr":>6}' * len(group))
        total = {name: 0 for name in group}
        total_bytes = 0
        for row, text in texts.items():
            size = len(tokenizers.to_utf8(text))
            counts = {}
            for name in group:
                try:
                    counts[name] = len(named[name].encode_array(text))
                except ValueError:  # a char vocabulary without some of the characters
                    counts[name] = None
                total[name] = None if counts[name] is None or total[name] is None else total[name] + counts[name]
            total_bytes += size
            print(f'{row:{width}}  {size:>7,}' + ''.join(cells(named[name], size, counts[name]) for name in group))
        if len(texts) > 1:
            print(f'{"all":{width}}  {total_bytes:>7,}' +
                  ''.join(cells(named[name], total_bytes, total[name]) for name in group))
        print()
    print('B/tok: bytes of text per token. compr: bytes of text per byte of .bin, where\n'
          'an id takes 2 bytes (4 in vocabularies over 65,536). -: it lacks characters.')


def cells(tokenizer, size: int, count: int | None) -> str:
    """One tokenizer's part of a row."""
    if not count:
        return f' {"-":>7}{"-":>6}{"-":>6}'
    on_disk = count * tokenizers.id_dtype(tokenizer.vocab_size).itemsize
    return f' {count:>7,}{size / count:>6.2f}{size / on_disk:>5.2f}x'


if __name__ == '__main__':
    sys.exit('this file is imported; run python tokenizer.py')
