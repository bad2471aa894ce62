"""
Show the tokens of a text, compare, train and export tokenizers, make a page.

    python -m tokenizer --text='Hello, 안녕!' --tokenizer=gpt2
    python -m tokenizer --compare=gpt2,cl100k_base,byte
    python -m tokenizer train --input=FILE --vocab_size=8192 --out=my.json
    python -m tokenizer export --tokenizer=my.json --out=tokenizer.json
    python -m tokenizer page --out=tokens.html --tokenizer=gpt2 --tokenizer=my.json
"""

import os
import shlex
import sys
import time
import unicodedata

import tokenizer as tokenizers
from configurator import UserError, nearest
from data.documents import list_files, read_documents, read_text
from data.encode import make_parser, names_of, positive, run
from flatgpt import output
from tokenizer import (
    BPETokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
    formats,
    page,
)
from tokenizer.base import ENDOFTEXT, id_dtype
from tokenizer.patterns import to_utf8

BACKGROUNDS = [153, 157, 223, 218, 189]  # light ones of a terminal's 256 colours, for black text
COLUMNS_PER_TABLE = 3                    # tokenizers side by side in 80 columns
TOKENIZER_HELP = 'byte, gpt2, cl100k_base, o200k_base, or a file'

# Article 1 of the Universal Declaration of Human Rights in several languages, so that counts can be
# compared; then code, sums and emoji.
SAMPLES = {
    'English': ('All human beings are born free and equal in dignity and rights. They are '
        'endowed with reason and conscience and should act towards one another in a spirit '
        'of brotherhood.'),
    'German': ('Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit '
        'Vernunft und Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.'),
    'Spanish': ('Todos los seres humanos nacen libres e iguales en dignidad y derechos y, '
        'dotados como están de razón y conciencia, deben comportarse fraternalmente los '
        'unos con los otros.'),
    'Russian': ('Все люди рождаются свободными и равными в своем достоинстве и правах. Они '
        'наделены разумом и совестью и должны поступать в отношении друг друга в духе братства.'),
    'Greek': ('Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα '
        'δικαιώματα. Είναι προικισμένοι με λογική και συνείδηση, και οφείλουν να '
        'συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.'),
    'Arabic': ('يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا '
        'وعليهم أن يعامل بعضهم بعضا بروح الإخاء.'),
    'Hindi': ('सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता '
        'प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है और परस्पर उन्हें भाईचारे '
        'के भाव से बर्ताव करना चाहिए।'),
    'Chinese': ('人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精'
        '神相对待。'),
    'Japanese': ('すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等で'
        'ある。人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなけれ'
        'ばならない。'),
    'Korean': ('모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 '
        '천부적으로 이성과 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.'),
    'Python': ('def fizzbuzz(n):\n    for i in range(1, n + 1):\n        if i % 15 == 0:\n'
        '            print("FizzBuzz")\n        elif i % 5 == 0:\n'
        '            print("Buzz")\n        else:\n            print(i)\n'),
    'C': ('#include <stdio.h>\n\nint main(void)\n{\n\tfor (int i = 0; i < 10; i++)\n'
        '\t\tprintf("%d\\n", i * i);\n\treturn 0;\n}\n'),
    'sums': ('127 + 677 = 804\n1234 + 4321 = 5555\n99999 * 10001 = 1000089999\n'
        '3.14159 / 2.71828 = 1.15573\n'),
    'emoji': '😀 😃 😄 👍🏽 👩\u200d👩\u200d👧\u200d👦 🇰🇷 🚀✨ ¯\\_(ツ)_/¯',
}


def visible(token: bytes, line_ends: bool = False) -> str:
    """Write a token as text; parts of characters and control characters as \\xNN or \\n."""
    text = token.decode('utf-8', 'backslashreplace')
    return ''.join(char if unicodedata.category(char)[0] != 'C' or char == '\u200d' else
                   repr(char)[1:-1] + ('\n' if line_ends and char == '\n' else '') for char in text)


