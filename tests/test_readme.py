"""The commands of the READMEs name what exists, and each is run by a test or listed as not run."""

import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT, Run, make_text

from configurator import read_page

READMES = sorted(path.relative_to(ROOT).as_posix()
                 for pattern in ('README.md', '[!.]*/README.md', 'data/*/README.md')
                 for path in ROOT.glob(pattern))
SCRIPTS = sorted(path.relative_to(ROOT).as_posix()
                 for pattern in ('*.py', '[!.]*/*.py', 'data/*/*.py', 'posttrain/*/*.py')
                 for path in ROOT.glob(pattern) if path.parent.name not in ('tests', 'shared'))

# How each command is checked. A key is a whole command, or with * at its end the beginning of one.
# A command belongs to its longest key.
# RUN: test_commands_run runs them in this order; the value's settings make them small.
TUNE = ('--batch_size=2 --max_iters=2 --eval_interval=2 --eval_iters=1 --warmup_iters=1 '
        '--lr_decay_iters=2 --device=cpu --dtype=float32 --compile=False')
TRAIN = f'{TUNE} --n_layer=1 --n_head=2 --n_embd=16 --block_size=64 --batch_size=16'
ALIGN = '--max_iters=1 --eval_interval=1 --micro_batch_size=2 --device=cpu --dtype=float32'
ANSWER = '--prompts_per_step=2 --minibatch_size=4 --eval_examples=7 --max_new_tokens=8'
ASK = '--n=7 --max_new_tokens=8 --device=cpu'
CHAT = '--max_new_tokens=16 --device=cpu --compile=False'
SAMPLE = f'{CHAT} --num_samples=1'
RUN = {
    # text to tokens
    'python -m tokenizer --text=*': '--tokenizer=byte',
    'python -m tokenizer train --input=novels/ *': '--vocab_size=300',
    'python -m tokenizer train --kind=sentencepiece *': '--vocab_size=320',
    'python -m tokenizer --compare=*': '--compare=byte,novels.json',
    'python -m tokenizer page --out=tokens.html *': '--tokenizer=novels.json',
    'python -m tokenizer export *': '',
    'python -m data.clean --input=crawl.jsonl *': '--num_proc=1',
    'python data/text/prepare.py --input=clean.jsonl *': '--tokenizer=byte',
    'python data/text/prepare.py --input=novels/ *': '',
    'python data/text/prepare.py --input=book.txt': '',
    'python data/text/prepare.py --input=notes/ --name=mine': '',
    'python data/text/prepare.py --input=posts.jsonl *': '',
    'python data/shakespeare_char/prepare.py*': '--input=book.txt',
    'python data/shakespeare/prepare.py*': '--input=book.txt --tokenizer=byte',
    'python data/python_stdlib/prepare.py*': '--tokenizer=byte',
    'python data/addition/prepare.py*': '--digits=1',
    # pretrain
    'python train.py config/quickstart.py*': TRAIN,
    'python train.py config/quickstart.py --sample_every=*':
        f'{TRAIN} --sample_every=1 --keep_every=1 --sample_tokens=9',
    'python sample.py --out_dir=out-quickstart --which=*': f'{SAMPLE} --which=1',
    'torchrun --standalone --nproc_per_node=2 *': TRAIN.replace('max_iters=2', 'max_iters=4'),
    'python -m flatgpt.export --out_dir=out-shards *': '',
    'python train.py config/quickstart.py --plan': TRAIN,
    'python train.py config/train_gpt2.py --plan=*': '',
    'python train.py config/train_shakespeare_char.py*': TRAIN,
    'python -m bench.plot out-quickstart *': '',
    'python -m bench.runs out-quickstart out-novels *': '',
    # sample and evaluate
    'python sample.py --out_dir=out-quickstart *': SAMPLE,
    'python -m flatgpt.batch --out_dir=out-quickstart *': SAMPLE,
    'torchrun --standalone --nproc_per_node=2 -m flatgpt.batch *': SAMPLE,
    'python eval.py --out_dir=out-quickstart*': '--device=cpu',
    'torchrun --standalone --nproc_per_node=2 -- eval.py *': '--device=cpu',
    # export
    'python -m flatgpt.export --out_dir=out-llama --out=my-gpt': '',
    'python -m flatgpt.export --out_dir=out-llama --out=my-gpt *': '--out=my-gpt-in-bf16',
    'python sample.py --init_from=my-gpt *': SAMPLE,
    # an assistant
    'python data/tiny_chat/prepare.py*': '--conversations=60 --pairs=200 --documents=100',
    'python data/text/prepare.py --input=data/tiny_chat/corpus.jsonl *': '',
    'python train.py config/tiny_web.py': TRAIN.replace('--block_size=64', ''),
    'python eval.py --out_dir=out-tiny-web *': ASK,
    'python data/chat/prepare.py --input=talks.jsonl *': '--block_size=64 --val_fraction=0.5',
    'python train.py config/sft.py *': TUNE,
    'python -m posttrain.chat --out_dir=out-sft': CHAT,
    'python train.py config/sft_tiny_chat.py': TUNE,
    'python train.py config/sft_tiny_chat.py --eval_tasks=*': f'{TUNE} --eval_examples=7',
    'python train.py config/lora_tiny_chat.py': TUNE,
    'python -m posttrain.reward config/reward_tiny_chat.py': f'{ALIGN} --batch_size=4',
    'python -m posttrain.rl config/ppo_tiny_chat.py': f'{ALIGN} {ANSWER}',
    'python -m posttrain.rl config/grpo_tiny_chat.py': f'{ALIGN} {ANSWER} --group_size=2',
    'python -m posttrain.rl config/reinforce_tiny_chat.py': f'{ALIGN} {ANSWER} --group_size=2',
    'torchrun --standalone --nproc_per_node=2 -m posttrain.rl *':
        f'{ALIGN} {ANSWER} --group_size=2',
    'python -m posttrain.dpo --init_from=out-sft-tiny-chat *': f'{ALIGN} --minibatch_size=4',
    'python -m posttrain.classify --init_from=*':
        '--max_iters=1 --eval_interval=1 --batch_size=4 --device=cpu --dtype=float32',
    'python -m posttrain.classify --out_dir=out-classify --predict=*': '--device=cpu',
    'python -m data.clean --input=crawl.jsonl --out=clean.jsonl --quality=*':
        '--num_proc=1 --quality_min=0.01',
    'python eval.py --out_dir=out-sft-tiny-chat --task=tiny_chat*': ASK,
    'python eval.py --out_dir=out-grpo-tiny-chat --task=tiny_chat': ASK,
    'python -m posttrain.chat --out_dir=out-grpo-tiny-chat': CHAT,
}
# TESTED: the value is the test, or its file, that runs the command with other settings.
TESTED = {
    'pip install -c constraints.txt -e *': 'test_extras_exist',
    "pip install -e '*": 'test_extras_exist',
    'bash bench/gpu.sh': 'test_gpu_sh_runs_parts_one_by_one',
    'python -m bench.gpu *': 'test_gpu_sh_runs_parts_one_by_one',
    'python -m flatgpt.export --out_dir=out-sft --out=served': 'test_rollout_server.py',
    'lm_eval *': 'test_lm_evaluation_harness_gets_our_numbers',
    'python data/text/prepare.py --input=FILE *': 'test_commands_run',
    'python -m data.clean --input=crawl/ --part=*': 'test_the_commands',
    'python -m data.clean --join=*': 'test_the_commands',
    'python data/text/prepare.py --input=clean/': 'test_commands_run',
    'python -m data.clean train-quality *': 'test_accuracy_and_calibration_on_new_texts',
    'python data/text/prepare.py --input=stories.txt *': 'test_readers.py',
    'python data/fineweb_edu/prepare.py --input=*': 'test_prepare.py',
    'python data/openwebtext/prepare.py --input=*': 'test_prepare.py',
    'python train.py config/train_gpt2.py*': 'test_recipes',
    'python train.py config/small_data.py *': 'test_recipe_stops_when_val_turns',
    'python train.py config/quickstart.py --dataset=web:*': 'test_mixture.py',
    'python train.py config/quickstart.py --init_from=out-quickstart --extend_context=*':
        'test_extended_context',
    'python -m posttrain.rl *': 'test_rl_e2e.py',
    'python -m posttrain.dpo *': 'test_dpo_e2e.py',
    'python -m posttrain.pairs *': 'test_pairs_e2e.py',
    'python -m posttrain.reward --init_from=out-lab/*': 'test_pairs_e2e.py',
    'python serve.py *': 'test_serve_e2e.py',
    'python -m posttrain.classify --init_from=out-lab/*': 'test_a_run_and_its_base_model',
    'python -m bench.plot *': 'test_plot_command',
    'python -m bench.runs *': 'test_runs.py',
    'python -m bench.train_step *': 'test_train_step_takes_the_step_apart',
    'python -m bench.time_to_loss *': 'test_time_to_loss_of_a_run',
    'python -m bench.ablation *': 'test_ablation_runs_what_is_missing',
    'python -m bench.scaling': 'test_scaling_along_the_batch',
    'python -m bench.generate *': 'test_generate',
    'python sample.py --out_dir=out-lab/learning_to_write *': 'test_lab_learning_to_write.py',
    **{f'python -m lab.{name}*': f'test_lab_{name}.py' for name in (
        'addition', 'arena', 'baby_gpt', 'bigram_to_gpt', 'diversity', 'emergence', 'finetune',
        'flops', 'guardrails', 'learning_to_write', 'long_context', 'look_inside', 'mixture',
        'own_samples', 'prompts', 'react', 'reflection', 'retrieval', 'scaling_laws', 'sentiment',
        'state_of_gpt', 'thinking')},
}
# NOT_RUN: the reason.
NOT_RUN = {
    'pip install torch *': 'installs another build of torch',
    'pip install --no-deps triton*': 'almost a gigabyte',
    'pytest*': 'this is it',
    'vllm serve *': 'other software',
    'VLLM_SERVER_DEV_MODE=1 vllm serve *': 'other software',
    'python convert_hf_to_gguf.py *': 'other software',
    'hf download *': 'other software',
    'python data/fineweb_edu/prepare.py*': 'network',
    'python data/openwebtext/prepare.py': 'network',
    'python train.py config/eval_gpt2.py': 'network',
    'python train.py config/finetune_shakespeare.py': 'network',
    'python sample.py --init_from=gpt2-xl *': 'network',
    'python -m posttrain.chat --init_from=gpt2': 'network',
    'torchrun --standalone --nproc_per_node=8 *': '8 GPUs',
    'torchrun --nproc_per_node=8 *': '16 GPUs',
    'srun *': 'a cluster',
    **{f'python -m bench.{name}*': 'minutes' for name in (
        'attention', 'kill', 'lookup', 'plan', 'prepare', 'rollout', 'round_trip', 'save', 'start', 'tokenizer')},
}
ENGLISH = (
    'The lamp of the harbour was lit every evening by a man who lived alone with his dog. He knew '
    'all of the ships that came into the bay, and when one of them was late he would stand at the '
    'window until he saw it. On the night of the great storm three boats did not return, and the '
    'people of the village came to his door to ask what could be done. He told them that the light '
    'would burn until morning.\n')
