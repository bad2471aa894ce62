"""
Checkpoints: one file that holds a whole run, written so that it is either complete or not there.

A checkpoint is a dict of tensors and plain values: nanoGPT's keys (model, optimizer, model_args, iter_num,
best_val_loss, config) and, beside them, version, tokenizer, chat_template, scaler, evals_since_best, train_time. Of a
run with LoRA `model` has the adapters alone, and `lora` says beside which model they were trained. Of a reward model
`model` has a Critic, and `reward_model` is True. Where best_val_loss is no loss, `measure` says what it is. It is read
with weights_only=True, which refuses anything that could run code. nanoGPT's own ckpt.pt reads the same.

In a run's out_dir, ckpt.pt is the last checkpoint, from which the run resumes, and best.pt the one with the lowest
validation loss. Random state is not among what is saved: batches and dropout are functions of (seed, step).
"""

import glob
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import sys
import time
import zipfile
from contextlib import suppress

import torch

from flatgpt import parallel
from flatgpt.files import lock_folder, replace_file, sync_folder

VERSION = 1  # of the layout described above; a file without the key is nanoGPT's


def save(out_dir, state, is_best):
    """
    Write `state` to out_dir/ckpt.pt, and to best.pt as well if it is the best: two names for the same bytes.

    The bytes go to a temporary file, which is fsynced and then renamed. Once this returns, they survive a power cut; if
    it raises OSError (disk full, no permission), the checkpoints that were there are untouched.
    """
    temporary = os.path.join(out_dir, 'ckpt.pt.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save({'version': VERSION, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        if is_best:  # first, so that a crash in between leaves a best.pt no older than ckpt.pt
            call_best(temporary)
        os.replace(temporary, os.path.join(out_dir, 'ckpt.pt'))
    except RuntimeError as error:
        if 'inline_container' not in str(error):  # torch's zip writer, which hides the OSError of the file it was given
            raise
        raise OSError(str(error).splitlines()[0]) from error
    finally:
        remove_temporaries(out_dir)
    sync_folder(out_dir)


def call_best(path):
    """Let best.pt be a second name of the checkpoint at `path`, in the same folder: a link, or else a copy."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, 'ckpt.pt.tmp-best')
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        with open(path, 'rb') as source, open(temporary, 'wb') as f:
            shutil.copyfileobj(source, f, 1 << 20)
            f.flush()
            os.fsync(f.fileno())
    os.replace(temporary, os.path.join(folder, 'best.pt'))


def remove_temporaries(out_dir):
    """Remove what a failed save, or a process killed while saving, left in out_dir."""
    for name in ('ckpt.pt', 'config.json', 'log.jsonl'):
        for path in glob.glob(os.path.join(glob.escape(out_dir), f'{name}.tmp*')):
            os.remove(path)


def open_folder(out_dir, settings, iter_num, version):
    """
    Make out_dir this process's own and ready for a run from step iter_num on: create it, lock it against other runs,
    remove what a killed one left half-written, write `settings`, a dict, to config.json.

    version: of the layout of the ckpt.pt the run resumes from, None if it starts anew. Resuming keeps what is there;
    nanoGPT's ckpt.pt (0) is also the only copy of its best weights, so it becomes best.pt too, before the next save
    replaces it. Starting anew moves the files of an earlier run; -> the folder they are in now, or None if there were
    none. Raises ValueError if out_dir can't be written or another process trains in it.
    """
    moved_to = None
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock_folder(out_dir, 'training in')
        remove_temporaries(out_dir)
        if version is None:
            moved_to = put_aside(out_dir)
        elif version == 0 and not os.path.exists(os.path.join(out_dir, 'best.pt')):
            call_best(os.path.join(out_dir, 'ckpt.pt'))
            sync_folder(out_dir)
        keep_log_until(out_dir, iter_num)
        replace_file(os.path.join(out_dir, 'config.json'), json.dumps(settings, indent=2).encode())
    except OSError as error:
        moved = f'; the earlier run in it is in {moved_to} now' if moved_to else ''
        raise ValueError(f'out_dir={out_dir!r} can not be written: {error}{moved}; free some space, or choose another '
                         f'with --out_dir') from error
    if moved_to:
        print(f'{out_dir} held an earlier run; it is in {moved_to} now')
    return moved_to


def load(path):
    """
    -> the checkpoint at `path`, its tensors on the CPU, prefixes of torch.compile and DDP removed from the names.
    Raises ValueError when there is none, it is damaged or incomplete, it holds more than data, or a newer flatgpt wrote
    it.
    """
    if not os.path.exists(path):
        raise ValueError(f'no checkpoint at {path}; train one first (python train.py --out_dir='
                         f'{os.path.dirname(path) or "."}) or name another --out_dir')
    try:
        if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):  # torch.load checks no checksums
            raise ValueError(f'the checksum of {bad} is wrong')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # by kind of damage: RuntimeError, EOFError, UnpicklingError, zipfile's, KeyError ...
        why = f'{type(error).__name__}: {str(error).splitlines()[0][:200]}' if str(error) else type(error).__name__
        best = os.path.join(os.path.dirname(path), 'best.pt')
        last = os.path.join(os.path.dirname(path), 'ckpt.pt')
        remedy = f'cp {best} {path}' if os.path.exists(best) and best != path else 'restore a copy (no best.pt here)'
        if path == best:
            remedy = 'restore a copy'
        if path == best and os.path.exists(last):
            remedy = 'take the last one with --which=last, or restore a copy'
        if isinstance(error, pickle.UnpicklingError):
            why = 'it was refused, as it asks for more than tensors and plain values and may run code; none was run'
        raise ValueError(f'{path} can not be read ({why}): it is damaged or truncated; {remedy}') from error
    required = {'model': dict, 'model_args': dict, 'iter_num': int, 'best_val_loss': (float, int, torch.Tensor)}
    lacking = [key for key in required if not isinstance(state, dict) or not isinstance(state.get(key), required[key])]
    if lacking:
        raise ValueError(f'{path} holds no checkpoint: expected a dict with the keys {", ".join(required)}, but it has '
                         f'no {", ".join(lacking)}')
    if state.get('version', 0) > VERSION:
        raise ValueError(f'{path} has layout version {state["version"]}, this flatgpt reads up to {VERSION}; update it')
    # .attn.bias is no parameter: nanoGPT stores its causal mask there, where torch has no fused attention
    state['model'] = {k.removeprefix('module.').removeprefix('_orig_mod.'): v for k, v in state['model'].items()
                      if not k.endswith('.attn.bias')}
    if 'version' not in state:
        state['model_args'] = {**state['model_args'], 'mlp': 'gelu_erf'}  # nanoGPT's MLP uses the exact GELU
    return state


def path_in(out_dir, which='best'):
    """best.pt of a run (which='best', where there is one) or ckpt.pt (which='last')."""
    path = os.path.join(out_dir, 'best.pt')
    return path if which == 'best' and os.path.exists(path) else os.path.join(out_dir, 'ckpt.pt')


def put_aside(out_dir):
    """
    Move the files of an earlier run in out_dir to out_dir/previous-N, so that a new one loses nothing.
    -> that folder, or None if there was no checkpoint.
    """
    if not any(os.path.exists(os.path.join(out_dir, name)) for name in ('ckpt.pt', 'best.pt')):
        return None
    n = 1
    while os.path.exists(os.path.join(out_dir, f'previous-{n}')):
        n += 1
    folder = os.path.join(out_dir, f'previous-{n}')
    os.makedirs(folder)
    for name in ('best.pt', 'log.jsonl', 'config.json', 'ckpt.pt'):  # ckpt.pt last: until then the run can be resumed
        if os.path.exists(os.path.join(out_dir, name)):
            os.replace(os.path.join(out_dir, name), os.path.join(folder, name))
    return folder


def keep_log_until(out_dir, iter_num):
    """Drop log.jsonl's lines from step iter_num on: a run killed after its last checkpoint takes those steps again."""
    path = os.path.join(out_dir, 'log.jsonl')
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding='utf-8') as f:
        for line in f:
            try:
                record = json.loads(line)
            except ValueError:  # half a line: the machine lost power
                continue
            # an evaluation at step n comes before update n and was saved with it; the line of update n comes after
            was_saved = 'val_loss' in record and iter_num > 0
            if record['step'] < iter_num + was_saved:
                kept.append(line)
    replace_file(path, ''.join(kept).encode())


