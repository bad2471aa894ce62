"""configurator.py: every way to say a setting, right and wrong. Run: pytest tests/test_configurator.py"""

import contextlib
import io
import os
import subprocess
import sys
import textwrap
from typing import Literal

import pytest
from conftest import ROOT

import configurator

PAGE = '''
"""What this script is for."""

import math
import os as system

# settings -----
batch_size = 12  # sequences in a micro-batch
learning_rate = 6e-4
bias = False
out_dir = 'out'
init_from = 'scratch'  # or 'resume'
n_layer = 2
top_k: int | None = 200  # None: all
top_p: float | None = None
compile: bool | str = 'auto'
_hidden = 1
config = override(globals())
derived = batch_size * 2
'''


def resolve(tmp_path, *argv):
    """A script with PAGE runs with `argv`; -> (its namespace, what it printed)."""
    path = tmp_path / 'script.py'
    path.write_text(PAGE)
    namespace = {'__file__': str(path), '__name__': '__main__',
                 'override': lambda settings: configurator.override(settings, [str(a) for a in argv])}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(PAGE, str(path), 'exec'), namespace)
    return namespace, printed.getvalue()


def write(tmp_path, text, name='config.py'):
    (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path / name


def test_defaults(tmp_path):
    namespace, printed = resolve(tmp_path)
    assert dict(namespace['config']) == {
        'batch_size': 12, 'learning_rate': 6e-4, 'bias': False, 'out_dir': 'out', 'init_from': 'scratch', 'n_layer': 2,
        'top_k': 200, 'top_p': None, 'compile': 'auto'}
    assert namespace['config'].given == set() and printed == '' and namespace['derived'] == 24


@pytest.mark.parametrize('argument, key, value', [
    ('--batch_size=4', 'batch_size', 4), ('--batch_size=-4', 'batch_size', -4),
    ('--learning_rate=1', 'learning_rate', 1.0), ('--learning_rate=1e-3', 'learning_rate', 1e-3),
    ('--bias=True', 'bias', True), ('--bias=true', 'bias', True), ('--bias=TRUE', 'bias', True),
    ('--bias=false', 'bias', False), ('--bias=False', 'bias', False),
    ('--out_dir=a=b=c', 'out_dir', 'a=b=c'),  # only the first = splits
    ('--out_dir=123', 'out_dir', '123'), ('--out_dir=None', 'out_dir', 'None'), ('--out_dir=1e5', 'out_dir', '1e5'),
    ('--out_dir=', 'out_dir', ''), ('--out_dir=true', 'out_dir', 'true'), ("--out_dir='q'", 'out_dir', 'q'),
    ('--out_dir=[1, 2]', 'out_dir', '[1, 2]'), ('--out_dir=--x', 'out_dir', '--x'),
    ('--out_dir=a b', 'out_dir', 'a b'), ('--out_dir=ü', 'out_dir', 'ü'), ('--out_dir=((((', 'out_dir', '(((('),
    ('--top_k=None', 'top_k', None), ('--top_k=5', 'top_k', 5), ('--top_p=0.5', 'top_p', 0.5),
    ('--top_p=1', 'top_p', 1.0),
    ('--compile=True', 'compile', True), ('--compile=false', 'compile', False), ('--compile=auto', 'compile', 'auto'),
    ('--compile', 'compile', True), ('--bias', 'bias', True)])
def test_one_argument(tmp_path, argument, key, value):
    namespace, printed = resolve(tmp_path, argument)
    config = namespace['config']
    assert config[key] == namespace[key] == value and type(config[key]) is type(value)
    assert config.given == {key}
    assert f'{key}={value!r}' in printed


@pytest.mark.parametrize('argument, said', [
    ('--batchsize=4', ["unknown setting 'batchsize'", "did you mean 'batch_size'?", '--help']),
    ('--zzzzzz=4', ["unknown setting 'zzzzzz'", '--help']),
    ('--derived=4', ["unknown setting 'derived'"]),  # computed from the settings, not one of them
    ('--config=4', ["unknown setting 'config'"]), ('--math=4', ["unknown setting 'math'"]),
    ('--system=4', ["unknown setting 'system'"]), ('--_hidden=4', ["unknown setting '_hidden'"]),
    ('--override=4', ["unknown setting 'override'"]), ('--=4', ["unknown setting ''"]),
    ('--batch_size=four', ['--batch_size=four: expected int']),
    ('--batch_size=4.0', ['--batch_size=4.0: expected int']),
    ('--batch_size=', ['--batch_size=: expected int']),
    ('--batch_size=True', ['batch_size', 'expected int']),
    ('--learning_rate=True', ['learning_rate', 'expected float']), ('--learning_rate=None', ['expected float']),
    ('--learning_rate=1e', ['1e: expected float']), ('--bias=1', ['bias=1: expected bool']),
    ('--bias=yes', ['yes: expected bool']), ('--top_k=2.5', ['top_k=2.5: expected int or None']),
    ('--top_p=x', ['expected float or None']), ('--batch_size=__import__("os")', ['expected int']),
    ('--batch_size', ['--batch_size=12', 'config file']), ('-batch_size', ['--batch_size=12']),
    ('--nonsense', ['--key=value']), ('-x=3', ['--key=value'])])
def test_refused_argument(tmp_path, argument, said):
    with pytest.raises(SystemExit) as error:
        resolve(tmp_path, argument)
    assert str(error.value).startswith(argument)
    for text in said:
        assert text in str(error.value)


@pytest.mark.parametrize('text, changes', [
    ('batch_size = 4', {'batch_size': 4}),
    ('learning_rate = 1', {'learning_rate': 1.0}),
    ('n_layer = batch_size * 2', {'n_layer': 24}),  # sees the settings as they stand
    ('import time\nout_dir = "o" + str(time.time())[:0]', {'out_dir': 'o'}),  # nanoGPT's files do this
    ('batch_size = 5 * 8\nn_layer = batch_size // 8', {'batch_size': 40, 'n_layer': 5}),
    ('batch_size, bias = 3, True', {'batch_size': 3, 'bias': True}),
    ('n_layer *= 3', {'n_layer': 6}),
    ('top_k = None', {'top_k': None}),
    ('_mine = 7\nn_layer = _mine', {'n_layer': 7}),  # names with _ are the file's own
    ('def twice(x):\n    return 2 * x\nn_layer = twice(4)', {'n_layer': 8}),
    ('"""A docstring."""\n# a comment', {}),
    ('n_layer = 2', {'n_layer': 2})])  # the default, but given
def test_config_file(tmp_path, text, changes):
    namespace, _ = resolve(tmp_path, write(tmp_path, text))
    defaults = dict(resolve(tmp_path)[0]['config'])
    assert dict(namespace['config']) == {**defaults, **changes}
    assert {key: namespace[key] for key in changes} == changes
    assert namespace['config'].given == set(changes)
    assert '_mine' not in namespace and 'time' not in namespace


@pytest.mark.parametrize('text, said', [
    ('batchsize = 4', ["unknown setting 'batchsize'", "did you mean 'batch_size'?"]),
    ('derived = 4', ["unknown setting 'derived'"]), ('config = {}', ["unknown setting 'config'"]),
    ('helper = 3\nn_layer = helper', ["unknown setting 'helper'"]),
    ('batch_size = "4"', ["batch_size='4': expected int"]), ('bias = 0', ['expected bool']),
    ('learning_rate = "fast"', ['expected float']), ('top_k = [1]', ['top_k=[1]: expected int or None']),
    ('batch_size = None', ['batch_size=None: expected int'])])
def test_refused_config_file(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(SystemExit) as error:
        resolve(tmp_path, path)
    assert str(error.value).startswith(str(path))
    for text in said:
        assert text in str(error.value)


def test_order(tmp_path):
    """Files and arguments apply from left to right; the last one wins, and a file sees what stood before it."""
    path = write(tmp_path, 'batch_size = 7\nn_layer = batch_size + n_layer')
    assert resolve(tmp_path, path, '--batch_size=9')[0]['batch_size'] == 9
    namespace = resolve(tmp_path, '--batch_size=9', '--n_layer=100', path)[0]
    assert (namespace['batch_size'], namespace['n_layer']) == (7, 107)
    assert resolve(tmp_path, '--batch_size=1', '--batch_size=2')[0]['batch_size'] == 2
    two = resolve(tmp_path, path, write(tmp_path, 'n_layer = n_layer * 2', 'b.py'), '--bias=True')[0]
    assert two['n_layer'] == 18 and two['config'].given == {'batch_size', 'n_layer', 'bias'}
    assert two['derived'] == 14  # computed after all of them


def test_home_folder(tmp_path, monkeypatch):
    """--out_dir=~/x: bash leaves the ~ of an argument that does not begin with it."""
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    path = write(tmp_path, "init_from = '~/base'")
    namespace = resolve(tmp_path, '--out_dir=~/a b', path)[0]
    assert namespace['out_dir'] == f'{tmp_path}/home/a b' and namespace['init_from'] == f'{tmp_path}/home/base'
    for name in ('start', 'stop', 'regex'):  # no paths
        assert configurator.checked(name, '~/', str, 'config.py') == '~/'
    for text in ('~', 'a~/b', '~a/b', ' ~/b'):
        assert resolve(tmp_path, f'--out_dir={text}')[0]['out_dir'] == text


def test_config_of_the_repository_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configurator.run_config_file('config/eval_gpt2.py', {'init_from': 'scratch'})['init_from'] == 'gpt2'
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'eval_gpt2.py').write_text("init_from = 'mine'")  # the current folder comes first
    assert configurator.run_config_file('config/eval_gpt2.py', {'init_from': 'scratch'}) == {'init_from': 'mine'}


def test_missing_file(tmp_path):
    write(tmp_path, '', 'train_gpt2.py')
    with pytest.raises(SystemExit) as error:
        resolve(tmp_path, tmp_path / 'train_gpt.py')
    assert 'no such config file' in str(error.value) and "train_gpt2.py'?" in str(error.value)
    with pytest.raises(SystemExit, match='no such config file'):
        resolve(tmp_path, 'nowhere/at_all.py')
    with pytest.raises(SystemExit, match='no such config file; a setting is written --batch_size=4'):
        resolve(tmp_path, 'batch_size=4')  # the dashes forgotten


@pytest.mark.parametrize('argv', [['--help'], ['-h'], ['--batch_size=oops', '--help']])
def test_help_prints_the_page(tmp_path, argv, capsys):
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(SystemExit))
        printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        path = tmp_path / 'script.py'
        path.write_text(PAGE)
        namespace = {'__file__': str(path), 'override': lambda settings: configurator.override(settings, argv)}
        exec(compile(PAGE, str(path), 'exec'), namespace)
    text = printed.getvalue()
    assert text.startswith('What this script is for.')
    for line in ('batch_size = 12  # sequences in a micro-batch', "init_from = 'scratch'  # or 'resume'",
                 'top_k: int | None = 200  # None: all'):
        assert line in text
    assert 'import' not in text and 'derived' not in text and 'override' not in text


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_pages_of_the_scripts(script):
    """Every setting has a plain value of a type that its line declares, and nanoGPT's names are all there."""
    with open(script, encoding='utf-8') as f:
        source = f.read()
    page = configurator.read_page(source)
    values = {}
    for key, node in page.items():
        values[key] = eval(compile(configurator.ast.Expression(node.value), script, 'eval'), {})
        rule = configurator.rule_of(node, {**vars(configurator), key: values[key]})
        assert configurator.checked(key, values[key], rule, 'default') == values[key]
    nanogpt = {
        'train.py': 'out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from '
        'wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size '
        'n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr '
        'warmup_iters lr_decay_iters min_lr backend device dtype compile',
        'sample.py': 'init_from out_dir start num_samples max_new_tokens temperature top_k seed device dtype compile'}
    assert set(nanogpt[script].split()) <= set(page)
    if script == 'train.py':
        gpt2 = {'block_size': 1024, 'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'dropout': 0.0, 'bias': False,
                'learning_rate': 6e-4, 'max_iters': 600000, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95,
                'grad_clip': 1.0, 'warmup_iters': 2000, 'lr_decay_iters': 600000, 'min_lr': 6e-5, 'batch_size': 12,
                'gradient_accumulation_steps': 40, 'eval_interval': 2000, 'eval_iters': 200}
        assert gpt2.items() <= values.items()