def show(name: str, tokenizer, text: str, color: bool):
    """Print text cut into tokens, then a line per token: id, bytes, text."""
    ids = tokenizer.encode(text, 'all')
    tokens = [tokenizer.decode_bytes([i]) for i in ids]
    size = len(to_utf8(text))
    per_token = f', {size / len(ids):.2f} bytes per token' if ids else ''
    print(f'{name}: {len(text):,} characters, {size:,} bytes, {len(ids):,} tokens{per_token}\n')
    if color:
        for i, token in enumerate(tokens):
            background = f'\033[30;48;5;{BACKGROUNDS[i % len(BACKGROUNDS)]}m'
            # the colour ends before a line end: else the terminal paints the rest of the line
            shown = visible(token, True).replace('\n', f'\033[0m\n{background}')
            print(f'{background}{shown}\033[0m', end='')
        print('\n')
    else:
        print('|' + '|'.join(visible(token, True) for token in tokens) + '|\n')
    print(f'{"id":>8}  {"bytes":32}  text')
    for i, token in zip(ids, tokens, strict=True):
        print(f'{i:>8}  {token.hex(" "):32}  "{visible(token)}"')


def count_tokens(tokenizer, text: str) -> int | None:
    """Count the ids of text; None where a char vocabulary lacks characters."""
    try:
        return len(tokenizer.encode_array(text))
    except UserError:
        return None


def compare(named: dict, texts: dict[str, str]):
    """Print a table: for each text and tokenizer tokens, bytes per token, compression.

    named: {name: tokenizer}, texts: {name: text}. Compression is bytes of text per byte of .bin.
    """
    width = max(len(row) for row in [*texts, 'all'])
    sizes = {row: len(to_utf8(text)) for row, text in texts.items()}
    for first in range(0, len(named), COLUMNS_PER_TABLE):
        group = list(named)[first:first + COLUMNS_PER_TABLE]
        counts = {row: [count_tokens(named[name], text) for name in group]
                  for row, text in texts.items()}
        if len(texts) > 1:
            columns = zip(*counts.values(), strict=True)
            counts['all'] = [None if None in column else sum(column) for column in columns]
        print(f'{"":{width}} {"":>9}' + ''.join(f' {name[-19:]:>19}' for name in group))
        print(f'{"":{width}} {"bytes":>9}' + f' {"tokens":>7}{"B/tok":>6}{"compr":>6}' * len(group))
        for row, row_counts in counts.items():
            size = sizes.get(row, sum(sizes.values()))
            print(f'{row:{width}} {size:>9,}' + ''.join(
                cells(named[name], size, count)
                for name, count in zip(group, row_counts, strict=True)))
        print()
    print('B/tok: bytes of text per token. compr: bytes of text per byte of .bin, where\n'
          'an id takes 2 bytes (4 in vocabularies over 65,536). -: it lacks characters.')


def cells(tokenizer, size: int, count: int | None) -> str:
    """Write the cells of one tokenizer in a row."""
    if not count:
        return f' {"-":>7}{"-":>6}{"-":>6}'
    on_disk = count * id_dtype(tokenizer.vocab_size).itemsize
    return f' {count:>7,}{size / count:>6.2f}{size / on_disk:>5.2f}x'


def main():
    """Run the command that the arguments name."""
    arguments = sys.argv[1:]
    commands = {'train': main_train, 'export': main_export, 'page': main_page}
    if not arguments or arguments[0].startswith('-'):
        return main_view(arguments)
    if arguments[0] not in commands:
        raise UserError(f'unknown command {arguments[0]!r}; expected train, export, page, or '
                        f'options{nearest(arguments[0], commands)}. See python -m tokenizer --help')
    commands[arguments[0]](arguments[1:])


def main_view(arguments):
    """Show the tokens of a text, or compare tokenizers."""
    output.protect()  # a filter, which ends with its reader
    parser = make_parser('See the tokens of a text, or compare tokenizers. Commands: train, '
                         'export, page\n(python -m tokenizer train --help).',
                         'python -m tokenizer [--text=...] [--tokenizer=...]')
    parser.add_argument('--text', help='the text')
    parser.add_argument('--input', help='or a text file')
    parser.add_argument('--tokenizer', default='gpt2', help=f'{TOKENIZER_HELP} (gpt2)')
    parser.add_argument('--compare', type=names_of,
                        help='several, with commas: a table of counts; without a text, of samples '
                             'in several languages and code')
    parser.add_argument('--color', choices=['auto', 'always', 'never'], default='auto',
                        help='(auto)')
    args = parser.parse_args(arguments)
    if args.text is not None and args.input:
        raise UserError('got both --text and --input; expected one of them')
    text = ''.join(read_text(args.input)) if args.input else args.text
    if args.compare:
        named = {name: tokenizers.load(name) for name in args.compare}
        compare(named, {os.path.basename(args.input or 'text')[:16]: text} if text else SAMPLES)
    elif text is None:
        parser.print_help()
    else:
        # NO_COLOR: no-color.org
        on_terminal = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
        color = on_terminal if args.color == 'auto' else args.color == 'always'
        show(args.tokenizer, tokenizers.load(args.tokenizer), text, color)