TALKS = [[{'role': 'user', 'content': f'{number} cats?'},
          {'role': 'assistant', 'content': 'they sat'}] for number in range(8)]
FILES = {
    'book.txt': make_text(3000), 'prompt.txt': 'the cat', 'README.md': ENGLISH,
    'novels/one.txt': make_text(3000), 'novels/two.txt': make_text(3000, seed=1),
    'notes/note.md': make_text(3000),
    'posts.jsonl': ''.join(json.dumps({'body': make_text(90, seed)}) + '\n' for seed in range(30)),
    'crawl.jsonl': ''.join(json.dumps({'text': text}) + '\n'
                           for text in (ENGLISH, ENGLISH, make_text(900))),
    'prompts.jsonl': '{"prompt": "the cat"}\n{"prompt": "a mat"}\n',
    'reviews.jsonl': ''.join(json.dumps({'text': make_text(30, seed), 'label': ['bad', 'good'][seed % 2]})
                             + '\n' for seed in range(60)),
    'new.jsonl': '{"text": "the cat"}\n{"text": "a mat"}\n',
    'talks.jsonl': ''.join(json.dumps({'messages': messages}) + '\n' for messages in TALKS),
}
LINKS = {'out-base': 'out-tiny-web', 'FOLDER': 'out-tiny-web'}  # models that the reader has
PROGRAMS = r'(python (-m )?[\w/]|torchrun |pytest|pip |bash |hf )'
PLACEHOLDER = r'[A-Z]{2}'  # FILE, data/NAME: the reader's own