def test_paragraphs_fit_a_terminal():
    text = f'A title.\n\n    $ python a.py {"x" * 90}\n\n{" ".join(["seven-up"] * 12)}\nand more\n\nshort\nlines'
    fitted = configurator.fit(text).split('\n\n')
    assert fitted[0] == 'A title.' and fitted[1] == '    $ python a.py ' + 90 * 'x'  # a command stays in one piece
    assert max(map(len, fitted[2].splitlines())) <= 80 and fitted[2].split() == ['seven-up'] * 12 + ['and', 'more']
    assert fitted[3] == 'short\nlines'


@pytest.mark.parametrize('rule, value, said', [
    (configurator.Count, 0, '1 or more'), (configurator.Natural, -1, '0 or more'),
    (configurator.Fraction, 1.0, 'at least 0 and below 1'), (configurator.Share, 0.0, 'above 0 and at most 1'),
    (configurator.Positive, 0.0, 'above 0'), (configurator.NonNegative, float('inf'), '0 or more'),
    (configurator.Probability, float('nan'), 'at least 0 and at most 1'), (configurator.Count, 2.0, 'int'),
    (configurator.Count | None, 'x', 'int or None'), (configurator.Count | None, 0, '1 or more or None'),
    (Literal['a', 'b', 'c'], 'd', "'a', 'b' or 'c'"), (bool | Literal['auto'], 'maybe', "bool or 'auto'")])
