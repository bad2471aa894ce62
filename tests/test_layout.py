"""The house: layers, no circles, sizes, names at the top. Run: pytest tests/test_layout.py"""

import ast
import importlib.metadata
import subprocess

from conftest import ROOT

# a file imports from its own layer or a lower one
LAYERS = [{'configurator', 'ops', 'tokenizer', 'config'}, {'model'}, {'flatgpt'}, {'data'}, {'posttrain', 'serving'},
          {'train', 'sample', 'eval', 'serve'}, {'lab', 'bench', 'tests'}]
TRUNK = ['train.py', 'sample.py', 'model.py', 'configurator.py', 'data/tokens.py', 'flatgpt/optim.py',
         'flatgpt/runtime.py', 'flatgpt/parallel.py', 'flatgpt/checkpoint.py', 'flatgpt/generate.py']
MOST = {'train.py': 400, 'model.py': 400, 'sample.py': 170}
FILES = sorted(path for path in map(ROOT.joinpath, subprocess.run(
    ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '*.py'], cwd=ROOT, capture_output=True,
    text=True, check=True).stdout.splitlines()) if path.exists())
# the one import that goes upwards, when it is called: nanoGPT's users need GPT.from_pretrained
LAZY = {('model', 'flatgpt.huggingface')}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_of(path): path for path in FILES}


def layer_of(module):
    is_prepare = module.startswith('data.') and module.endswith('.prepare')
    if is_prepare or module.endswith('.__main__') or module in ('flatgpt.batch', 'flatgpt.export'):
        return 5  # commands
    return next(i for i, rooms in enumerate(LAYERS) if module.split('.')[0] in rooms)


def imports_of(module):
    """The modules of this repository that a module imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                name = f'{node.module}.{alias.name}'
                found.add(name if name in MODULES else node.module)
    return {name for name in found if name in MODULES and name != module and (module, name) not in LAZY}


def test_arrows_go_down():
    wrong = [(module, name) for module in MODULES for name in imports_of(module)
             if layer_of(name) > layer_of(module)]
    assert wrong == []


def test_tokenizer_and_model_stand_alone():
    """tokenizer/ imports nothing else of the project but in its command line, model.py only ops.py and configurator.py."""
    assert imports_of('model') <= {'ops', 'configurator'} and not imports_of('ops') and not imports_of('configurator')
    for module in MODULES:
        if module.split('.')[0] == 'tokenizer' and not module.endswith('__main__'):
            rooms = {name.split('.')[0] for name in imports_of(module)}
            assert rooms <= {'tokenizer', 'configurator'}, module


def test_no_circles():
    graph = {module: imports_of(module) - {module.split('.')[0]} for module in MODULES}
    done, path = set(), []

    def visit(module):
        assert module not in path, ' -> '.join([*path[path.index(module):], module])
        if module not in done:
            path.append(module)
            for name in sorted(graph[module]):
                visit(name)
            path.pop()
            done.add(module)

    for module in graph:
        visit(module)


def test_sizes():
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding='utf-8').splitlines()) for path in FILES}
    assert {name: n for name, n in lines.items() if n > 600} == {}
    assert {name: lines[name] for name, most in MOST.items() if lines[name] > most} == {}
    assert sum(lines[name] for name in TRUNK) <= 2500


def test_parameters():
    """No function takes more than five, self and cls not counted; what takes more has a dataclass."""
    many = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if 'tests' not in path.parts else ():
            if isinstance(node, ast.FunctionDef):
                a = node.args
                names = [arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs] if arg.arg not in ('self', 'cls', 'ctx')]
                if len(names) + bool(a.vararg) + bool(a.kwarg) > 5:
                    many.append((module, node.name))
    assert many == []


def test_names_at_the_top_shadow_no_package():
    """Whoever imports an installed package from this folder gets that package."""
    top = {path.stem if path.parent == ROOT else path.relative_to(ROOT).parts[0] for path in FILES} - {'tests'}
    installed = {name for name, packages in importlib.metadata.packages_distributions().items()
                 if set(packages) != {'flatgpt'}}
    assert top & installed == set()


def test_path_lines_are_in_the_scripts_alone():
    """Those that run as files: `python -P` leaves their folder out."""
    lines = [path.relative_to(ROOT).as_posix() for path in FILES
             if 'tests' not in path.parts and 'sys.path' in path.read_text(encoding='utf-8')]
    scripts = {'train.py', 'sample.py', 'eval.py', 'serve.py'}
    assert scripts <= set(lines) and len(lines) <= 13
    assert all(line.startswith('data/') and line.endswith('prepare.py') for line in set(lines) - scripts)
    assert not any('noqa: E402' in path.read_text(encoding='utf-8') for path in FILES if path.name != 'test_layout.py')