def commands_of(readme):
    """
    Return the commands of a README: its sh blocks, its indented lines and its inline code.

    The commands of a .py file are those of its docstring.
    """
    text = (ROOT / readme).read_text(encoding='utf-8')
    text = text if readme.endswith('.md') else ast.get_docstring(ast.parse(text)) or ''
    lines = []
    for block in re.findall(r'^```(?:ba)?sh\n(.*?)^```', text, re.M | re.S):
        lines += block.replace('\\\n', ' ').splitlines()
    prose = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S).replace('\\\n', ' ')
    others = re.findall(r'^    (?:\$ )?(\S.*)', prose, re.M)
    others += [code.replace('\n', ' ') for code in re.findall(r'`([^`]+)`', prose)]
    lines += [line for line in others if re.match(PROGRAMS, line)]
    parts = [part for line in lines for part in re.sub(r'(^|\s+)#\s.*', '', line).split(' && ')]
    return [re.sub(r'\s+', ' ', part).strip() for part in parts if part.strip()]


def key_of(command):
    """Return the longest key of RUN, TESTED and NOT_RUN to which a command belongs, or None."""
    keys = [key for table in (RUN, TESTED, NOT_RUN) for key in table
            if command == key or key.endswith('*') and command.startswith(key[:-1])]
    return max(keys, key=len, default=None)