class Interrupt:
    """
    SIGINT and SIGTERM only ask a run to stop, which it does between two steps: `reason` says so then. A second Ctrl-C,
    more than a second later, is obeyed at once. is_main: of several processes one alone answers a Ctrl-C.
    """

    def __init__(self, is_main=True):
        self.is_main, self.reason, self.time = is_main, None, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if number == signal.SIGINT and self.reason == 'stopped by SIGINT' and time.monotonic() > self.time + 1:
            raise KeyboardInterrupt
        if self.is_main and number == signal.SIGINT and self.reason is None:
            with suppress(OSError):  # nobody reads it. print could be what is being interrupted, and can not be called
                os.write(2, b'\nfinishing this step, then saving; Ctrl-C again stops at once, unsaved\n')
        self.reason, self.time = f'stopped by {signal.Signals(number).name}', time.monotonic()


def command(**changes):
    """The command line of this run with some settings changed, for the messages that say what to do next."""
    kept = [a for a in sys.argv[1:] if a.removeprefix('--').split('=')[0] not in changes]
    size, here = parallel.from_environment().size, int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    launch = ['python'] if size == 1 else ['torchrun', '--standalone', f'--nproc_per_node={here}']
    if here < size:  # on several machines each has options of its own
        launch = ['torchrun', '...']
    spec = sys.modules['__main__'].__spec__
    program = ['-m', spec.name] if spec else [sys.argv[0]]
    return shlex.join([*launch, *program, *kept, *(f'--{key}={value}' for key, value in changes.items())])


