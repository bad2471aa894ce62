"""
Save and load checkpoints, and keep the folder of a run.

A checkpoint is one file with a dict of tensors and plain values. It has nanoGPT's keys (model,
optimizer, model_args, iter_num, best_val_loss, config) and version, tokenizer, chat_template,
scaler, evals_since_best, train_time, seen, wandb_id, and data, a hash of the text. With LoRA,
`model` holds the adapters and `lora` names their base. A reward model has `reward_model`: True, a
classifier the names of its `classes`.
`measure` names the quantity in best_val_loss where it is no loss. Files are read with
weights_only=True, which refuses anything that could run code, and checked by entries.py.

A sharded run's files name a folder with the tensors, see shards.py.

In out_dir, ckpt.pt is the last checkpoint, from which a run resumes, best.pt the one with the
lowest validation loss, ckpt-STEP.pt one that keep_every keeps. No random state is saved: batches
and dropout are functions of (seed, step).
"""

import errno
import json
import math
import os
import pickle
import shlex
import sys
import zipfile
from functools import partial
from threading import Lock

import torch

from configurator import UserError, explain_errors
from flatgpt import outdir, parallel, signals
from flatgpt.entries import Checkpoint, Scaled, check_content, read_torch
from flatgpt.files import no_link, replacing
from flatgpt.outdir import LINES, identity, lock_run, open_folder, put_aside, remove_shards
from flatgpt.owners import local
from flatgpt.runtime import machine_size, out_of_memory
from flatgpt.saving import Saver
from flatgpt.tracking import Tracker

VERSION = 1  # version of the layout above; nanoGPT's files have no such key


def save(out_dir, state, is_best, numbered=()):
    """Write `state` to out_dir/ckpt.pt; a best one gets a second name, best.pt.

    numbered: one more name, or none. Raises OSError (disk full, no permission) and leaves the
    earlier checkpoints as they are.
    """
    # a crash in between leaves a best.pt that is no older than ckpt.pt
    names = ['ckpt.pt', *numbered, 'best.pt'] if is_best else ['ckpt.pt', *numbered]
    try:
        with replacing(*(os.path.join(out_dir, name) for name in names)) as file:
            torch.save({'version': VERSION, **state}, file)
    except RuntimeError as error:
        if 'inline_container' not in str(error):  # torch's zip writer hides the OSError
            raise
        raise OSError(str(error).splitlines()[0]) from error


def no_checkpoint(path):
    """Return the error for a checkpoint that does not exist."""
    out_dir = os.path.dirname(path) or '.'
    return UserError(f'no checkpoint at {path}; train one first (python train.py CONFIG '
                     f'--out_dir={out_dir}) or name another --out_dir')