def test_rules(rule, value, said):
    with pytest.raises(SystemExit) as error:
        configurator.checked('x', value, rule, 'here')
    assert str(error.value) == f'here: x={value!r}: expected {said}'


@pytest.mark.parametrize('rule, value', [
    (configurator.Count, 1), (configurator.Count | None, None), (configurator.Fraction, 0), (bool | Literal['auto'], True),
    (configurator.Share, 1), (Literal['a', 'b'], 'b'), (int | float, 1), (configurator.Seed, 2**63 - 1)])
def test_rules_hold(rule, value):
    assert configurator.checked('x', value, rule, 'here') == value


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'eval.py', 'flatgpt/export.py', 'flatgpt/batch.py', 'posttrain/chat.py',
                                    'posttrain/reward.py', 'posttrain/rl.py', 'posttrain/dpo.py'])
def test_help_fits_a_terminal(script):
    """No line is wider than 80 columns, and breaking them loses no word."""
    source = (ROOT / script).read_text(encoding='utf-8')
    page = configurator.read_page(source)
    text = configurator.page_text(source, page)
    doc = configurator.fit(configurator.ast.get_docstring(configurator.ast.parse(source)))
    assert max(map(len, f'{doc}\n{text}'.splitlines())) <= 80
    lines = source.splitlines()
    first, last = min(node.lineno for node in page.values()), max(node.end_lineno for node in page.values())
    assert max(map(len, lines[first - 1 : last])) > 80  # otherwise this would test nothing

    def words(text):
        return [word for word in text.split() if word != '#']

    assert words(text) == words('\n'.join(lines[first - 1 : last]))