def say_out_of_memory(error, step, saved_step, changes, otherwise):
    """
    Say which command takes the same steps with less memory: this one with changes, from the checkpoint of saved_step
    if that is not 0; if there are no changes, what else.
    """
    if changes and saved_step:
        changes['init_from'] = 'resume'
    remedy = f'The same mathematics in smaller pieces:\n  {command(**changes)}' if changes else otherwise
    print(f'out of memory at step {step} ({str(error).splitlines()[0][:120]}). {remedy}', file=sys.stderr)


def progress_of(state):
    """
    Where a run stands, of its checkpoint, or of None if it begins: -> (steps done, lowest val loss, seconds of training
    without evaluations, layout version of the checkpoint or None)
    """
    if state is None:
        return 0, math.inf, 0.0, None
    return state['iter_num'], state['best_val_loss'], state['train_time'], state['version']


def log(out_dir, say=print, **record):
    """Append a line to out_dir/log.jsonl; a disk without room for it is no reason to stop. say: what prints that."""
    path = os.path.join(out_dir, 'log.jsonl')
    size = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(record) + '\n')
    except OSError as error:
        with suppress(OSError):  # it could not even be opened
            os.truncate(path, size)  # the part of the line that still found room
        say(f'WARNING: {path} lacks the line of step {record["step"]}: {error}')


def try_save(out_dir, state, is_best, say=print):
    """save(), and say so; -> whether it could be written. A full disk is no reason to stop, either."""
    path, step = os.path.join(out_dir, 'ckpt.pt'), state['iter_num']
    try:
        save(out_dir, state, is_best)
    except OSError as error:
        say(f'WARNING: {path} could not be saved at step {step} ({error}). What was there is untouched; free some '
            f'space before the next save')
        return False
    say(f'saved {path} at step {step}' + (' (best so far)' if is_best else ''))
    return True