def load(path, part='all'):
    """Read the checkpoint at `path`; -> dict, its tensors on the CPU.

    part: of a sharded one, see shards.read(). Prefixes of torch.compile and DDP are removed from
    the names of the weights. Raises UserError for a file that is missing, damaged, incomplete, more
    than data, or of a newer version.
    """
    out_dir = os.path.dirname(path) or '.'
    if not os.path.isfile(path):
        raise no_checkpoint(path)
    try:
        state = read_torch(path)
    except PermissionError:
        raise
    except MemoryError as error:
        raise UserError(f'{path} needs more memory than there is, or is damaged') from error
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, KeyError, zipfile's ...
        why = ': '.join([type(error).__name__, *str(error).splitlines()[:1]])[:200]
        fact = f'is damaged or truncated ({why})'
        if isinstance(error, pickle.UnpicklingError):
            fact = ('is damaged or truncated, or holds more than tensors and plain values, which '
                    'could run code: refused')
        other = next((name for name in ('ckpt.pt', 'best.pt') if name != os.path.basename(path)
                      and zipfile.is_zipfile(os.path.join(out_dir, name))), None)
        best, last = (os.path.join(out_dir, name) for name in ('best.pt', 'ckpt.pt'))
        remedy = {'best.pt': f'cp {best} {last}',
                  'ckpt.pt': 'take the last one with --which=last',
                  None: 'restore a copy (there is no best.pt here)'}[other]
        raise UserError(f'{path} {fact}; {remedy}') from error
    version = state.get('version') if isinstance(state, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UserError(f'{path} has layout version {version}; this flatgpt reads up to '
                        f'{VERSION}. Update flatgpt')
    state = check_content(state, Checkpoint, path)
    if state.get('scaler'):  # {}: there was none
        check_content(state, Scaled, path)
    if not state['best_val_loss'] > -math.inf:
        raise UserError(f'{path} has best_val_loss={state["best_val_loss"]}; restore a copy')
    if sum(weight.nbytes for weight in state['model'].values()) > 2 * os.path.getsize(path):
        raise UserError(f'{path} has weights larger than the file; restore a copy')  # tied: twice
    if 'shards' in state:
        if 'optimizer' not in state:
            raise UserError(f'{path} names shards, but has no optimizer; restore a copy')
        from flatgpt import shards

        state = shards.read(path, state, part)
    # .attn.bias is nanoGPT's causal mask, which it stores where torch has no fused attention
    state['model'] = {name.removeprefix('module.').removeprefix('_orig_mod.'): weight
                      for name, weight in state['model'].items() if not name.endswith('.attn.bias')}
    if 'version' not in state:
        state['model_args'] = {**state['model_args'], 'mlp': 'gelu_erf'}  # nanoGPT's exact GELU
    return state


class Run:
    """Hold the folder of a run, its progress and its requests to stop.

    step: updates done; saved_step: that of ckpt.pt; train_time: seconds without evaluations; seen:
    tokens, pairs or prompts drawn so far, None in old checkpoints. They continue from `state`, the
    checkpoint that the run resumes. From its construction on, signals only set `requested`, see
    signals.catch(). The loop obeys stop_reason between two steps. A single process takes it from
    `requested`; several must agree on it first. folder: False writes nothing.
    """

    def __init__(self, out_dir, settings, state=None, world=None, folder=True):
        state, self.world = state or {'version': None}, world or parallel.World()
        self.out_dir, self.settings, self.say = out_dir, settings, print
        self.wandb = self.folder = None
        self.path = os.path.join(out_dir, 'ckpt.pt')
        self.step = self.start = self.saved_step = self.tried_step = state.get('iter_num', 0)
        self.best_val_loss = float(state.get('best_val_loss', math.inf))
        self.evals_since_best = state.get('evals_since_best', 0)
        self.train_time, self.seen = state.get('train_time', 0.0), state.get('seen')
        self.wandb_id = state.get('wandb_id')
        if self.world.is_main and folder:
            self.folder = lock_run(out_dir)  # what can fail comes before what moves files
            if settings.get('wandb_log'):
                self.wandb = Tracker(settings, self.wandb_id)
                self.wandb_id = self.wandb.id
            moved_to = open_folder(out_dir, settings, self.step, state.get('version', 0))
            if self.step and self.best_val_loss == math.inf:  # its loss compares with no other
                moved_to = put_aside(out_dir, best_alone=True)
            if moved_to:
                print(f'{out_dir} held files of an earlier run; they are now in {moved_to}')
        self.stop_reason = self.requested = None
        self.output_lost, self.unwritten = False, dict.fromkeys(LINES, b'')
        self.saved_best, self.saver, self.lock = self.best_val_loss, Saver(), Lock()
        signals.catch(self.request, self.world.is_main)

    def request(self, reason):
        """Ask the run to stop after this step."""
        self.requested = reason
        if self.world.size == 1:
            self.stop_reason = reason

    def drawn(self, n):
        """Return how many items the steps so far have drawn. n: of one step."""
        if self.seen is None:  # nanoGPT's checkpoint, or an old one
            self.seen = self.step * n
        return self.seen

    def advance(self, n, seconds):
        """Count an update that drew n items and took so many seconds."""
        self.seen = self.drawn(n) + n
        self.step += 1
        self.train_time += seconds

    def is_due(self, interval, last, first=True):
        """Return whether to evaluate before this step, or at the end, step `last`."""
        is_new = self.step > self.start or (self.step == 0 and first)
        return is_new and (self.step % interval == 0 or self.step >= last)

    def log(self, **record):
        """Append a line to log.jsonl, which a full disk delays with a warning."""
        if (lost := getattr(sys.stdout, 'lost', None)) and not self.output_lost:
            self.output_lost, record['warning'] = True, f'standard output was lost: {lost}'
        record['train_time'] = round(self.train_time, 3)
        self.append('log.jsonl', record)
        if self.wandb:
            self.wandb.log(record)

    def append(self, name, record):
        """Append a line to a file in outdir.LINES."""
        self.unwritten[name] += (json.dumps(record) + '\n').encode()
        self.write_lines(name)

    def write_lines(self, name):
        """Append the lines that are not in this file yet."""
        path, lines = os.path.join(self.out_dir, name), self.unwritten[name]
        try:
            self.keep_folder()
            with open(path, 'ab', buffering=0, opener=no_link) as file:
                size = file.tell()
                if file.write(lines) < len(lines):
                    file.truncate(size)  # no half lines
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten[name] = b''
        except (OSError, UserError) as error:
            self.say(f'WARNING: {path} lacks the last lines until its disk takes them: {error}')

    def keep_folder(self):
        """Make out_dir again if somebody has deleted or replaced it."""
        with self.lock:  # a save runs in a thread
            if identity(self.out_dir) != self.folder:
                self.say(f'WARNING: {self.out_dir} is gone; it is made again')
                self.folder = lock_run(self.out_dir)
                open_folder(self.out_dir, self.settings, self.step, None)

    def evaluated(self, val_loss, state_of, always_save=True):
        """Save after an evaluation: always, or else only if val_loss is the lowest so far.

        state_of: function -> the checkpoint's content beside the run's own numbers. Step 0 is
        not saved, so it sets no record. A val_loss that is not finite stops the run unsaved.
        """
        if not math.isfinite(val_loss):
            self.stop_not_finite(f'val loss is {val_loss}')
        self.settle()
        is_best = val_loss < self.best_val_loss
        self.evals_since_best = 0 if is_best else self.evals_since_best + 1
        if self.step and (is_best or always_save):
            self.best_val_loss = min(val_loss, self.best_val_loss)
            self.save(state_of, is_best)

    def keep(self, state_of):
        """Save at the multiples of keep_every, unless an evaluation did; see write()."""
        if self.is_kept(self.step) and self.tried_step < self.step:
            self.settle()
            self.save(state_of)

    def is_kept(self, step):
        """Return whether the checkpoint of a step is kept as ckpt-STEP.pt."""
        interval = self.settings.get('keep_every')
        return bool(interval and step and step % interval == 0)

    def settle(self):
        """Wait for the last save; all processes take over what the main one has saved."""
        self.saver.wait()
        self.saved_step, self.saved_best = self.world.from_main((self.saved_step, self.saved_best))
        self.best_val_loss = self.saved_best  # the best is the best on disk

    def save(self, state_of, is_best=False):
        """Write ckpt.pt, in a thread if memory has room; see write() and settle().

        Weights that are not finite stop the run unsaved.
        """
        self.tried_step, state = self.step, state_of()
        weights = [*state['model'].values(), *state.get('value_model', {}).values()]
        is_sharded = any(weight is not local(weight) for weight in weights)
        are_finite = [torch.stack(local(weight).aminmax()).isfinite().all() for weight in weights
                      if local(weight).numel()]
        if self.world.sum([not torch.stack(are_finite).all()])[0]:
            self.stop_not_finite('the weights are not finite')
        state.update(iter_num=self.step, best_val_loss=self.best_val_loss, seen=self.seen,
                     evals_since_best=self.evals_since_best, train_time=self.train_time,
                     config=dict(self.settings), wandb_id=self.wandb_id)
        for name in filter(self.unwritten.get, LINES):  # a resumed run does not repeat them
            self.write_lines(name)
        if self.world.is_main or is_sharded:
            self.saver.start(partial(self.write, is_best, is_sharded), state)

    def write(self, is_best, is_sharded, state):
        """Write a checkpoint. A full disk prints a warning."""
        step, problem = state['iter_num'], None
        numbered = [f'ckpt-{step}.pt'] * self.is_kept(step)
        try:
            if self.world.is_main:
                self.keep_folder()
        except (OSError, UserError) as error:
            problem = error
        try:
            if is_sharded:
                from flatgpt import shards  # takes a second to import

                state = shards.write(self.out_dir, state, self.world.writers, problem)
            elif problem:
                raise problem
            if self.world.is_main:
                save(self.out_dir, state, is_best, numbered)
                remove_shards(self.out_dir)
        except (OSError, UserError) as error:
            line = (f'WARNING: {self.path} could not be saved at step {step} ({error}). '
                    f'The one before is untouched; free some space before the next save')
        else:
            self.saved_step, self.saved_best = step, state['best_val_loss']
            line = ', '.join([f'saved {self.path} at step {step}' + ' (best so far)' * is_best,
                              *(f'kept as {name}' for name in numbered)])
        if self.world.is_main:
            self.say(line)

    def finish(self, state_of):
        """Save the last state; -> whether the run is complete, else print its command."""
        if self.tried_step < self.step:
            self.save(state_of)
        self.settle()
        if self.stop_reason:
            self.end('stopped', self.stop_reason)
        if self.world.is_main:
            print(f'draw its curves:\n  {outdir.command_to_draw(self.out_dir)}')
            if self.stop_reason:
                print(f'{self.stop_reason} after step {self.step}. To go on:\n  {self.command()}')
        return not self.stop_reason

    def end(self, how, reason):
        """Log that the run ends before its last step: stopped, not finite or crashed."""
        if self.folder:  # of the main process alone
            self.log(step=self.step, end=how, reason=reason)

    def close(self):
        """Finish wandb's run. Raises SystemExit if the last state is not on disk."""
        if self.wandb:
            self.wandb.finish()
        if self.saved_step < self.step:
            raise SystemExit(f'the state of step {self.step} is not saved; {self.path} is older')

    def stop_not_finite(self, fact, remedy='Try a lower --learning_rate, or --dtype=float32'):
        """End the run without saving; the last checkpoint stays as it is."""
        self.saver.wait()
        self.end('not finite', fact)
        where = (f'{self.path} is of step {self.saved_step}' if self.saved_step
                 else 'there is no checkpoint yet')
        raise SystemExit(f'step {self.step}: {fact}. Stopped without saving; {where}. {remedy}; '
                         f'draw its curves: {outdir.command_to_draw(self.out_dir)}')

    def explain_out_of_memory(self, smaller, otherwise):
        """Install a sys.excepthook that prints a command which needs less memory.

        smaller: settings that take the same steps in smaller pieces; {}: there are none, and the
        text `otherwise` is printed.
        """
        def explain(kind, error, trace):
            self.end('crashed', f'{kind.__name__}: {error}'[:200])
            if not out_of_memory(error):
                return explain_errors(kind, error, trace)
            remedy = (f'The same steps in smaller pieces:\n  {self.command(**smaller)}'
                      if smaller else otherwise)
            why = str(error).splitlines()[0][:120]
            print(f'out of memory at step {self.step} ({why}). {remedy}', file=sys.stderr)

        sys.excepthook = explain

    def command(self, **changes):
        """Return the command that continues this run, with some settings changed."""
        self.saver.wait()
        changes |= {'init_from': 'resume'} if self.saved_step else {}
        kept = [a for a in sys.argv[1:] if a.removeprefix('--').split('=')[0] not in changes]
        size, n_local = parallel.from_environment().size, machine_size()
        launch = ['python']
        if size > 1:  # each of several machines has options of its own
            options = ['--standalone', f'--nproc_per_node={n_local}']
            launch = ['torchrun', *(options if n_local == size else ['...'])]
        spec = sys.modules['__main__'].__spec__
        program = ['-m', spec.name] if spec else [sys.argv[0]]
        new = [f'--{key}={value}' for key, value in changes.items()]
        return shlex.join([*launch, *program, *kept, *new])
