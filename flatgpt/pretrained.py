"""
Open a model: of a run, of nanoGPT, or in Hugging Face's layout.

    model, text_tokenizer, chat_template, line = open_model('gpt2', out_dir='')  # to use it
    model, state = resume(path, config, meta, data_dir)  # train.py: to continue its run
    model, described = finetune('out', config, meta, data_dir)  # train.py: to start a new run
"""

import math
import os
from dataclasses import fields

import torch

import ops
import tokenizer
from config.presets import PRESETS
from configurator import UserError, printable
from flatgpt import huggingface, lora, sharded
from flatgpt.checkpoint import load, no_checkpoint
from flatgpt.entries import glance, load_optimizer, without_memory
from flatgpt.outdir import kept_steps
from flatgpt.parallel import from_environment
from model import GPT, GPTConfig, padded_vocab_size
from tokenizer import vocabulary

GPT2_TOKENIZER = {'kind': 'tiktoken', 'name': 'gpt2'}  # nanoGPT's, without a meta.pkl
NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size')
# the settings of train.py that the weights of a model fix
ARCHITECTURE = [field.name for field in fields(GPTConfig)
                if field.name not in ('block_size', 'vocab_size', 'dropout')]


def path_in(out_dir, which='best'):
    """Return the path of best.pt, if it exists, of ckpt.pt or of ckpt-STEP.pt.

    which: 'best', 'last' or the step. Raises UserError for a step without a numbered checkpoint.
    """
    if which in ('best', 'last'):
        path = os.path.join(out_dir, 'best.pt')
        is_best = which == 'best' and os.path.exists(path)
        return path if is_best else os.path.join(out_dir, 'ckpt.pt')
    if which not in (steps := kept_steps(out_dir)):
        kept = ', '.join(map(str, steps)) or 'none, train with --keep_every=N'
        raise UserError(f'which={which}: {out_dir} has no checkpoint of this step; expected best, '
                        f'last, or one of its steps: {kept}')
    return os.path.join(out_dir, f'ckpt-{which}.pt')


def open_model(init_from, out_dir, which='best'):
    """Open a model to use it; -> (model, tokenizer, chat template, line to print).

    init_from: 'resume' for the run in out_dir, the folder of another run, or a name that
    huggingface.find() takes. which: see path_in(). The model is on the CPU and in eval mode; the
    template is Jinja's, or None. Raises UserError if it cannot be loaded.
    """
    path = checkpoint_path(init_from, out_dir, which)
    if path is None:
        model, described, chat_template = huggingface.load(init_from)
        if described is None:
            raise UserError(f'{init_from} has no tokenizer.json, and its vocab_size of '
                            f"{model.config.vocab_size} is not GPT-2's 50257; copy the "
                            f"model's tokenizer.json into the folder")
        check_finite(model, init_from)
        return model.eval(), tokenizer.from_dict(described), chat_template, printable(init_from)
    state = load(path, part='model')
    model = lora.merge(model_of(state, path, dropout=0.0))
    check_finite(model, path)
    # best_val_loss is the lowest of the run so far: the model's own in best.pt, except nanoGPT's
    measure, loss = state.get('measure', 'val loss'), float(state['best_val_loss'])
    if not (path.endswith('best.pt') and 'version' in state):
        measure = f'lowest {measure} so far'
    line = f'{path}: step {state["iter_num"]}' + (f', {measure} {loss:.4f}' if loss < 1e9 else '')
    return model.eval(), tokenizer_of(state), state.get('chat_template'), printable(line)


def check_finite(model, source):
    """Raise UserError naming the first weight with NaN or infinity in it."""
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not all(map(math.isfinite, torch.aminmax(weight))):
            raise UserError(f'{source}: the weight {name} has NaN or infinity in it, so the model '
                            f'computes nothing; use an earlier checkpoint, --which=last or '
                            f'--which=best, or train again with a lower --learning_rate')


def checkpoint_path(init_from, out_dir, which='best'):
    """Return the checkpoint that open_model() opens; None for Hugging Face's models."""
    if init_from == 'resume':
        return path_in(out_dir, which)
    path = path_in(init_from, which)
    return path if os.path.exists(path) else None


def dataset_of(init_from, out_dir, which='best'):
    """Return the --dataset of a run. Raises UserError if it is not recorded."""
    path = checkpoint_path(init_from, out_dir, which)
    state = glance(path) if path else {}
    if not state.get('config', {}).get('dataset'):
        raise UserError(f'{path or init_from} does not name the dataset that it was trained on; '
                        f'expected --dataset=NAME or --input=FILE')
    return state['config']['dataset']


