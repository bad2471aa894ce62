"""
Run every script in forked children, for bench.faults and bench.streams.

    place = make_place(folder)          # datasets, models and texts that the scripts read
    server = Server(place)              # this process, with everything imported
    before = server.prepare(script)     # what the script finds in PLACE/w
    code, out = server.run(script.command)

A child is what `python SCRIPT ...` would be, with its own streams and exit status. Starting Python
and importing torch would take most of a case's time.
"""

import atexit
import ctypes
import gc
import hashlib
import importlib
import json
import mmap
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from bench import common
from configurator import UserError
from flatgpt import checkpoint
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, ByteTokenizer, chat

# what a process imports before it is forked
MODULES = ('torch._dynamo', 'torch.distributed', 'torch.nn.parallel', 'tqdm', 'regex', 'tiktoken',
           'jinja2', 'safetensors.torch', 'data.device', 'data.encode', 'data.conversations',
           'data.scoring', 'flatgpt.decoding', 'flatgpt.huggingface', 'flatgpt.lora',
           'flatgpt.optim', 'posttrain.labels', 'posttrain.losses', 'posttrain.policy',
           'posttrain.reward_model', 'posttrain.tasks.tiny_chat')
TRAIN = ['train.py', '--dataset=tiny', '--device=cpu', '--dtype=float32', '--compile=False',
         '--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=16', '--batch_size=2',
         '--gradient_accumulation_steps=1', '--eval_interval=2', '--eval_iters=1',
         '--warmup_iters=0', '--learning_rate=1e-3', '--max_iters=4', '--out_dir=w/out']
POSTTRAIN = ['--init_from=chat', '--device=cpu', '--dtype=float32', '--max_iters=4',
             '--eval_interval=2', '--log_interval=1', '--out_dir=w/out']
RL = ['posttrain.rl', *POSTTRAIN, '--task=tiny_chat', '--kinds=addition', '--prompts_per_step=2',
      '--group_size=2', '--max_new_tokens=4', '--train_examples=10', '--eval_examples=4']
PREPARE = ['data/text/prepare.py', '--input=docs.jsonl', '--out_dir=w/docs', '--shard_tokens=1500',
           '--num_proc=1']
CHAT = ['data/chat/prepare.py', '--input=talks.jsonl', '--tokenizer=chat', '--out_dir=w/talks',
        '--block_size=64', '--val_fraction=0.3']
CLASSIFY = ['posttrain.classify', '--device=cpu', '--dtype=float32', '--out_dir=w/out']
LEARN = [*CLASSIFY, '--init_from=base', '--data=reviews.jsonl', '--val_fraction=0.3',
         '--batch_size=4', '--warmup_iters=0', '--eval_interval=2', '--log_interval=1']
PAIRS = ['posttrain.pairs', '--init_from=chat', '--device=cpu', '--dtype=float32',
         '--task=tiny_chat', '--kinds=addition', '--num_samples=8', '--n=4', '--max_new_tokens=60',
         '--batch_size=16', '--judge=reward', '--reward_model=w/out', '--out=w/pairs.jsonl']
DECODE = ['--out_dir=base', '--device=cpu', '--dtype=float32', '--compile=False',
          '--max_new_tokens=8']


# Scripts ------------------------------------------------------------------------------------------


@dataclass
class Script:
    """Describe a command, what it finds, and its result, a function of the folder w.

    before: commands that run before it. once: it refuses to write over its result.
    prints: its output is its result, and goes to the file w/out.txt.
    """

    name: str
    command: list
    result: Callable
    before: list = field(default_factory=list)
    once: bool = False
    prints: bool = False


def run_result(place):
    """Return hashes of a run's checkpoints, and its log's steps and losses."""
    out = f'{place}/w/out'
    last, best = (checkpoint.load(f'{out}/{name}') for name in ('ckpt.pt', 'best.pt'))
    records = {name: {key: value for key, value in state.items()
                      if key not in ('train_time', 'config', 'model', 'optimizer')}
               for name, state in (('ckpt.pt', last), ('best.pt', best))}
    return {'weights': digest_of([last['model'], last['optimizer']]),
            'log': logged(f'{out}/log.jsonl'), 'best': digest_of([best['model'], records])}


