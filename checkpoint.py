"""
Checkpoints: one file that holds a whole run, written so that it is either complete or not there.

A checkpoint is a dict of tensors and plain values: nanoGPT's keys (model, optimizer, model_args, iter_num,
best_val_loss, config) and, beside them, version, tokenizer, scaler, evals_since_best, train_time. It is read with
weights_only=True, which refuses anything that could run code. nanoGPT's own ckpt.pt reads the same.

In a run's out_dir, ckpt.pt is the last checkpoint, from which the run resumes, and best.pt the one with the lowest
validation loss. Random state is not among what is saved: batches and dropout are functions of (seed, step).
"""

import glob
import json
import os
import shutil
import sys

import torch

import dataloader
import tokenizer

VERSION = 1  # of the layout described above; a file without the key is nanoGPT's


def save(out_dir, state, is_best):
    """
    Write `state` to out_dir/ckpt.pt, and to best.pt as well if it is the best: two names for the same bytes.

    The bytes go to a temporary file, which is fsynced and then renamed. Once this returns, they survive a power cut; if
    it raises OSError (disk full, no permission), the checkpoints that were there are untouched.
    """
    temporary = os.path.join(out_dir, f'ckpt.pt.tmp-{os.getpid()}')
    try:
        with open(temporary, 'wb') as f:
            torch.save({'version': VERSION, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        if is_best:  # first, so that a crash in between leaves a best.pt no older than ckpt.pt
            try:
                os.link(temporary, f'{temporary}-best')
            except OSError:  # a file system without hard links
                shutil.copyfile(temporary, f'{temporary}-best')
            os.replace(f'{temporary}-best', os.path.join(out_dir, 'best.pt'))
        os.replace(temporary, os.path.join(out_dir, 'ckpt.pt'))
    except RuntimeError as error:  # torch's zip writer hides the OSError of the file it was given
        raise OSError(f'{type(error).__name__}: {str(error).splitlines()[0]}') from error
    finally:
        clean(out_dir, os.getpid())
    sync_folder(out_dir)


def clean(out_dir, pid='*'):
    """Remove the temporary files that a failed save, or a process killed while saving, left in out_dir."""
    for path in glob.glob(os.path.join(glob.escape(out_dir), f'ckpt.pt.tmp-{pid}*')):
        os.remove(path)


def sync_folder(folder):
    """Make renames in a folder durable; nothing to do on Windows, which can't open one."""
    if sys.platform != 'win32':
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def load(path, device='cpu'):
    """
    -> the checkpoint at `path`, its tensors on `device`, prefixes of torch.compile and DDP removed from the names.
    Raises ValueError when there is none, it is damaged, it holds more than data, or a newer flatgpt wrote it.
    """
    if not os.path.exists(path):
        raise ValueError(f'no checkpoint at {path}; train one first (python train.py --out_dir='
                         f'{os.path.dirname(path) or "."}) or name another --out_dir')
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # by kind of damage: RuntimeError, EOFError, UnpicklingError, zipfile's, KeyError ...
        if 'weights_only' in str(error) or 'Unsupported' in str(error):
            raise ValueError(f'{path} was refused: it asks to run code when loaded, which a checkpoint of tensors and '
                             f'plain values does not. Do not load it elsewhere unless you trust its source') from error
        why = f'{type(error).__name__}: {str(error).splitlines()[0][:200]}' if str(error) else type(error).__name__
        raise ValueError(f'{path} can not be read ({why}): it is damaged or truncated. Restore a copy, or use best.pt '
                         f'in the same folder if there is one') from error
    if not isinstance(state, dict) or 'model' not in state or 'model_args' not in state:
        raise ValueError(f'{path} holds no checkpoint: expected a dict with the keys model and model_args')
    if state.get('version', 0) > VERSION:
        raise ValueError(f'{path} has layout version {state["version"]}, this flatgpt reads up to {VERSION}; update it')
    state['model'] = {k.removeprefix('module.').removeprefix('_orig_mod.'): v for k, v in state['model'].items()}
    if 'version' not in state:
        state['model_args'] = {**state['model_args'], 'mlp': 'gelu_erf'}  # nanoGPT's MLP uses the exact GELU
    return state


def tokenizer_of(state):
    """
    The tokenizer inside a checkpoint. nanoGPT's have none: theirs is in the meta.pkl of the dataset they name, or else
    GPT-2's. Raises ValueError if that is missing.
    """
    if state.get('tokenizer') is not None:
        return tokenizer.from_dict(state['tokenizer'])
    data_dir = os.path.join('data', state.get('config', {}).get('dataset', ''))
    found = dataloader.load_meta(data_dir)['tokenizer']
    if found is not None:
        return tokenizer.from_dict(found)
    if state['model_args']['vocab_size'] < 50257:
        raise ValueError(f'the checkpoint has no tokenizer in it, and there is no meta.pkl in {data_dir} either; '
                         f'prepare that dataset as it was for training: python {data_dir}/prepare.py')
    return tokenizer.load('gpt2')


def put_aside(out_dir):
    """
    Move the files of an earlier run in out_dir to out_dir/previous-N, so that a new one loses nothing.
    -> that folder, or None if there was no checkpoint.
    """
    if not os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
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
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            lines = [line for line in f if line.endswith('\n')]  # a kill can leave half a line
        # an evaluation at step n is before update n, and was saved with it; the line of update n itself comes after
        kept = [line for line in lines if json.loads(line)['step'] < iter_num + ('val_loss' in line)]
        with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
            f.writelines(kept)
        os.replace(f'{path}.tmp', path)