def check_folder(path):
    """Raise UserError when the folder to write path to does not exist."""
    folder = os.path.dirname(path) or '.'
    if not os.path.isdir(folder):
        raise UserError(f'there is no folder {folder} to write {path} to: mkdir -p {folder}')


def check_file(path, example: str):
    """Raise UserError when path is a folder, or in none."""
    check_folder(path)
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; expected a file to write, such as '
                        f'--out={path}/{example}')


def main_train(arguments):
    """Train a tokenizer and save it."""
    parser = make_parser('Train a tokenizer on text: a file, a folder, .jsonl, .csv or .parquet.',
                        'python -m tokenizer train --input=FILE --vocab_size=N [--out=FILE]')
    parser.add_argument('--input', required=True,
                        help='a text, a folder, or a .jsonl, .json, .csv, .tsv, .parquet file')
    parser.add_argument('--kind', choices=['bpe', 'sentencepiece', 'word', 'char'],
                        default='bpe', help='(bpe)')
    parser.add_argument('--vocab_size', type=positive,
                        help='number of ids, special tokens included (not for char)')
    parser.add_argument('--pattern', help='bpe: how text is cut before merging: gpt2, gpt4, '
                                          'o200k, none, or a regular expression (gpt4)')
    parser.add_argument('--special_tokens', type=names_of, help=f'bpe, sentencepiece: with '
                                                                   f'commas ({ENDOFTEXT})')
    parser.add_argument('--text_key', default='text',
                        help='field of the rows that holds the text (text)')
    parser.add_argument('--num_proc', type=positive, help='processes (one per core)')
    parser.add_argument('--out', default='tokenizer.json',
                        help='file to write; sentencepiece: also NAME.model (tokenizer.json)')
    args = parser.parse_args(arguments)
    if args.kind == 'char' and args.vocab_size is not None:
        raise UserError('--vocab_size is for bpe and word; a char vocabulary has every character '
                        'of the text')
    for option, kinds in (('pattern', ['bpe']), ('special_tokens', ['bpe', 'sentencepiece'])):
        if args.kind not in kinds and getattr(args, option) is not None:
            raise UserError(f'--{option} is for {" and ".join(kinds)}; a {args.kind} vocabulary '
                            f'has none to choose')
    if args.out.endswith('.model') and args.kind != 'sentencepiece':
        raise UserError(f'--out={args.out}: a .model is a SentencePiece file; expected '
                        f'--kind=sentencepiece, or --out=NAME.json')
    if args.kind != 'char' and args.vocab_size is None:
        raise UserError(f'--kind={args.kind} needs --vocab_size=N, such as --vocab_size=8192')
    check_file(args.out, 'tokenizer.json')

    started = time.time()
    list_files(args.input, args.text_key)  # prints what is left out
    texts = read_documents(args.input, args.text_key)
    if args.kind == 'char':
        trained = CharTokenizer.from_text(texts)
    elif args.kind == 'word':
        trained = WordTokenizer.train(texts, args.vocab_size, args.num_proc)
    else:
        special_tokens = [ENDOFTEXT] if args.special_tokens is None else list(args.special_tokens)
        pattern = None if args.pattern == 'none' else args.pattern or 'gpt4'
        trained = (BPETokenizer.train(texts, args.vocab_size, pattern, special_tokens,
                                      args.num_proc) if args.kind == 'bpe' else
                   SentencePieceTokenizer.train(texts, args.vocab_size, special_tokens,
                                                args.num_proc))
    if args.out.endswith('.model'):
        formats.write_model(trained.to_dict(), args.out)
    else:
        trained.save(args.out)
    print(f'wrote {args.out}: {args.kind}, {trained.vocab_size:,} ids, in '
          f'{time.time() - started:.1f} s')
    out = shlex.quote(args.out)
    print(f"next:  python -m tokenizer --text='...' --tokenizer={out}\n"
          f'       python -m tokenizer --compare=gpt2,{out}\n'
          f'       python data/text/prepare.py --tokenizer={out} \\\n'
          f'           --input={shlex.quote(args.input)}')