def digest_of(value):
    """Hash nested dicts and lists of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def logged(path):
    """Return [(step, loss or val_loss), ...] of a log without half lines."""
    with open(path, encoding='utf-8') as file:
        records = [json.loads(line) for line in file]
    return [(record['step'], record.get('val_loss', record.get('loss'))) for record in records]


def contents(folder):
    """Return {path: bytes} of all files below a folder."""
    files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, 'rb') as file:
                files[os.path.relpath(path, folder)] = file.read()
    return files


def files_result(place):
    return contents(f'{place}/w')


def file_result(name):
    """Return the function that reads a file of the folder w, and its {name}.part."""
    def result(place):
        files = {path: content for path, content in contents(f'{place}/w').items()
                 if path.startswith(name)}
        if name not in files:
            raise UserError(f'there is no {name}')
        return files
    return result


def dataset_result(name):
    """Return the function that reads a dataset; without its train.bin there is none."""
    def result(place):
        files = contents(f'{place}/w/{name}')
        if 'train.bin' not in files:
            raise UserError('there is no dataset')
        return files
    return result


def printed_result(place):
    """Return what was printed, without the seconds."""
    with open(f'{place}/w/out.txt', encoding='utf-8') as file:
        return without_numbers(file.read())


def result_of(script, place):
    """Return a script's result, or the text of the error where there is none."""
    try:
        return script.result(place)
    except (ValueError, OSError) as error:
        return str(error)


def without_numbers(text):
    """Return a text's words without numbers, such as seconds."""
    words = text.split()
    return ' '.join(word for word in words if not word.strip('},').replace('.', '').isdigit())


def without_input(command):
    """Return a command without its --input, which it takes once."""
    return [argument for argument in command if not argument.startswith('--input=')]


def scripts():
    """Return all scripts; those that print come last."""
    half = [*TRAIN, '--max_iters=2']
    other = [*TRAIN, '--seed=1', '--max_iters=2']
    reward = ['posttrain.reward', *POSTTRAIN, '--data=pairs.jsonl', '--val_fraction=0.3',
              '--batch_size=4']
    resume = '--init_from=resume'
    docs = dataset_result('docs')
    return [
        Script('train', [*TRAIN, '--init_from=auto'], run_result),
        Script('train resumed', [*TRAIN, resume], run_result, [half]),
        Script('train over a run', [*TRAIN, '--init_from=scratch'], run_result, [other]),
        Script('train, best only', [*TRAIN, '--init_from=auto', '--eval_interval=1',
                                    '--always_save_checkpoint=False', '--learning_rate=0.1'],
               run_result),
        Script('train LoRA', [*TRAIN, '--init_from=base', '--lora_rank=2'], run_result),
        Script('reward', reward, run_result),
        Script('reward resumed', [*reward, resume], run_result, [[*reward, '--max_iters=2']]),
        Script('rl', RL, run_result),
        Script('rl ppo resumed', [*RL, '--algorithm=ppo', resume], run_result,
               [[*RL, '--algorithm=ppo', '--max_iters=2']]),
        Script('dpo', ['posttrain.dpo', *POSTTRAIN, '--pairs=pairs.jsonl', '--val_fraction=0.3',
                       '--prompts_per_step=4'], run_result),
        Script('classify', [*LEARN, '--max_iters=4'], run_result),
        Script('classify resumed', [*LEARN, '--max_iters=4', resume], run_result,
               [[*LEARN, '--max_iters=2']]),
        Script('classify, predict', [*CLASSIFY, '--predict=reviews.jsonl', '--out=w/labels.jsonl'],
               file_result('labels.jsonl'), [[*LEARN, '--max_iters=2']], once=True),
        Script('pairs', PAIRS, file_result('pairs.jsonl'), [[*reward, '--max_iters=2']], once=True),
        Script('prepare text', PREPARE, docs),
        Script('prepare text over another', PREPARE, docs,
               [[*without_input(PREPARE), '--input=old.jsonl']]),
        Script('prepare chat', CHAT, dataset_result('talks')),
        Script('prepare chat over another', CHAT, dataset_result('talks'),
               [[*without_input(CHAT), '--input=old_talks.jsonl']]),
        Script('clean', ['data.clean', '--input=docs.jsonl', '--out=w/clean.jsonl', '--exact',
                         '--num_proc=1'], files_result,
               [['data.clean', '--input=old.jsonl', '--out=w/clean.jsonl', '--exact',
                 '--num_proc=1']]),
        Script('tokenizer train', ['tokenizer', 'train', '--input=text.txt', '--vocab_size=300',
                                   '--num_proc=1', '--out=w/bpe.json'], files_result,
               [['tokenizer', 'train', '--input=text.txt', '--kind=char', '--out=w/bpe.json']]),
        Script('tokenizer export', ['tokenizer', 'export', '--tokenizer=bpe.json',
                                    '--out=w/hf'], files_result),
        Script('batch', ['flatgpt.batch', *DECODE, '--prompts=prompts.jsonl',
                         '--out=w/answers.jsonl', '--batch_size=1'], files_result, once=True),
        Script('export', ['flatgpt.export', '--out_dir=base', '--out=w/hf'], files_result,
               once=True),
        Script('eval', ['eval.py', '--out_dir=base', '--device=cpu', '--dataset=tiny'],
               printed_result, prints=True),
        Script('tokenizer view', ['tokenizer', '--text=a text', '--tokenizer=byte'],
               printed_result, prints=True),
        Script('sample', ['sample.py', *DECODE, '--num_samples=3'], printed_result, prints=True)]