def tokenizer_of(state):
    """Return the tokenizer of a checkpoint.

    nanoGPT's checkpoints hold none: it is in the meta.pkl of their dataset, or else GPT-2's.
    Raises UserError if that file is missing.
    """
    if state.get('tokenizer') is not None:
        return tokenizer.from_dict(state['tokenizer'])
    data_dir = os.path.join('data', state.get('config', {}).get('dataset', ''))
    vocab_size = state['model_args'].get('vocab_size', 0)
    if os.path.exists(path := os.path.join(data_dir, 'meta.json')):
        meta = vocabulary.read_json(path)
        if isinstance(meta, dict) and meta.get('vocab_size') == vocab_size:
            return tokenizer.from_dict(meta.get('tokenizer'))
    if os.path.exists(path := os.path.join(data_dir, 'meta.pkl')):
        if (char_tokenizer := tokenizer.from_meta_pkl(path)).vocab_size == vocab_size:
            return char_tokenizer
    if vocab_size < 50257:
        raise UserError(f'the checkpoint has no tokenizer in it, and {data_dir} has none of '
                        f'{vocab_size} ids; prepare that again: python {data_dir}/prepare.py')
    return tokenizer.load('gpt2')


def kind_of(state):
    """Return the kind of a checkpoint's model, with its article."""
    return ('a classifier' if 'classes' in state else
            'a reward model' if state.get('reward_model') else 'a language model')


def model_of(state, path, dropout, inner=()):
    """Build the GPT of a checkpoint, on the CPU, with its adapters if it has any.

    state: load(path). Raises UserError naming the fields and weights that are missing, unknown or
    of another shape, for a reward model and a classifier. inner: see base_model().
    """
    if 'classes' in state or state.get('reward_model'):
        script, option = (('classify', 'predict=TEXTS.jsonl --out_dir') if 'classes' in state else
                          ('rl', 'reward_model'))
        out_dir = os.path.dirname(path) or '.'
        raise UserError(f'{path} is {kind_of(state)}, which scores texts and writes none; use it '
                        f'with python -m posttrain.{script} --{option}={out_dir}. The language '
                        f'model that it began with is in {state.get("config", {}).get("init_from")}'
                        )
    if 'lora' in state:
        return with_adapters(state, path, dropout, inner)
    if missing := [name for name in NANOGPT_FIELDS if name not in state['model_args']]:
        raise UserError(f'{path} holds no model of this repository or of nanoGPT: model_args lacks '
                        f'{", ".join(missing)}')
    return build(GPT, state, path, dropout)


def build(kind, state, path, dropout):
    """Build the GPT, or Critic, of a checkpoint's model_args, with its weights.

    Names and shapes are compared before memory is taken. Raises UserError naming the wrong ones.
    """
    try:
        config = GPTConfig(**{**state['model_args'], 'dropout': dropout})
        shapes = without_memory(kind, config, len(state['model']))
        shapes.load_state_dict(state['model'], assign=True)
        if next(shapes.parameters()).is_meta:  # sharded.restore() fills it
            return without_memory(kind, config, len(state['model']))
        model = kind(config)
        model.load_state_dict(state['model'])
    except (TypeError, ValueError, RuntimeError) as error:  # torch lists the wrong weights
        problems = ' '.join(str(error).split())
        raise UserError(f'{path} holds no model of this repository or of nanoGPT: '
                        f'{problems[:400]}') from error
    return model


def with_adapters(state, path, dropout, inner=()):
    """Build a LoRA run's GPT with its adapters. Raises UserError without the base."""
    model = base_of(state, path, dropout, inner)
    lora.restore(model, state['lora'], state['model'])
    return model


def base_of(state, path, dropout, inner=()):
    """Open the model that a checkpoint's adapters belong to. See with_adapters()."""
    settings = state['lora']
    if os.path.realpath(path) in inner:
        raise UserError(f'{path} has adapters for the model that they belong to themselves; train '
                        f'them again')
    places = [settings['init_from']]
    if settings['from_here']:  # relative to the adapters, where both folders were moved
        places.append(os.path.normpath(os.path.join(os.path.dirname(path), settings['from_here'])))
    places = [place for place in dict.fromkeys(places) if os.path.isdir(place)] or places[:1]
    for place in places:
        try:
            model, _ = base_model(huggingface.find(place, may_download=False), dropout,
                                  needs_tokenizer=False, inner=(*inner, os.path.realpath(path)))
        except UserError as error:
            raise UserError(f'{path} has adapters for the model in {place}, which cannot be '
                            f'loaded: {error}') from error
        if lora.digest(model) == settings['digest']:
            break
    else:
        raise UserError(f'{path} has adapters for the model that was in {" or ".join(places)}, '
                        f'which has other weights now; restore it, or train the adapters again')
    block_size = state['model_args'].get('block_size', model.config.block_size)
    if block_size != model.config.block_size:
        model.crop_block_size(block_size)
    return model


