"""
Set a script's page of plain assignments by config files and arguments.

    # train.py
    batch_size: Count = 12  # sequences per micro-batch
    optimizer: Literal['adamw', 'muon'] = 'adamw'
    compile: bool | Literal['auto'] = 'auto'
    config = override(globals())

    $ python train.py config/quickstart.py --batch_size=32
    $ python train.py --compile        # the same as --compile=True
    $ python train.py --help           # prints the page

Overrides apply in the order given, so the last one wins. A config file is Python made of plain
assignments. It can read the settings so far, so `lr_decay_iters = max_iters` works. It is the
user's own program and runs as one. A name that is not on the page is refused, and so is a value
outside the rule of its setting: the annotation, or else the type of the default. A text that
begins with ~/ is a path in the home folder.
"""

import ast
import difflib
import math
import os
import re
import sys
import textwrap
import tokenize
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args, get_origin


class UserError(ValueError):
    """Report a user's mistake. Scripts print its message alone, without a traceback."""


@dataclass(frozen=True)
class Range:
    """Bound the numbers that a setting may take; None: no bound on that side."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, x):
        return (-math.inf < x < math.inf and (self.least is None or x >= self.least)
                and (self.above is None or x > self.above)
                and (self.most is None or x <= self.most)
                and (self.below is None or x < self.below))

    def __str__(self):
        if self == Range(least=self.least):
            return f'{self.least} or more'
        bounds = (('at least', self.least), ('above', self.above), ('at most', self.most),
                  ('below', self.below))
        return ' and '.join(f'{word} {bound}' for word, bound in bounds if bound is not None)


# rules of settings, beside plain types, Literal and unions of them
Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, below=1)]  # dropout, a momentum
Share = Annotated[float, Range(above=0, most=1)]  # a part of something that is not empty
Probability = Annotated[float, Range(least=0, most=1)]
Seed = Annotated[int, Range(least=0, below=2**63)]
TEXTS = ('start', 'sample_prompt', 'stop', 'regex', 'vote', 'choices')  # a ~/ in them is no folder


class Settings(dict):
    """Hold settings by name. `given`: the names that a file or an argument has set."""

    def __init__(self, values, given):
        super().__init__(values)
        self.given = given


def override(settings, argv=None):
    """Apply `argv` (default: the command line) to a script's settings.

    settings: the script's globals(), updated in place. The page is read from the script's source:
    every top-level assignment to a public name above the call of override(globals()).
    -> Settings of plain values. Raises SystemExit naming the setting, its value and the rule.
    Installs explain_errors() as sys.excepthook.
    """
    sys.excepthook = explain_errors
    argv = sys.argv[1:] if argv is None else argv
    with tokenize.open(settings['__file__']) as f:
        source = f.read()
    page = read_page(source)
    if '--help' in argv or '-h' in argv:
        print(fit(ast.get_docstring(ast.parse(source))), 'Settings, each set by --key=value:',
              page_text(source, page), sep='\n\n')
        raise SystemExit(0)
    rules = {key: rule_of(node, settings) for key, node in page.items()}
    given = set()
    for argument in argv:
        key, equals, text = argument.removeprefix('--').partition('=')
        if argument.startswith('--') and equals:
            changes = {key: parse(text, kinds_of(rules[key])) if key in page else text}
        elif argument.startswith('--') and bool in kinds_of(rules.get(key)):
            changes = {key: True}
        elif argument.startswith('-'):
            key = argument.lstrip('-')
            example = f'--{key}={settings[key]}' if key in page else '--key=value'
            raise SystemExit(f'{argument}: expected {example} or the path of a config file. '
                             f'All settings: --help')
        else:
            changes = run_config_file(argument, {key: settings[key] for key in page})
        for key, value in changes.items():
            if key not in page:
                raise SystemExit(f'{argument}: unknown setting {key!r} (--help lists all)'
                                 f'{nearest(key, page)}')
            settings[key] = checked(key, value, rules[key], argument)
        given.update(changes)
        if os.environ.get('RANK', '0') == '0':  # one process prints under torchrun
            print(fit(f'{argument}: ' + ', '.join(f'{key}={settings[key]!r}' for key in changes),
                      indent='  '))
    return Settings({key: settings[key] for key in page}, given)


def explain_errors(kind, error, trace):
    """Print a UserError, and Ctrl-C, without a traceback. For sys.excepthook."""
    if issubclass(kind, UserError):
        print(f'error: {printable(str(error)[:4000])}', file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print('\nstopped by Ctrl-C', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def printable(text):
    """Escape the control characters that could command a terminal."""
    return re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]',
                  lambda char: f'\\x{ord(char[0]):02x}', str(text))


def nearest(name, names):
    """Return '; did you mean NAME?' for a misspelt name, or '' when no name is near."""
    near = ([known for known in names if name and known.startswith(name)]
            or difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5))
    return f'; did you mean {near[0]!r}?' if near else ''


def fit(text, width=80, indent=''):
    """Fill the paragraphs of `text` wider than `width`. Indented ones stay."""
    return '\n\n'.join(
        paragraph if paragraph[:1].isspace() or max(map(len, paragraph.splitlines())) <= width else
        textwrap.fill(paragraph, width, subsequent_indent=indent, break_on_hyphens=False,
                      break_long_words=False) for paragraph in text.split('\n\n'))


# The page ---------------------------------------------------------------------------------------


def read_page(source):
    """Parse a script's source -> {name: assignment node} above override()'s call."""
    page = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and 'override(' in ast.unparse(node.value):
            return page
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        page |= {target.id: node for target in targets
                 if isinstance(target, ast.Name) and not target.id.startswith('_')}
    raise ValueError('the script has no top-level line `config = override(globals())`')


def page_text(source, page):
    """Return the script's own settings lines, comments included, broken at 80 columns."""
    nodes = list(page.values())
    lines = []
    for line in source.splitlines()[nodes[0].lineno - 1 : nodes[-1].end_lineno]:
        code, _, comment = line.partition('  # ')
        lines += [line] if len(line) <= 80 else [
            code, *textwrap.wrap(comment, 80, initial_indent='    # ', subsequent_indent='    # ')]
    return '\n'.join(lines)