# The place ----------------------------------------------------------------------------------------


def make_place(place):
    """Fill a folder with all that the scripts read."""
    chance = random.Random(0)

    def text(n):
        return ''.join(chance.choice('etaoin shrdlu\n') for _ in range(n))

    def write(name, objects):
        with open(f'{place}/{name}', 'w', encoding='utf-8') as file:
            file.writelines(json.dumps(value) + '\n' for value in objects)

    common.make_dataset(place, 3000, 0)
    with open(f'{place}/text.txt', 'w', encoding='utf-8') as file:
        file.write(text(5000))
    for name, n in (('docs', 120), ('old', 110)):
        write(f'{name}.jsonl', ({'text': text(60)} for _ in range(n)))
    for name in ('talks', 'old_talks'):
        write(f'{name}.jsonl', ({'messages': [{'role': 'user', 'content': text(9)},
                                              {'role': 'assistant', 'content': text(9)}]}
                                for _ in range(30)))
    write('pairs.jsonl', ({'messages': [{'role': 'user', 'content': text(9)}],
                           'chosen': text(5), 'rejected': text(6)} for _ in range(30)))
    write('reviews.jsonl', ({'text': text(9), 'label': chance.choice(('good', 'bad'))}
                            for _ in range(30)))
    write('prompts.jsonl', ({'prompt': text(5)} for _ in range(4)))
    special = {token: 256 + i for i, token in enumerate(chat.SPECIAL_TOKENS)}
    save_model(f'{place}/base', ByteTokenizer(), None)
    save_model(f'{place}/chat', BPETokenizer([], None, special), chat.TEMPLATE)
    BPETokenizer([], None, special).save(f'{place}/bpe.json')
    return place


