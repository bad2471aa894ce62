"""
Settings: a page of plain assignments at the top of a script, overridden by config files and --key=value arguments.

    # train.py
    batch_size = 12              # sequences in one micro-batch
    compile: bool | str = 'auto' # an annotation lists the types a setting may have, when its default does not say
    config = override(globals())

    $ python train.py config/quickstart.py --batch_size=32
    $ python train.py --compile        # of a setting that can be True or False: --compile=True
    $ python train.py --help

Overrides apply in the order given, so the last one wins. A config file is Python made of plain assignments; it sees
the settings as they stand, so `lr_decay_iters = max_iters` works. It is the user's own program and is run as one.
Whatever is not on the page, or has another type than the page declares, is refused, in files as on the command line.
"""

import ast
import difflib
import os
import sys
import textwrap
import tokenize
import traceback

TYPE_NAMES = {'bool': bool, 'int': int, 'float': float, 'str': str, 'None': type(None)}  # what a setting can be


class Settings(dict):
    """The resolved settings by name. `given` holds the names that a config file or the command line set."""

    def __init__(self, values, given):
        super().__init__(values)
        self.given = given


def override(settings, argv=None):
    """
    Apply `argv` (default: the command line) to a script's settings and return them all.

    settings: the script's globals(), updated in place. The page is read from the source of the script: every top-level
    assignment to a public name before the call of override(globals()). -> Settings, a dict of plain values.
    Raises SystemExit naming the setting, the value and what was expected. `--help` prints the page and exits with 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    with tokenize.open(settings['__file__']) as f:
        source = f.read()
    page = read_page(source)
    if '--help' in argv or '-h' in argv:
        print(fit(settings['__doc__'].strip()), 'Settings, each set by --key=value:', page_text(source, page),
              sep='\n\n')
        raise SystemExit(0)
    allowed = {key: allowed_types(node, settings[key]) for key, node in page.items()}
    given = set()
    for argument in argv:
        if argument.startswith('--') and '=' in argument:
            key, text = argument[2:].split('=', 1)
            changes = {key: parse(text, allowed[key])} if key in page else {key: text}
        elif argument[:2] == '--' and bool in allowed.get(argument[2:], ()):
            changes = {argument[2:]: True}
        elif argument.startswith('-'):
            key = argument.lstrip('-')
            example = f'--{key}={settings[key]}' if key in page else '--key=value'
            raise SystemExit(f'{argument}: expected {example} or the path of a config file. All settings: --help')
        else:
            changes = run_config_file(argument, {key: settings[key] for key in page})
        for key, value in changes.items():
            check_known(key, page, argument)
            settings[key] = check_type(key, value, allowed[key], argument)
        given.update(changes)
        if os.environ.get('RANK', '0') == '0':  # one voice under torchrun
            given_now = ', '.join(f'{key}={settings[key]!r}' for key in changes)
            print(textwrap.fill(f'{argument}: {given_now}', 80, subsequent_indent='  ', break_long_words=False,
                                break_on_hyphens=False))
    return Settings({key: settings[key] for key in page}, given)


def check(config, rules):
    """
    Raise ValueError for the first setting that breaks a rule: (names with spaces between them, a function of the value
    of any of these that says whether it is valid, what is expected).
    """
    for names, is_valid, expected in rules:
        for name in names.split():
            if not is_valid(config[name]):
                raise ValueError(f'{name}={config[name]!r}: expected {expected}')


def explain_errors(kind, error, trace):
    """
    For sys.excepthook: a ValueError that a module of this repository raised is addressed to the user, so its message is
    all that is shown. So is that of Ctrl-C. Anything else is unexpected and keeps its traceback.
    """
    raised_in = traceback.extract_tb(trace)[-1].filename if trace else ''
    here = os.path.dirname(os.path.abspath(__file__))
    ours = os.path.abspath(raised_in).startswith(here + os.sep)
    if ours and issubclass(kind, ValueError):
        print(f'error: {error}', file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print('\nstopped by Ctrl-C', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def fit(text, width=80):
    """A docstring for the terminal: paragraphs with longer lines are filled anew, indented ones kept as they are."""
    return '\n\n'.join(paragraph if paragraph[:1].isspace() or max(map(len, paragraph.splitlines())) <= width else
                       textwrap.fill(paragraph, width, break_on_hyphens=False, break_long_words=False)
                       for paragraph in text.split('\n\n'))


def read_page(source):
    """Source of a script -> {name: its assignment node}, for the assignments above the line that calls override()."""
    page = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and 'override(' in ast.unparse(node.value):
            return page
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        for target in targets:
            if isinstance(target, ast.Name) and not target.id.startswith('_'):
                page[target.id] = node
    raise ValueError('no line `config = override(globals())` at the top level of the script')


def page_text(source, page):
    """The settings as the script shows them: its own lines, comments included, those past 80 columns broken."""
    nodes = list(page.values())
    lines = []
    for line in source.splitlines()[nodes[0].lineno - 1 : nodes[-1].end_lineno]:
        code, _, comment = line.partition('  # ')
        lines += [line] if len(line) <= 80 else [code, *textwrap.wrap(comment, 80, initial_indent='    # ',
                                                                      subsequent_indent='    # ')]
    return '\n'.join(lines)


def allowed_types(node, default):
    """Types of a setting: those its annotation lists (`int | None`), else the type of its default."""
    if not isinstance(node, ast.AnnAssign):
        return (type(default),)
    return tuple(TYPE_NAMES[name.strip()] for name in ast.unparse(node.annotation).split('|'))


def parse(text, types_allowed):
    """The value that `text` from the command line stands for; a str setting keeps text that reads as a number."""
    if bool in types_allowed and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
    return text if str in types_allowed and not isinstance(value, types_allowed) else value


def check_known(key, page, where):
    """SystemExit naming the nearest setting if there is none called `key`."""
    if key not in page:
        near = [name for name in page if name.startswith(key)] or difflib.get_close_matches(key, page, n=1, cutoff=0.5)
        meant = f'did you mean {near[0]!r}? ' if near else ''
        raise SystemExit(f'{where}: unknown setting {key!r}; {meant}All settings: python {sys.argv[0]} --help')


def check_type(key, value, types_allowed, where):
    """`value`, an int turned float where a float is expected; SystemExit for any other type than those allowed."""
    if type(value) in types_allowed:
        return value
    if float in types_allowed and type(value) is int:
        return float(value)
    expected = ' or '.join(name for name, kind in TYPE_NAMES.items() if kind in types_allowed)
    raise SystemExit(f'{where}: {key} = {value!r} is of type {type(value).__name__}, expected {expected}')


def run_config_file(path, current):
    """Run a config file with the `current` settings in sight; -> the settings it changed or named anew."""
    if not os.path.isfile(path):
        if '=' in path:
            raise SystemExit(f'{path}: no such config file; a setting is written --{path}')
        beside = os.path.dirname(path) or '.'
        files = [os.path.join(beside, f) for f in sorted(os.listdir(beside)) if f.endswith('.py')] \
            if os.path.isdir(beside) else []
        near = difflib.get_close_matches(path, files, n=1, cutoff=0.3)
        meant = f'; did you mean {near[0]}?' if near else ''
        raise SystemExit(f'{path}: no such config file{meant} (a setting is written --key=value)')
    with tokenize.open(path) as f:
        source = f.read()
    names = dict(current)
    # exec, because a config file is a Python program that its user chose to run: it computes (5 * 8), imports (time)
    exec(compile(source, path, 'exec'), names)
    assigned = {node.id for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and not node.id.startswith('_')}
    return {key: names[key] for key in names if key in assigned}