def main_export(arguments):
    """Write a tokenizer in another program's format."""
    parser = make_parser('Write a tokenizer in another format: --out=NAME.tiktoken for tiktoken,\n'
                        'tokenizer.json or a folder for Hugging Face, NAME.model for '
                        'SentencePiece,\nanother .json for this program.',
                        'python -m tokenizer export --tokenizer=... --out=...')
    parser.add_argument('--tokenizer', required=True, help=TOKENIZER_HELP)
    parser.add_argument('--out', required=True,
                        help='NAME.tiktoken, tokenizer.json, FOLDER, NAME.model, or NAME.json')
    args = parser.parse_args(arguments)
    check_folder(args.out)
    exported = tokenizers.load(args.tokenizer)
    exported = exported.bpe if exported.kind == 'tiktoken' else exported
    to_folder = os.path.isdir(args.out) or not os.path.splitext(args.out)[1]
    to_tiktoken = args.out.endswith('.tiktoken')
    to_json = os.path.basename(args.out) == 'tokenizer.json'
    if exported.kind == 'sentencepiece' and to_tiktoken:
        raise UserError(f'{args.tokenizer} joins characters, and the format of tiktoken holds '
                        f'joins of bytes only; expected --out=tokenizer.json or --out=NAME.model')
    is_portable = exported.kind in ('bpe', 'sentencepiece')
    if (to_folder or to_tiktoken or to_json) and not is_portable:
        raise UserError(f'{args.tokenizer} is a {exported.kind} tokenizer; the formats of tiktoken '
                        f'and Hugging Face here hold byte pair encoding only. Expected '
                        f'--out=NAME.json, which this program reads')
    if args.out.endswith('.model'):
        formats.write_model(exported.to_dict(), args.out)
        print(f"wrote {args.out}: sentencepiece.SentencePieceProcessor(model_file='{args.out}')")
    elif to_tiktoken:
        formats.write_tiktoken(exported.to_dict(), args.out)
        print(f'wrote {args.out}. It has no pattern and no special tokens; for tiktoken:\n'
              f"    import tiktoken, tiktoken.load\n"
              f"    tiktoken.Encoding('mine', pat_str={exported.pattern!r},\n"
              f"        mergeable_ranks=tiktoken.load.load_tiktoken_bpe({args.out!r}),\n"
              f'        special_tokens={exported.special_tokens})')
    elif to_folder:
        formats.write_hf_folder(exported.to_dict(), args.out)
        print(f"wrote {args.out}: transformers.AutoTokenizer.from_pretrained('{args.out}')")
    elif to_json:
        formats.write_tokenizer_json(exported.to_dict(), args.out)
        print(f"wrote {args.out}: tokenizers.Tokenizer.from_file('{args.out}')")
    else:
        exported.save(args.out)
        print(f'wrote {args.out}: --tokenizer={args.out}')


def main_page(arguments):
    """Write a page that shows the tokens of what is typed."""
    parser = make_parser('Write one HTML page, which needs no network: what is typed there is '
                        'shown as\ntokens of up to three vocabularies, with ids, bytes and merges.',
                        'python -m tokenizer page --out=tokens.html --tokenizer=gpt2')
    parser.add_argument('--tokenizer', action='append', required=True,
                        help=f'{TOKENIZER_HELP}; up to three times')
    parser.add_argument('--out', default='tokens.html', help='file to write (tokens.html)')
    args = parser.parse_args(arguments)
    check_file(args.out, 'tokens.html')
    page.write_page({name: tokenizers.load(name) for name in args.tokenizer}, args.out)
    print(f'wrote {args.out} ({os.path.getsize(args.out) / 1e6:.1f} MB): open it in a browser')


if __name__ == '__main__':
    run(main)