def save_model(folder, tokenizer, template):
    """Save a random model with bytes as tokens, as train.py would."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=128,
                          vocab_size=-(-tokenizer.vocab_size // 8) * 8))
    os.makedirs(folder)
    checkpoint.save(folder, {
        'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': 1,
        'best_val_loss': 5.0, 'config': {'dataset': 'tiny'}, 'tokenizer': tokenizer.to_dict(),
        'chat_template': template}, is_best=False)


# Children -----------------------------------------------------------------------------------------

NONE, KILL, TERM, NO_SPACE, IO_ERROR, FULL = range(6)  # as in faults.c


def build_library(folder):
    """Compile faults.c; -> its path. Raises UserError without a C compiler."""
    source, path = os.path.join(common.ROOT, 'bench', 'faults.c'), f'{folder}/faults.so'
    try:
        subprocess.run(['cc', '-shared', '-fPIC', '-O2', '-o', path, source, '-ldl'], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f'{source} cannot be compiled: {error}') from error
    return path


def python_stream(descriptor):
    """Return the stream that Python makes of a descriptor when it starts."""
    try:
        os.fstat(descriptor)
        errors = 'backslashreplace' if descriptor == 2 else None
        return open(descriptor, 'w' if descriptor else 'r', closefd=False, errors=errors,
                    buffering=1 if descriptor == 2 or os.isatty(descriptor) else -1)
    except OSError:
        return None


def exit_status(function):
    """Call a function; -> the exit status of a process that ends with it."""
    try:
        function()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


class Server:
    """Fork children that run scripts in a place and write to its folder w."""

    def __init__(self, place):
        torch.set_num_threads(1)
        for name in MODULES:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # a child would copy the pages that its collector visits
        self.place, self.library = os.path.abspath(place), None
        self.shared = mmap.mmap(-1, 1 << 17)  # struct record

    def load_library(self):
        """Take the library that this process was started with, for run(fault=...)."""
        self.library = ctypes.CDLL(None)
        self.library.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_void_p]

    def operations(self):
        """Return the kinds of the operations of the last run, a letter each."""
        n = int.from_bytes(self.shared[:8], sys.byteorder)
        return self.shared[17 : 17 + n].decode()

    def start(self, command, fault=NONE, number=0, **streams):
        """Fork a child for a command; -> its process id. streams: see execute()."""
        self.shared[:16] = bytes(16)
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            code = self.execute(command, (fault, number), **streams)
        except BaseException as error:
            os.write(2, f'the child failed: {type(error).__name__}: {error}\n'.encode())
        finally:
            os._exit(code)

    def execute(self, command, fault, output=None, setup=None):
        """Become `python command` or `python -m command`; -> its exit status.

        output: the file that takes its standard output. setup: function that changes descriptors
        first, and may return (stdout, stderr).
        """
        os.chdir(self.place)
        atexit._clear()  # what the modules of this process have registered, for its own end
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(output or f'{self.place}/out.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(os.open(f'{self.place}/err.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where this runs under nohup
        streams = setup() if setup else None
        sys.stdin, *standard = (python_stream(fd) for fd in range(3))
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = streams or standard
        script, *arguments = command
        is_file = script.endswith('.py')
        script = os.path.join(common.ROOT, script) if is_file else script
        sys.argv = [script, *arguments]
        if self.library:
            shared = ctypes.addressof(ctypes.c_char.from_buffer(self.shared))
            self.library.arm(f'{self.place}/w'.encode(), fault[1], fault[0], shared)
        if is_file:
            code = exit_status(lambda: runpy.run_path(script, run_name='__main__'))
        else:
            code = exit_status(lambda: runpy.run_module(script, run_name='__main__',
                                                        alter_sys=True))
        for end in (threading._shutdown, atexit._run_exitfuncs, sys.stdout and sys.stdout.flush):
            code = code or end and exit_status(end)
        return code or 0

    def wait(self, child, seconds=60):
        """Wait for a child; -> its exit status, negative for a signal, None for a hang."""
        end = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.002)

    def run(self, script, fault=NONE, number=0):
        """Run a script; -> its exit status, and what it printed."""
        output = f'{self.place}/w/out.txt' if script.prints else None
        code = self.wait(self.start(script.command, fault, number, output=output))
        return code, self.printed(output)

    def printed(self, output=None):
        text = ''
        for path in (output or f'{self.place}/out.txt', f'{self.place}/err.txt'):
            if os.path.exists(path):
                with open(path, encoding='utf-8', errors='replace') as file:
                    text += file.read()
        return text

    def reset(self, before=None):
        """Make the folder w new, as a copy of the folder `before`."""
        shutil.rmtree(f'{self.place}/w', ignore_errors=True)
        if before:
            shutil.copytree(before, f'{self.place}/w')
        else:
            os.mkdir(f'{self.place}/w')

    def prepare(self, script, folder):
        """Run a script's commands `before` and keep a copy of w in `folder`."""
        self.reset()
        for command in script.before:
            code, text = self.run(Script('', command, None))
            if code:
                raise UserError(f'{" ".join(command)} failed:\n{text}')
        shutil.copytree(f'{self.place}/w', folder)
        return folder