def test_settings_given_are_shown_line_by_line(tmp_path):
    """What a config file sets is printed in lines of at most 80 columns; a longer value stays in one piece."""
    path = write(tmp_path, 'batch_size = 4\nlearning_rate = 0.125\nbias = True\ninit_from = "x-" * 60\nn_layer = 3\n')
    printed = resolve(tmp_path, path)[1]
    words = printed.replace(',', '').split()
    assert words[1:] == ['batch_size=4', 'learning_rate=0.125', 'bias=True', f"init_from='{'x-' * 60}'", 'n_layer=3']
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in printed.splitlines())


def test_only_one_process_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    assert resolve(tmp_path, '--batch_size=3')[1] == ''


def test_help_without_docstrings(tmp_path, capsys):
    """python -OO leaves them out of the program, not out of its source."""
    (tmp_path / 'script.py').write_text('"""\nDo one thing.\n"""\nrate = 1.0  # of it\nconfig = override(globals())\n')
    with pytest.raises(SystemExit) as stopped:
        configurator.override({'__file__': str(tmp_path / 'script.py'), '__doc__': None, 'rate': 1.0}, ['--help'])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith('Do one thing.\n\nSettings')


def test_errors_command_no_terminal(capsys):
    """Names and values from files may hold escape codes."""
    name = '\x1b]0;title\x07\x1b[2J\x9b31m\x7fé\n\tend'
    configurator.explain_errors(configurator.UserError, configurator.UserError(name + 'x' * 10_000), None)
    said = capsys.readouterr().err
    assert said.startswith('error: \\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x7fé\n\tend') and len(said) < 4100


@pytest.mark.slow
@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'eval.py', 'serve.py'])
def test_scripts_without_their_folder_on_the_path(script, tmp_path):
    done = subprocess.run([sys.executable, '-OO', str(ROOT / script), '--help'], cwd=tmp_path, text=True,
                          env={**os.environ, 'PYTHONSAFEPATH': '1', 'PYTHONPATH': ''}, capture_output=True)
    assert done.returncode == 0 and 'out_dir' in done.stdout, done.stderr