# Rules ------------------------------------------------------------------------------------------


def rule_of(node, settings):
    """Return the annotation of a setting, evaluated, or else the type of its default."""
    if isinstance(node, ast.AnnAssign):
        return eval(ast.unparse(node.annotation), settings)  # the script's own source
    return type(settings[node.targets[0].id])


def parts_of(rule):
    """Return the alternatives of a rule: `int | None` has two, others are one."""
    return [rule] if get_origin(rule) in (Annotated, Literal, None) else list(get_args(rule))


def kinds_of(rule):
    """Return the types of the values that a rule allows."""
    kinds = []
    for part in parts_of(rule):
        literal = get_origin(part) is Literal
        kinds += map(type, get_args(part)) if literal else [getattr(part, '__origin__', part)]
    return tuple(kinds)


def checked(key, value, rule, where):
    """Return fitted(value, rule), ~/ of a path expanded. Raises SystemExit."""
    try:
        value = fitted(value, rule)
        is_path = isinstance(value, str) and value.startswith('~/') and key not in TEXTS
        return os.path.expanduser(value) if is_path else value  # the shell has left it as it was
    except UserError as error:
        fact = where if where.startswith(f'--{key}=') else f'{where}: {key}={value!r}'
        raise SystemExit(f'{fact}: {error}') from None


def check_fields(instance):
    """Raise UserError for the first field of a dataclass outside its annotation."""
    for field in fields(instance):
        value = getattr(instance, field.name)
        try:
            setattr(instance, field.name, fitted(value, field.type))
        except UserError as error:
            raise UserError(f'{field.name}={value!r}: {error}') from None


def fitted(value, rule):
    """Return `value`, an int as a float if need be. Raises UserError outside the rule."""
    kinds = kinds_of(rule)
    if float in kinds and type(value) is int and int not in kinds and abs(value) < 2**1023:
        value = float(value)
    expected = []
    for part in parts_of(rule):
        kind = getattr(part, '__origin__', part)
        if kind is Literal:
            fits, choices = value in get_args(part), map(repr, get_args(part))
        else:
            bounds = getattr(part, '__metadata__', ())
            fits = type(value) is kind and all(value in bound for bound in bounds)
            name = 'None' if kind is type(None) else kind.__name__
            choices = map(str, bounds if bounds and type(value) is kind else [name])
        if fits:
            return value
        expected += choices
    *first, last = expected
    raise UserError('expected ' + (f'{", ".join(first)} or {last}' if first else last))


def parse(text, kinds):
    """Return the value of an argument's text. A str setting keeps a number's text."""
    if bool in kinds and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
    return text if str in kinds and type(value) not in kinds else value


def run_config_file(path, current):
    """Run a config file, here or beside this file; -> the settings that it assigned."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    path = beside if os.path.isfile(beside) and not os.path.isfile(path) else path
    if not os.path.isfile(path):
        if '=' in path:
            raise SystemExit(f'{path}: no such config file; a setting is written --{path}')
        folder = os.path.dirname(path) or '.'
        files = [os.path.join(folder, name) for name in sorted(os.listdir(folder))
                 if name.endswith('.py') and name != 'presets.py'] if os.path.isdir(folder) else []
        raise SystemExit(f'{path}: no such config file{nearest(path, files)} '
                         f'(a setting is written --key=value)')
    with tokenize.open(path) as f:
        source = f.read()
    names = dict(current)
    # exec: a config file is a program that its user chose to run; it computes (5 * 8) and imports
    exec(compile(source, path, 'exec'), names)
    assigned = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Store) and not node.id.startswith('_')}
    return {key: names[key] for key in names if key in assigned}