def base_model(init_from, dropout=0.0, needs_tokenizer=True, inner=()):
    """Open the model that a finetuning begins with, adapters merged into it.

    -> (model on the CPU, {'tokenizer', 'chat_template'}), both None if unknown. init_from: the
    folder of a run, or a name for huggingface.find(). needs_tokenizer: see huggingface.load().
    inner: real paths of the adapters whose base this is.
    """
    path = checkpoint_path(init_from, init_from)
    if path is None:
        model, described, chat_template = huggingface.load(init_from, dropout, needs_tokenizer)
        return model, {'tokenizer': described, 'chat_template': chat_template}
    state = load(path, part='model')
    model = lora.merge(model_of(state, path, dropout, inner))
    return model, {'tokenizer': state.get('tokenizer'), 'chat_template': state.get('chat_template')}


def check_source(init_from, ckpt_path):
    """Raise UserError unless init_from may name a model: a run, a folder, or a hub id."""
    if init_from == 'resume' and not os.path.exists(ckpt_path):
        raise no_checkpoint(ckpt_path)
    names = ('scratch', 'resume', 'auto', *huggingface.GPT2_NAMES)
    if not (init_from in names or os.path.isdir(init_from) or '/' in init_from):
        raise UserError(f"init_from={init_from!r}: expected {', '.join(map(repr, names))}, the "
                        f"out_dir of a run, a folder in Hugging Face's layout, or a hub id, "
                        f'owner/name')


def context_of(model, config, init_from, meta):
    """Return a run's block_size: the given setting, else that of model and data.

    extend_context also slows RoPE down. Raises UserError if the model has fewer positions.
    """
    block_size = config['block_size']
    if config['extend_context']:
        block_size = config['extend_context']
        slow_rotation(model, block_size, init_from)
    elif 'block_size' not in config.given:
        if meta['row']:
            block_size = meta['row'] - 1  # conversations are packed for it
        elif init_from == 'resume' or (init_from != 'scratch' and model.config.pos == 'learned'):
            block_size = model.config.block_size
        else:  # with RoPE a context may have 100,000 positions
            block_size = min(block_size, model.config.block_size)
    if block_size > model.config.block_size and model.config.pos == 'learned':
        raise UserError(f'block_size={block_size}: expected at most {model.config.block_size}, the '
                        f'positions of the model of --init_from={init_from}')
    is_cut = block_size < model.config.block_size and not meta['row']
    if is_cut and model.config.pos == 'learned' and config['shard'] != 'none':
        raise UserError(f'block_size={block_size} cuts the {model.config.block_size} positions of '
                        f'the model, which takes a run with --shard=none')
    return block_size


def check_same(name, saved_config, ckpt_path):
    """Raise UserError unless a checkpoint's run used the optimizer `name`."""
    saved = saved_config.get('optimizer', 'adamw')
    if name != saved:
        raise UserError(f'optimizer={name!r}, but the state in {ckpt_path} is that of {saved!r}; '
                        f'resume with --optimizer={saved} and its rates (config.json)')


def check_architecture(model, config, names, source):
    """Raise UserError if a given or preset setting contradicts a loaded model."""
    for name in names:
        value = getattr(model.config, name)
        is_set = name in config.given or name in PRESETS[config['preset']]
        if not is_set or config[name] == value:
            continue
        remedy = f'Leave it out, or use --{name}={value}' if name in config.given else (
            f'It comes from --preset={config["preset"]}: use the config file of the run, such as '
            f'config/shakespeare_char_classic.py or config/gpt2_classic.py, or --preset=gpt2')
        raise UserError(f'{name}={config[name]}, but {source} has {name}={value}, and its weights '
                        f'fix that. {remedy}; or start a new run (--init_from=scratch) in another '
                        f'--out_dir')


