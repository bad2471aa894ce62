import json
import os
from contextlib import nullcontext, suppress
from dataclasses import fields

import tokenizer
from config.presets import PRESETS
from configurator import UserError
from flatgpt import huggingface, lora, optim
from flatgpt.checkpoint import load, path_in
from model import GPT, GPTConfig, padded_vocab_size

# the settings of train.py that the weights of a model fix
ARCHITECTURE = [field.name for field in fields(GPTConfig) if field.name not in ('block_size', 'vocab_size', 'dropout')]


def model_of(state, path, dropout):
    """
    The GPT inside the checkpoint that load(path) gave, on the CPU; of a run with LoRA with its adapters. Raises
    ValueError naming what of its architecture or its weights is missing, too much, or of another shape, and for a
    reward model, which critic.py opens.
    """
    if state.get('reward_model'):
        raise UserError(f'{path} is a reward model, which scores answers and can not write any. It is for rl.py '
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
        raise UserError(f'{path} holds no model of this repository or of nanoGPT: {"; ".join(wrong[:3])}{more}')
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
            model, _ = base_model(place, dropout, needs_tokenizer=False)
        except ValueError as error:
            raise UserError(f'{path} has adapters for the model in {place}, which can not be loaded: '
                             f'{error}') from error
        if lora.digest(model) == settings['digest']:
            break
    else:
        raise UserError(f'{path} has adapters for the model that was in {" or ".join(places)}; the one that is there '
                         f'now has other weights. Put that back, or train them anew')
    if state['model_args']['block_size'] != model.config.block_size:
        model.crop_block_size(state['model_args']['block_size'])
    lora.add(model, settings['rank'], settings['alpha'], settings['targets'], settings['int8'])
    lora.load_adapters(model, state['model'])
    return model


def base_model(init_from, dropout=0.0, needs_tokenizer=True):
    """
    Open the model that a finetuning begins with: of a run, adapters merged, or of Hugging Face's.

    -> (model on the CPU, {'tokenizer', 'chat_template'}), both None where unknown. needs_tokenizer: False takes a
    tokenizer that cannot be read, such as SentencePiece's, for unknown.
    """
    path = path_in(init_from)
    if os.path.exists(path):
        state = load(path)
        model = lora.merge(model_of(state, path, dropout))
        return model, {'tokenizer': state.get('tokenizer'), 'chat_template': state.get('chat_template')}
    folder = huggingface.find(init_from)
    described = None
    with nullcontext() if needs_tokenizer else suppress(UserError):
        described = huggingface.load_tokenizer(folder)
    return huggingface.load_model(folder, dropout), {
        'tokenizer': described, 'chat_template': huggingface.load_chat_template(folder, described)}


# What train.py refuses ----------------------------------------------------------------------------


def check_architecture(model, config, names, source):
    """Raise UserError if a setting that was given, or is the preset's, contradicts a loaded model."""
    for name in names:
        value = getattr(model.config, name)
        if name not in config.given | set(PRESETS[config['preset']]) or config[name] == value:
            continue
        remedy = 'Leave it out' if name in config.given else (
            f"It is preset {config['preset']!r}'s: use the config file that it was trained with, such as "
            f'config/shakespeare_char_classic.py or config/gpt2_classic.py, or --preset=gpt2')
        raise UserError(f'{name}={config[name]}, but {source} has {name}={value}, and its weights fix that. {remedy}; '
                        f'or start a new run (--init_from=scratch) in another --out_dir')


def resume(path, config, meta, data_dir):
    """
    Load the checkpoint at `path` to continue its run; -> (model, checkpoint).

    meta: of the dataset in data_dir, see data.tokens.load_meta. Raises UserError if the settings, the tokenizer or the
    vocabulary contradict the checkpoint, or if another script wrote it.
    """
    state = load(path)
    out_dir = os.path.dirname(path)
    if 'reference' in state:
        script = 'posttrain.dpo' if state['config'].get('algorithm') == 'dpo' else 'posttrain.rl'
        raise UserError(f'{path} is a run of {script}, which continues with: python -m {script} '
                        f'--init_from=resume --out_dir={out_dir}. To finetune its model: --init_from={out_dir} and '
                        f'another --out_dir')
    model = model_of(state, path, config['dropout'])
    check_architecture(model, config, ARCHITECTURE, path)
    lora.check_resumes(state.get('lora'), config, path)
    if 'optimizer' in state:
        optim.check_same(config['optimizer'], state.get('config', {}), path)
    saved, n_ids, vocab_size = state.get('tokenizer'), meta['vocab_size'], model.config.vocab_size
    if saved and meta['tokenizer'] and saved != meta['tokenizer']:
        raise UserError(f'{path} was trained with another tokenizer ({saved["kind"]}, vocab_size {vocab_size}) than '
                        f'{data_dir} was prepared with ({meta["tokenizer"]["kind"]}, {n_ids}); resume on its own '
                        f'dataset (--dataset={state["config"]["dataset"]})')
    # nanoGPT's checkpoints have no tokenizer to compare
    if not saved and n_ids and vocab_size not in (n_ids, padded_vocab_size(n_ids)):
        raise UserError(f'{path} has a vocabulary of {vocab_size}, {data_dir} one of {n_ids}; resume on the dataset '
                        f'it was trained with (--dataset)')
    return model, state


def finetune(init_from, config, meta, data_dir):
    """
    Open the model `init_from` to train it on a dataset; -> (model, {'tokenizer', 'chat_template'}).

    Raises UserError if the settings contradict the model, or if the dataset was prepared for another vocabulary. Sizes
    and bias are passed over: a nanoGPT user's config holds those of training from scratch.
    """
    model, described = base_model(init_from, config['dropout'], needs_tokenizer=meta['tokenizer'] is not None)
    names = [name for name in ARCHITECTURE if name not in ('n_layer', 'n_head', 'n_embd', 'bias')]
    check_architecture(model, config, names, init_from)
    if meta['tokenizer'] is None:  # a dataset that does not say is taken to have the model's ids
        return model, described
    own, vocab_size = described['tokenizer'], model.config.vocab_size
    if not (huggingface.same_tokenizer(meta['tokenizer'], own) if own else meta['vocab_size'] == vocab_size):
        name = own.get('name', init_from) if own else 'FILE'
        raise UserError(f'{data_dir} was prepared for a vocabulary of {meta["vocab_size"]} '
                        f'({meta["tokenizer"]["kind"]}), {init_from} has another, of {vocab_size}; prepare the text '
                        f'with its tokenizer, --tokenizer={name}')
    return model, described


def open_model(init_from, out_dir, which='best'):
    """
    What sample.py, eval.py and export.py work with: -> (model, tokenizer, chat template, a line that says which it
    is). The model is on the CPU, in eval mode. init_from: 'resume', the checkpoint in out_dir, best.pt (which='best',
    where there is one) or ckpt.pt (which='last'); or what huggingface.load() takes. The chat template is Jinja's, or
    None. Raises ValueError for what can't be loaded.
    """
    if init_from != 'resume':
        model, described, chat_template = huggingface.load(init_from)
        if described is None:
            raise UserError(f"{init_from}: vocab_size is {model.config.vocab_size}, not GPT-2's 50257, and it has no "
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
    vocab_size = state['model_args']['vocab_size']
    if os.path.exists(path := os.path.join(data_dir, 'meta.json')):
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
        if meta['vocab_size'] == vocab_size:
            return tokenizer.from_dict(meta['tokenizer'])
    if os.path.exists(path := os.path.join(data_dir, 'meta.pkl')):
        found = tokenizer.from_meta_pkl(path)
        if found.vocab_size == vocab_size:
            return found
    if vocab_size < 50257:
        raise UserError(f'the checkpoint has no tokenizer in it, and {data_dir} has none of its {vocab_size} ids; '
                         f'prepare that dataset as it was for training: python {data_dir}/prepare.py')
    return tokenizer.load('gpt2')