def program_of(command):
    """Return (file, arguments) of a command that runs Python or bash, ('', []) of another one."""
    words = [word for word in shlex.split(command) if not re.match(r'[A-Z_]+=', word)]
    if words[0] == 'torchrun':
        start = next(i for i, word in enumerate(words) if word == '-m' or word.endswith('.py'))
        words = ['torchrun', *words[start:]]
    elif words[0] not in ('python', 'bash'):
        return '', []
    if words[1] != '-m':
        return words[1], words[2:]
    path = words[2].replace('.', '/')
    return f'{path}/__main__.py' if (ROOT / path).is_dir() else f'{path}.py', words[3:]


@cache
def options_of(path, subcommand=''):
    """Return the settings of a script's page, or the options that its --help lists."""
    source = (ROOT / path).read_text(encoding='utf-8')
    if 'override(globals())' in source:
        return set(read_page(source))
    before, output = (sys.argv, sys.path[:]), io.StringIO()
    try:
        sys.argv = [path, *subcommand.split(), '--help']
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / path), run_name='__main__')
    finally:
        sys.argv, sys.path[:] = before
    return set(re.findall(r'--(\w+)', output.getvalue()))


@pytest.mark.parametrize('readme', [*READMES, *SCRIPTS])
def test_commands_exist(readme):
    """Scripts, modules, config files and settings."""
    for command in commands_of(readme):
        path, arguments = program_of(command)
        is_ours = NOT_RUN.get(key_of(command)) != 'other software'
        if not path or not is_ours or re.search(PLACEHOLDER, path):
            continue
        words = [word for word in arguments if not word.startswith('-')]
        named = [word for word in words if word.endswith('.py')]
        for file in [path, *(word for word in named if not re.search(PLACEHOLDER, word))]:
            assert (ROOT / file).is_file(), f'{readme}: {command}: no file {file}'
        names = {word[2:].partition('=')[0] for word in arguments if word.startswith('--')}
        subcommand = words[0] if words and '.' not in words[0] else ''
        unknown = names and names - {'help'} - options_of(path, subcommand)
        assert not unknown, f'{readme}: {command}: {path} has no {unknown}'