def resume(path, config, meta, data_dir):
    """Load the checkpoint at `path` to continue its run; -> (model, checkpoint).

    meta: data.datasets.load_meta(data_dir). On another text the lowest val loss starts anew. Raises
    UserError if the settings, the tokenizer or the vocabulary contradict the checkpoint, or if
    another script wrote it.
    """
    state = load(path, part='all' if config['shard'] == 'none' else 'shapes')
    out_dir, settings = os.path.dirname(path), state.get('config', {})
    if 'reference' in state:
        script = 'posttrain.dpo' if settings.get('algorithm') == 'dpo' else 'posttrain.rl'
        raise UserError(f'{path} is a run of {script}, which continues with: python -m {script} '
                        f'--init_from=resume --out_dir={out_dir}. To finetune its model: '
                        f'--init_from={out_dir} and another --out_dir')
    model = model_of(state, path, config['dropout'])
    check_architecture(model, config, ARCHITECTURE, path)
    lora.check_resumes(state.get('lora'), config, path)
    if 'optimizer' in state:
        check_same(config['optimizer'], settings, path)
    saved, n_ids, vocab_size = state.get('tokenizer'), meta['vocab_size'], model.config.vocab_size
    if saved and meta['tokenizer'] and saved != meta['tokenizer']:
        raise UserError(f'{path} was trained with another tokenizer ({saved["kind"]}, vocab_size '
                        f'{vocab_size}) than that of {data_dir} ({meta["tokenizer"]["kind"]}, '
                        f'{n_ids}); resume with --dataset={settings.get("dataset")}')
    # nanoGPT's checkpoints have no tokenizer to compare
    if not saved and n_ids and vocab_size not in (n_ids, padded_vocab_size(n_ids)):
        raise UserError(f'{path} has a vocabulary of {vocab_size}, {data_dir} one of {n_ids}; '
                        f'resume with the --dataset that it was trained on')
    if not saved and vocab_size >= 50257:
        state['tokenizer'] = GPT2_TOKENIZER
    same_name = settings.get('dataset') in (None, config['dataset'])
    same_text = state['data'] == meta['digest'] if 'data' in state else same_name
    if not same_text or settings.get('eval_tokens', 0) != config['eval_tokens']:
        several = ',' in config['dataset'] or config.get('anneal_dataset')
        changed = ('other tokens of val count' if same_text else
                   'the datasets hold other texts, or have other shares,' if several else
                   f'{data_dir} holds another text')
        from_environment().print(f'{changed} than at step {state["iter_num"]}: the lowest val loss '
                                 f'starts anew')
        state.update(best_val_loss=math.inf, evals_since_best=0)
    return model, state


def finetune(init_from, config, meta, data_dir):
    """Open a model to train on a dataset; -> (model, {'tokenizer', 'chat_template'}).

    Raises UserError if the settings contradict the model, or if the dataset has another
    vocabulary. Sizes and bias are ignored: nanoGPT's config files hold those of new models.
    """
    model, described = base_model(init_from, config['dropout'], meta['tokenizer'] is not None)
    names = [name for name in ARCHITECTURE if name not in NANOGPT_FIELDS]
    check_architecture(model, config, names, init_from)
    if meta['tokenizer'] is None:  # a dataset without a tokenizer is taken to have the model's
        return model, described
    saved, vocab_size = described['tokenizer'], model.config.vocab_size
    is_same = (huggingface.same_tokenizer(meta['tokenizer'], saved) if saved
               else meta['vocab_size'] == vocab_size)
    if not is_same:
        name = saved.get('name', init_from) if saved else 'FILE'
        raise UserError(f'{data_dir} was prepared for a vocabulary of {meta["vocab_size"]} '
                        f'({meta["tokenizer"]["kind"]}), {init_from} has another, of {vocab_size}; '
                        f'prepare the text with its tokenizer: --tokenizer={name}')
    return model, described


def slow_rotation(model, n, init_from):
    """Set the scaling of YaRN for a context of n tokens.

    Raises UserError without RoPE, or if n is no longer context.
    """
    c = model.config
    scaling = c.rope_scaling or {'rope_type': 'yarn',
                                 'original_max_position_embeddings': c.block_size}
    original = scaling.get('original_max_position_embeddings', c.block_size)
    if c.pos != 'rope' or scaling['rope_type'] != 'yarn' or init_from == 'scratch':
        raise UserError(f'extend_context={n}: expected the model of another run, or of a folder, '
                        f"with pos='rope' and no scaling but YaRN's")
    if n < max(c.block_size, original + 1):
        raise UserError(f'extend_context={n}: expected above {c.block_size}, the context of '
                        f'--init_from={init_from}')
    c.rope_scaling = ops.fill_yarn({**scaling, 'factor': n / original, 'attention_factor': None})


def restore(model, optimizer, scaler, path, state):
    """Load a checkpoint's moments and scaler, and a sharded model's weights."""
    if hasattr(model.lm_head.weight, 'device_mesh'):
        sharded.restore(model, optimizer, path, state)
    # a gradient scaler may have left out all steps so far
    load_optimizer(optimizer, state['optimizer'], may_be_empty=bool(state.get('scaler')))
    if state.get('scaler'):
        scaler.load_state_dict(state['scaler'])


def change_context(model, optimizer, n):
    """Make the context n tokens, and keep the moments of their learned positions."""
    if n == model.config.block_size:
        return
    from_environment().print(f'the context changes from {model.config.block_size} to {n} tokens')
    model.crop_block_size(n)
    if model.config.pos == 'learned':
        moments = optimizer.state.get(model.transformer.wpe.weight, {})  # {}: frozen by LoRA
        moments.update({name: m[:n].clone() for name, m in moments.items() if m.dim() == 2})
