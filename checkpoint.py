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
import os
import pickle
import shutil
import zipfile
from dataclasses import fields

import torch

import dataloader
import huggingface
import lora
import tokenizer
from files import lock_folder, replace_file, sync_folder
from model import GPT, GPTConfig

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


def model_of(state, path, dropout):
    """
    The GPT inside the checkpoint that load(path) gave, on the CPU; of a run with LoRA with its adapters. Raises
    ValueError naming what of its architecture or its weights is missing, too much, or of another shape, and for a
    reward model, which critic.py opens.
    """
    if state.get('reward_model'):
        raise ValueError(f'{path} is a reward model, which scores answers and can not write any. It is for rl.py '
                         f'--reward_model={os.path.dirname(path) or "."}; the language model that it began with is in '
                         f'{state["config"]["init_from"]}')
    if 'lora' in state:
        return with_adapters(state, path, dropout)
    known = {field.name for field in fields(GPTConfig)}
    args = state['model_args']
    nanogpts = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size')
    wrong = [f'model_args lacks {name}' for name in nanogpts if name not in args]
    wrong += [f'model_args has {name}, which this model does not' for name in args if name not in known]
    if not wrong:
        model, weights = GPT(GPTConfig(**{**args, 'dropout': dropout})), state['model']
        expected = model.state_dict()
        wrong = [f'{name} is missing' for name in expected if name not in weights]
        wrong += [f'{name} is unknown' for name in weights if name not in expected]
        wrong += [f'{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}'
                  for name, tensor in expected.items() if name in weights and weights[name].shape != tensor.shape]
    if wrong:
        more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise ValueError(f'{path} holds no model of this repository or of nanoGPT: {"; ".join(wrong[:3])}{more}')
    model.load_state_dict(weights)
    return model


def with_adapters(state, path, dropout):
    """model_of() a run with LoRA: the model that it began with, and the adapters. ValueError if that is not there."""
    settings = state['lora']
    places = [settings['init_from']]
    if settings.get('from_here'):  # seen from the adapters: this may start in another folder, or both have moved
        places.append(os.path.normpath(os.path.join(os.path.dirname(path), settings['from_here'])))
    places = [place for place in dict.fromkeys(places) if os.path.isdir(place)] or places[:1]
    for place in places:
        try:
            model, _ = base_model(place, dropout)
        except ValueError as error:
            raise ValueError(f'{path} has adapters for the model in {place}, which can not be loaded: '
                             f'{error}') from error
        if lora.digest(model) == settings['digest']:
            break
    else:
        raise ValueError(f'{path} has adapters for the model that was in {" or ".join(places)}; the one that is there '
                         f'now has other weights. Put that back, or train them anew')
    if state['model_args']['block_size'] != model.config.block_size:
        model.crop_block_size(state['model_args']['block_size'])
    lora.add(model, settings['rank'], settings['alpha'], settings['targets'], settings['int8'])
    lora.load_adapters(model, state['model'])
    return model


def base_model(init_from, dropout=0.0):
    """
    The model that a finetuning begins with: of a run's out_dir, merged if it had adapters, or of Hugging Face's.
    -> (model, the checkpoint it is from or None)
    """
    path = path_in(init_from)
    if os.path.exists(path):
        state = load(path)
        return lora.merge(model_of(state, path, dropout)), state
    return huggingface.load_model(huggingface.find(init_from), dropout), None


def path_in(out_dir, which='best'):
    """best.pt of a run (which='best', where there is one) or ckpt.pt (which='last')."""
    path = os.path.join(out_dir, 'best.pt')
    return path if which == 'best' and os.path.exists(path) else os.path.join(out_dir, 'ckpt.pt')


def open_model(init_from, out_dir, which='best'):
    """
    What sample.py, evaluate.py and export.py work with: -> (model, tokenizer, chat template, a line that says which it
    is). The model is on the CPU, in eval mode. init_from: 'resume', the checkpoint in out_dir, best.pt (which='best',
    where there is one) or ckpt.pt (which='last'); or what huggingface.load() takes. The chat template is Jinja's, or
    None. Raises ValueError for what can't be loaded.
    """
    if init_from != 'resume':
        model, described, chat_template = huggingface.load(init_from)
        if described is None:
            raise ValueError(f"{init_from}: vocab_size is {model.config.vocab_size}, not GPT-2's 50257, and it has no "
                             f'tokenizer.json; copy that of the model into the folder')
        return model.eval(), tokenizer.from_dict(described), chat_template, init_from
    path = path_in(out_dir, which)
    state = load(path)
    model = lora.merge(model_of(state, path, dropout=0.0))
    # a checkpoint knows the lowest val loss of its run so far, which is its own in best.pt unless nanoGPT wrote that
    of_what = state.get('measure', 'val loss')  # that of rl.py is another
    of_what = of_what if path.endswith('best.pt') and 'version' in state else f'lowest {of_what} so far'
    best_val_loss = float(state['best_val_loss'])
    line = f'{path}: step {state["iter_num"]}' + (f', {of_what} {best_val_loss:.4f}' if best_val_loss < 1e9 else '')
    return model.eval(), tokenizer_of(state), state.get('chat_template'), line


def tokenizer_of(state):
    """
    The tokenizer inside a checkpoint. nanoGPT's have none: theirs is in the meta.pkl of the dataset they name, or else
    GPT-2's. Raises ValueError if that is missing.
    """
    if state.get('tokenizer') is not None:
        return tokenizer.from_dict(state['tokenizer'])
    data_dir = os.path.join('data', state.get('config', {}).get('dataset', ''))
    meta = dataloader.load_meta(data_dir)
    vocab_size = state['model_args']['vocab_size']
    if meta['tokenizer'] is not None and meta['vocab_size'] == vocab_size:
        return tokenizer.from_dict(meta['tokenizer'])
    if vocab_size < 50257:
        raise ValueError(f'the checkpoint has no tokenizer in it, and {data_dir} has none of its {vocab_size} ids; '
                         f'prepare that dataset as it was for training: {dataloader.prepare_command(data_dir)}')
    return tokenizer.load('gpt2')


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