@pytest.mark.parametrize('readme', READMES)
def test_commands_are_listed(readme):
    """In RUN, TESTED or NOT_RUN. A program alone or with --help is a name in a sentence."""
    unlisted = []
    for command in commands_of(readme):
        path, arguments = program_of(command)
        if key_of(command) is None and (arguments not in ([], ['--help']) or not path):
            unlisted.append(command)
    assert not unlisted, f'add to RUN, TESTED or NOT_RUN of {__file__}: {unlisted}'


def test_tables_hold_nothing_else():
    """No key is in two tables or without a command, and each test of TESTED exists."""
    keys = [*RUN, *TESTED, *NOT_RUN]
    assert len(keys) == len(set(keys))
    used = {key_of(command) for readme in READMES for command in commands_of(readme)}
    assert set(keys) - used == set()
    tests = set()
    for path in (ROOT / 'tests').glob('*.py'):
        source = path.read_text(encoding='utf-8')
        tests |= {path.name, *re.findall(r'^def (test_\w+)', source, re.M)}
    assert set(TESTED.values()) - tests == set()


@pytest.mark.parametrize('readme', READMES)
def test_links_exist(readme):
    text = (ROOT / readme).read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)#:\s]+)(?:#[^)]*)?\)', text):
        assert (ROOT / readme).parent.joinpath(link).exists(), f'{readme}: no {link}'


def test_extras_exist():
    project = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    for readme in READMES:
        for extra in re.findall(r"'\.\[(\w+)\]'", (ROOT / readme).read_text(encoding='utf-8')):
            assert re.search(rf'^{extra} = \[', project, re.M), f'{readme}: no extra {extra}'


def change(command, settings):
    """Return a command with settings that replace those of the same name."""
    for setting in shlex.split(settings):
        old = re.compile(rf"(?<!\S){setting.partition('=')[0]}=('[^']*'|\S*)")
        command = f"{old.sub('', command)} {setting}"
    return command


def run(command, home, env):
    """Run a command in a copy of the repository; -> (exit status, output). Python alone is forked, all else by bash."""
    program, *argv = shlex.split(command)
    if program != 'python' or re.search(r'[|<>&;$*]', command):
        done = subprocess.run(['bash', '-c', command], cwd=home, env=env, text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout
    if argv[0] == '-m':
        del argv[0]
    done = Run(argv[0], argv[1:], home, env, typed='', home=home).wait()
    return done.code, done.out


@pytest.mark.slow
def test_commands_run(tmp_path):
    """Each command of RUN, in a copy of the repository, made small by its settings."""
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT,
                            capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(('tests/', 'bench/results/')):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding='utf-8')
    for name, target in LINKS.items():
        (tmp_path / name).symlink_to(target)
    path = f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}'
    env = {**os.environ, 'PATH': path, 'PYTHONPATH': str(tmp_path), 'PYTHONUTF8': '1'}
    commands = dict.fromkeys(command for readme in READMES for command in commands_of(readme))
    failures = []
    for key, settings in RUN.items():
        for command in commands:
            if key_of(command) == key:
                small = change(command, settings)
                code, out = run(small, tmp_path, env)
                if code:
                    failures.append(f'{small}\n{out}')
    assert not failures, '\n\n'.join(failures)
