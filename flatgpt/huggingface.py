"""
Read and write models as folders in Hugging Face's layout.

    model, described, chat_template = load('Qwen/Qwen3-0.6B')  # a folder, a hub id, or 'gpt2'
    save(model, described, chat_template, 'folder')  # for transformers, vLLM, llama.cpp

A folder holds config.json, *.safetensors and tokenizer.json. Two families have the network of
model.py: GPT-2, and Llama with its descendants (model types llama, mistral, qwen2, qwen3). Weights
are copied exactly, since fp32 holds every bf16 and fp16 number. The matrices of queries, keys and
values are one matrix here, and so are the two inner ones of SwiGLU. A feature that config.json has
and model.py lacks is refused by name.
"""

import json
import os
import re
import shutil
from contextlib import ExitStack, nullcontext, suppress

import torch

import ops
import tokenizer
from configurator import UserError
from flatgpt.entries import without_memory
from flatgpt.files import sync_folder
from model import GPT, GPTConfig
from ops import ROPE_SCALINGS
from tokenizer import chat, formats, tokenizer_json, vocabulary
from tokenizer.base import temporary_name, write_file
from tokenizer.patterns import PATTERNS, batches

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
HUB_ID = r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*'  # owner/name
FILES = ['config.json', 'model*.safetensors', 'tokenizer.json', 'tokenizer_config.json',
         'vocab.json', 'merges.txt', 'chat_template.jinja']
SHARD = 4 * 2**30  # bytes of tensors in one file
QK_NORM_EPS = 1e-6  # the eps of model.py's QK-norm without weights

# transformers' defaults, by model type, for keys that config.json may omit
LLAMA = {'num_key_value_heads': None, 'head_dim': None, 'max_position_embeddings': 2048,
         'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'attention_bias': False,
         'mlp_bias': False, 'sliding_window': None, 'use_sliding_window': False}
MISTRAL = {**LLAMA, 'num_key_value_heads': 8, 'max_position_embeddings': 131072,
           'sliding_window': 4096}
QWEN2 = {**MISTRAL, 'num_key_value_heads': 32, 'max_position_embeddings': 32768}
DEFAULTS = {
    'gpt2': {'n_positions': 1024, 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
             'n_inner': None, 'tie_word_embeddings': True},
    'llama': LLAMA, 'mistral': MISTRAL, 'qwen2': QWEN2, 'qwen3': {**QWEN2, 'head_dim': 128}}
# field of GPTConfig -> key of config.json; a key without default is required
FIELDS = {
    'gpt2': {'vocab_size': 'vocab_size', 'block_size': 'n_positions', 'n_layer': 'n_layer',
             'n_head': 'n_head', 'n_embd': 'n_embd', 'n_inner': 'n_inner',
             'norm_eps': 'layer_norm_epsilon', 'tie_embeddings': 'tie_word_embeddings'},
    **dict.fromkeys(('llama', 'mistral', 'qwen2', 'qwen3'), {
        'vocab_size': 'vocab_size', 'block_size': 'max_position_embeddings',
        'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads',
        'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size', 'head_dim': 'head_dim',
        'n_inner': 'intermediate_size', 'norm_eps': 'rms_norm_eps',
        'tie_embeddings': 'tie_word_embeddings'})}
ACTIVATIONS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_erf'}  # -> mlp
# the values that model.py implements, transformers' default first
READABLE = {'activation_function': tuple(ACTIVATIONS), 'scale_attn_weights': (True,),
            'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,),
            'hidden_act': ('silu', 'swish'), 'partial_rotary_factor': (1, None),
            'rope_interleaved': (False,), 'quantization_config': (None,)}
# module of model.py -> modules of transformers, whose rows are stacked in model.py
LLAMA_NAMES = {
    'wte': ['embed_tokens'], 'ln_f': ['norm'], 'ln_1': ['input_layernorm'],
    'ln_2': ['post_attention_layernorm'],
    'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    'attn.c_proj': ['self_attn.o_proj'], 'attn.q_norm': ['self_attn.q_norm'],
    'attn.k_norm': ['self_attn.k_norm'], 'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'],
    'mlp.c_proj': ['mlp.down_proj']}
QKV = ('q_proj', 'k_proj', 'v_proj')


def load(name_or_folder, dropout=0.0, needs_tokenizer=True):
    """Open a model; -> (GPT on the CPU in fp32, its tokenizer, its chat template).

    name_or_folder: see find(). The tokenizer is a dict for tokenizer.from_dict(), the template is
    Jinja's; each is None if the folder has none. needs_tokenizer: False takes a tokenizer that
    cannot be read for none. Raises UserError for all else that cannot be read.
    """
    folder, described = find(name_or_folder), None
    with nullcontext() if needs_tokenizer else suppress(ValueError):
        described = load_tokenizer(folder)
    return load_model(folder, dropout), described, load_chat_template(folder, described)


def find(name_or_folder, may_download=True):
    """Return the folder of a model, downloaded to the hub's cache if need be.

    name_or_folder: a folder, one of GPT2_NAMES, or a hub id such as 'Qwen/Qwen3-0.6B'.
    may_download: False for a name that a file holds: it must be here, since only a person may
    choose what to fetch. Raises UserError if it is none of these or cannot be downloaded.
    """
    if os.path.isdir(name_or_folder):
        return name_or_folder
    is_gpt2 = name_or_folder in GPT2_NAMES
    hub_id = f'openai-community/{name_or_folder}' if is_gpt2 else name_or_folder
    if not re.fullmatch(HUB_ID, hub_id):
        raise UserError(f'{name_or_folder!r} is neither a folder nor one of '
                        f'{", ".join(GPT2_NAMES)}, nor a hub id such as Qwen/Qwen3-0.6B')
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f'{name_or_folder!r} is no folder here, and the hub needs the package '
                        f"huggingface_hub: pip install -c constraints.txt -e '.[hf]'") from None
    try:
        return snapshot_download(hub_id, allow_patterns=FILES, local_files_only=not may_download)
    except Exception as error:  # the hub's errors share no base class across its versions
        if not may_download:
            raise UserError(f'{name_or_folder!r} is neither a folder here nor in the cache of the '
                            f'hub; fetch it if you trust it: hf download {hub_id}') from error
        reason = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
        raise UserError(f'{name_or_folder!r} is no folder here and could not be downloaded '
                        f'({reason}). Without a network: copy config.json, *.safetensors, '
                        f'tokenizer.json and tokenizer_config.json of huggingface.co/{hub_id} '
                        f'into a folder; --init_from=FOLDER') from error


def load_model(folder, dropout=0.0):
    """Load the GPT in a folder, on the CPU in fp32.

    Raises UserError naming the damaged file, the missing or unexpected tensor, or the key of
    config.json that model.py does not implement.
    """
    hf = read_config(folder)
    with ExitStack() as stack:
        tensors = open_tensors(folder, stack)
        try:
            config = GPTConfig(**fields_of(hf, folder), dropout=dropout)
            model = without_memory(GPT, config, len(tensors))
        except ValueError as error:
            path = os.path.join(folder, 'config.json')
            raise UserError(f'{path} is not valid: {error}') from error
        sources = match(model, tensors, hf, folder)
        model.to_empty(device='cpu')
        if config.tie_embeddings:  # to_empty() unties them
            model.transformer.wte.weight = model.lm_head.weight
        copy_weights(model, sources, folder)
    return model


def read_config(folder):
    """Read config.json; -> dict, with transformers' defaults for omitted keys."""
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        adapter = 'the adapters of PEFT alone; merge them into their model first: ' \
                  'model.merge_and_unload().save_pretrained(FOLDER)'
        is_adapter = os.path.isfile(os.path.join(folder, 'adapter_config.json'))
        content = adapter if is_adapter else 'no config.json'
        raise UserError(f'{folder} has {content}; expected a folder in Hugging Face layout, '
                        f'with config.json and model.safetensors')
    hf = vocabulary.read_json(path)
    if not isinstance(hf, dict):
        raise UserError(f'{path} is damaged: expected an object; copy it again')
    kind = hf.get('model_type')
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise UserError(f'{path}: model_type is {kind!r}; expected one of {", ".join(DEFAULTS)}')
    hf = {**DEFAULTS[kind], **hf}
    for key in (*FIELDS[kind].values(), 'sliding_window'):
        if not isinstance(hf.get(key), int | float | None):
            refuse(folder, key, hf[key], 'a number')
    for key in FIELDS[kind].values():
        if key not in DEFAULTS[kind] and not (hf.get(key) and hf[key] >= 1):
            refuse(folder, key, hf.get(key), 'a number of 1 or more')
    for key, values in READABLE.items():
        if hf.get(key, values[0]) not in values:
            refuse(folder, key, hf[key], ' or '.join(map(repr, values)))
    kinds = hf.get('layer_types') or []
    if not isinstance(kinds, list) or any(kind not in ('full_attention', 'sliding_attention')
                                          for kind in kinds):
        refuse(folder, 'layer_types', kinds, "a list of 'full_attention' or 'sliding_attention'")
    return hf


def refuse(folder, key, value, expected):
    """Raise UserError for a value of config.json."""
    path = os.path.join(folder, 'config.json')
    raise UserError(f'{path}: {key} = {value!r} is not supported; expected {expected}')


def fields_of(hf, folder):
    """Translate a config.json; -> {field of GPTConfig: value}."""
    kind = hf['model_type']
    fields = {field: hf[key] for field, key in FIELDS[kind].items()}
    if kind == 'gpt2':
        return {**fields, 'bias': True, 'mlp': ACTIVATIONS[hf['activation_function']]}
    has_window = hf['sliding_window'] and (kind == 'mistral' or hf['use_sliding_window'])
    if has_window and fields['block_size']:
        # model.py has no such window; a context as short as the window makes no difference
        fields['block_size'] = min(fields['block_size'], hf['sliding_window'])
    rope_base, rope_scaling = rope_of(hf, folder)
    return {**fields, 'bias': has_bias(hf, 'o_proj') or has_bias(hf, 'mlp'),
            'qkv_bias': has_bias(hf, 'q_proj'), 'mlp': 'swiglu', 'norm': 'rmsnorm', 'pos': 'rope',
            'rope_base': rope_base, 'rope_scaling': rope_scaling, 'qk_norm': kind == 'qwen3',
            'qk_norm_weight': kind == 'qwen3'}


def has_bias(hf, module):
    """Return whether this module of transformers' model has a bias."""
    kind = hf['model_type']
    if kind == 'gpt2':
        return not module.endswith(('wte', 'wpe', 'lm_head'))
    if 'mlp' in module:
        return kind == 'llama' and hf['mlp_bias']
    if kind == 'qwen2':
        return module.endswith(QKV)
    return module.endswith('_proj') and kind != 'mistral' and hf['attention_bias']


def rope_of(hf, folder):
    """Return rope_base and rope_scaling. transformers 5 keeps them in rope_parameters."""
    key = 'rope_scaling' if hf.get('rope_scaling') else 'rope_parameters'
    rope = hf.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        refuse(folder, key, rope, 'an object with rope_type, the same for all layers')
    if rope.get('partial_rotary_factor', 1) not in (1, None):
        refuse(folder, 'partial_rotary_factor', rope['partial_rotary_factor'], 1)
    base = rope.get('rope_theta') or hf.get('rope_theta') or 10000.0
    if not isinstance(base, int | float):
        refuse(folder, 'rope_theta', base, 'a number')
    kind = rope.get('rope_type', rope.get('type', 'default'))  # transformers 4 first wrote type
    if kind == 'default':
        return base, None
    if kind not in [*ROPE_SCALINGS]:  # it may be unhashable
        refuse(folder, key, rope, f"rope_type 'default', {', '.join(map(repr, ROPE_SCALINGS))}")
    if kind == 'yarn':
        for name, value in (('truncate', True), ('mscale', None), ('mscale_all_dim', None)):
            if rope.get(name, value) not in (value, None):
                refuse(folder, name, rope[name], value)
        rope = ops.fill_yarn(rope)
    numbers = {name: rope.get(name) for name in ROPE_SCALINGS[kind]}
    if not all(isinstance(value, int | float) for value in numbers.values()):
        refuse(folder, key, rope, f'numbers for {", ".join(numbers)}')
    return base, {'rope_type': kind, **numbers}


def open_tensors(folder, stack):
    """Open the safetensors files of a folder, until the ExitStack closes them.

    -> {bare name: (file, name in the file)}. A bare name has no prefix: a model without a head
    lacks it.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError('the package safetensors is not installed: '
                        "pip install -c constraints.txt -e '.[hf]'") from None
    names = sorted(name for name in os.listdir(folder) if name.endswith('.safetensors')
                   and os.path.isfile(os.path.join(folder, name)))  # opening a pipe would wait
    shards = [name for name in names if re.fullmatch(r'model-\d+-of-\d+\.safetensors', name)]
    names = ['model.safetensors'] if 'model.safetensors' in names else shards or names
    if not names:
        raise UserError(f'{folder} has no .safetensors file. A pytorch_model.bin, a pickle, is not '
                        f'read; load it with transformers and call save_pretrained()')
    tensors = {}
    for path in (os.path.join(folder, name) for name in names):
        try:
            opened = stack.enter_context(safe_open(path, 'pt'))
        except SafetensorError as error:
            raise UserError(f'{path}, {os.path.getsize(path):,} bytes, cannot be read ({error}): '
                            f'it is truncated, or a pointer of git-lfs; copy it again') from error
        tensors |= {bare(name): (opened, name) for name in opened.keys()}
    return tensors


def bare(name):
    """Remove the prefix that a model with a head has."""
    return name.removeprefix('transformer.').removeprefix('model.')


def match(model, tensors, hf, folder):
    """Match a model's weights with open_tensors()'s, before memory is taken.

    -> {name: (file, name in the file)}. Raises UserError unless all names, shapes and types fit.
    """
    weights, problems, sources = weights_of(model), [], {}
    if hf['tie_word_embeddings'] and 'lm_head.weight' in tensors:
        weights['lm_head.weight'] = model.transformer.wte.weight
    for name, weight in weights.items():
        file, stored = tensors.pop(bare(name), (None, name))
        if name.endswith('.bias') and not has_bias(hf, name.removesuffix('.bias')):
            problems += [f'unexpected tensor {stored}'] * (file is not None)
        elif file is None:
            problems.append(f'no tensor {name}')
        elif (shape := tuple(file.get_slice(stored).get_shape())) != tuple(weight.shape):
            problems.append(f'{stored} has shape {shape}, config.json gives {tuple(weight.shape)}')
        elif (dtype := file.get_slice(stored).get_dtype()) not in ('F32', 'BF16', 'F16'):
            problems.append(f'{stored} is of type {dtype}, expected F32, BF16 or F16')
        else:
            sources[name] = file, stored
    # buffers that some published files have: the causal mask and RoPE's frequencies
    buffers = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')
    problems += [f'unexpected tensor {name}' for name in sorted(tensors)
                 if not name.endswith(buffers)]
    if problems:
        more = f' and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise UserError(f'{folder}: {"; ".join(problems[:3])}{more}. The files do not hold the '
                        f'{hf["model_type"]} of config.json; copy all of them again')
    return sources


def copy_weights(model, sources, folder):
    """Copy the tensors of match() into a model.

    Raises UserError for a head that is not tied.
    """
    for name, weight in weights_of(model).items():
        if name in sources:
            file, stored = sources.pop(name)
            weight.copy_(file.get_tensor(stored))
        else:  # all linear layers of a block have biases here, or none
            weight.zero_()
    for file, stored in sources.values():
        if not torch.equal(file.get_tensor(stored).float(), model.transformer.wte.weight):
            refuse(folder, 'tie_word_embeddings', True,
                   'False, because lm_head.weight differs from the embedding')


def load_tokenizer(folder):
    """Read the tokenizer of the model in a folder; -> dict for tokenizer.from_dict().

    Without a tokenizer file -> GPT-2's for a model with GPT-2's vocabulary, else None. Raises
    UserError if its ids could differ from transformers' or exceed the model's.
    """
    hf = read_config(folder)
    files = set(os.listdir(folder))
    if 'tokenizer.json' in files or any({*names} <= files for names in formats.GPT2_FILES):
        described = formats.read(folder)
    elif 'tokenizer.model' in files:
        try:
            described = formats.read(os.path.join(folder, 'tokenizer.model'))
        except UserError as error:
            raise UserError(f'{error} (no tokenizer.json stands beside this SentencePiece file: '
                            f'the model can be read, its text cannot)') from None
    else:
        is_gpt2 = hf['model_type'] == 'gpt2' and hf['vocab_size'] in (50257, 50304)  # 50304: padded
        return {'kind': 'tiktoken', 'name': 'gpt2'} if is_gpt2 else None
    n_ids = tokenizer.from_dict(described).vocab_size
    if n_ids > hf['vocab_size']:
        raise UserError(f'{folder}: the tokenizer has ids up to {n_ids - 1}, the model only '
                        f'{hf["vocab_size"]}; copy the tokenizer.json that belongs to the model')
    return described


def load_chat_template(folder, described=None):
    """Read the Jinja template of a chat model; -> text, or None.

    described: its tokenizer, see load_tokenizer(). tokenizer/chat.py finds bos_token and eos_token
    by their usual names. If the folder names others, the template gets a line that sets them.
    """
    path = os.path.join(folder, 'tokenizer_config.json')
    content = vocabulary.read_json(path) if os.path.exists(path) else {}
    template = content.get('chat_template') if isinstance(content, dict) else content
    jinja_path = os.path.join(folder, 'chat_template.jinja')
    if os.path.exists(jinja_path):
        template = vocabulary.read_utf8(jinja_path)
    if isinstance(template, list):  # several, by name
        template = next((entry.get('template') for entry in template
                         if isinstance(entry, dict) and entry.get('name') == 'default'), None)
    if not isinstance(template, str | None) or not isinstance(content, dict):
        raise UserError(f'{path} is damaged: expected an object whose chat_template is a text; '
                        f'copy it again')
    used = re.findall(r'\b[be]os_token\b', template or '')
    if not (used and described):
        return template
    usual = chat.ends_of_text(tokenizer.from_dict(described))
    for name, usual_token in zip(('bos_token', 'eos_token'), usual, strict=True):
        token = content.get(name)
        token = token.get('content') if isinstance(token, dict) else token
        if name in used and isinstance(token, str) and token != usual_token:
            template = f'{{%- set {name} = {json.dumps(token)} %}}\n{template}'
    return template


def same_tokenizer(first, second):
    """Return whether two descriptions give equal ids for all text and special tokens."""
    def rules(described):
        described = tokenizer_json.BYTES if described['kind'] == 'byte' else spelt_out(described)
        return {key: value for key, value in described.items()
                if key not in ('bos_token', 'visible_tokens')}

    return first == second or rules(first) == rules(second)


def spelt_out(described):
    """Replace the name of a published vocabulary by its merges."""
    if described['kind'] != 'tiktoken':
        return described
    return tokenizer.TiktokenTokenizer(described['name']).bpe.to_dict()


def weights_of(model):
    """Return {transformers' name: view of a parameter, in transformers' shape}.

    The layout is GPT-2's with learned positions, Llama's with RoPE. A tied head is left out, as in
    transformers' files.
    """
    c, weights = model.config, {}
    kv = c.kv_heads * c.head_size
    sizes = {'attn.c_attn': [c.n_head * c.head_size, kv, kv], 'mlp.c_fc': [c.mlp_width] * 2}
    for name, parameter in model.named_parameters():
        name, data = name.removeprefix('transformer.'), parameter.data
        if name == 'lm_head.weight':
            weights[name] = data
        elif c.pos == 'learned':  # OpenAI's Conv1D stores matrices as (in, out)
            is_conv = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            weights[f'transformer.{name}'] = data.t() if is_conv else data
        else:
            layer, module, kind = re.fullmatch(r'(?:h\.(\d+)\.)?(.+)\.(weight|bias)', name).groups()
            prefix = 'model.' if layer is None else f'model.layers.{layer}.'
            parts = data.split(sizes[module]) if module in sizes else [data]
            for llama_name, part in zip(LLAMA_NAMES[module], parts, strict=True):
                weights[f'{prefix}{llama_name}.{kind}'] = part
    return weights


def save(model, described, chat_template, folder, dtype=torch.float32):
    """Write a model as a new folder, all or nothing; -> its config.json as a dict.

    described: its tokenizer, for tokenizer.from_dict(); chat_template: Jinja's, or None; dtype: of
    the tensors. Raises UserError if transformers has no such model or tokenizer, or if the folder
    cannot be written.
    """
    check_expressible(model.config)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f'{folder} exists and is not empty; name another --out, or remove it')
    described = spelt_out(described)
    text_tokenizer = tokenizer.from_dict(described)
    if text_tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f'the tokenizer has {text_tokenizer.vocab_size} ids and the model '
                        f'{model.config.vocab_size}: they do not belong together; expected the '
                        f'tokenizer that the model was trained with')
    ids, entries = special_tokens_of(text_tokenizer, described, chat_template)
    entries = {'model_max_length': model.config.block_size, **entries}
    hf = {**config_json(model, described), **ids, 'torch_dtype': str(dtype).removeprefix('torch.')}
    if isinstance(ids['eos_token_id'], list):
        hf['eos_token_id'] = ids['eos_token_id'][0]

    temporary = temporary_name(folder.rstrip('/'))
    try:
        os.makedirs(temporary)
        formats.write_hf_folder(described, temporary, entries)
        for name, content in (('generation_config.json', ids), ('config.json', hf)):
            write_file(os.path.join(temporary, name), vocabulary.to_json(content))
        write_tensors(tensors_of(model, hf), temporary, dtype)
        if os.path.isdir(folder):  # an empty one
            os.rmdir(folder)
        os.rename(temporary, folder)
        sync_folder(os.path.dirname(os.path.abspath(folder)))
    except OSError as error:
        raise UserError(f'{folder} could not be written ({error.strerror or error}); free some '
                        f'space, or name another --out') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return hf


def check_expressible(config):
    """Raise UserError naming the fields that no model type of transformers has."""
    c, is_gpt2 = config, config.pos == 'learned'
    fixed = {'logit_softcap': 0, 'residual_lambdas': False, 'value_embeddings': False,
             'head_gates': False, 'value_gates': False, 'window': 0, 'head_dim': None,
             'norm': 'layernorm' if is_gpt2 else 'rmsnorm', 'mlp': 'gelu' if is_gpt2 else 'swiglu'}
    if is_gpt2:
        fixed |= {'n_kv_head': None, 'qk_norm': False}
    # values that compute the same as the fixed ones
    splits_evenly = c.n_embd % c.n_head == 0 or c.qk_norm  # Llama's config demands it
    equal = {'window': not any(0 < c.window_of(i) < c.block_size for i in range(c.n_layer)),
             'head_dim': c.n_head * c.head_size == c.n_embd if is_gpt2 else splits_evenly,
             'mlp': is_gpt2 and c.mlp in ACTIVATIONS.values(), 'n_kv_head': c.kv_heads == c.n_head}
    wrong = {name: value for name, value in fixed.items()
             if getattr(c, name) != value and not equal.get(name)}
    if wrong:
        layout = "GPT-2's layout (pos='learned')" if is_gpt2 else "Llama's layout (pos='rope')"
        values = ', '.join(f'{name}={getattr(c, name)!r}' for name in wrong)
        raise UserError(f'{values}: {layout} in transformers lacks this, so the model cannot be '
                        f'exported. Train one that can: '
                        + ' '.join(f'--{name}={value}' for name, value in wrong.items()))


def special_tokens_of(text_tokenizer, described, chat_template):
    """Return a text's begin and end ids, and the entries of tokenizer_config.json.

    The ids are {'bos_token_id': id, 'eos_token_id': id or list of ids}, None where there is none.
    A chat model begins and ends a text with the same tokens as in tokenizer/chat.py.
    """
    ids, ends, entries = text_tokenizer.special_tokens, tokenizer_json.document_ends(described), {}
    begin = described.get('bos_token') or next(iter(ends), None)
    end_ids = [ids[end] for end in ends]
    if chat_template is not None:
        begin, end = chat.ends_of_text(text_tokenizer)
        stop_ids, _ = chat.find_endings(chat_template, text_tokenizer)
        end_ids = sorted(stop_ids, key=lambda i: (i != ids.get(end), i))  # the usual one first
        entries = {'chat_template': chat_template, 'bos_token': begin, 'eos_token': end}
    end_ids = end_ids if len(end_ids) > 1 else next(iter(end_ids), None)
    return ({'bos_token_id': ids.get(begin), 'eos_token_id': end_ids},
            {name: value for name, value in entries.items() if value})


def config_json(model, described):
    """Return the config.json of a model, as a dict without its special tokens."""
    c = model.config
    if c.pos == 'learned':
        activations = {mlp: name for name, mlp in reversed(ACTIVATIONS.items())}
        return {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2',
                **{key: getattr(c, field) for field, key in FIELDS['gpt2'].items()},
                'activation_function': activations[c.mlp], 'resid_pdrop': c.dropout,
                'embd_pdrop': c.dropout, 'attn_pdrop': c.dropout}
    # biases that are all 0, as in a model that was read, count as none
    biased = {module for name, weight in weights_of(model).items() if name.endswith('.bias')
              for module in (*QKV, 'o_proj', 'mlp') if module in name and weight.any()}
    if c.qk_norm and 'mlp' in biased:
        raise UserError('bias=True: Qwen3, the one model type with QK-norm, has no biases in its '
                        'MLPs, so the model cannot be exported. Train one that can: --bias=False')
    # transformers 5 cuts text of a qwen2 by Qwen's pattern, not by tokenizer.json's
    cuts_like_qwen = (described.get('pattern') == PATTERNS['qwen2']
                      and described.get('normalizer') == 'NFC' and not described['ignore_merges'])
    fits_qwen2 = cuts_like_qwen and c.n_head * c.head_size == c.n_embd  # it has no head_dim
    is_qwen2 = biased and biased <= {*QKV} and fits_qwen2
    kind = 'qwen3' if c.qk_norm else 'qwen2' if is_qwen2 else 'llama'
    values = {**vars(c), 'n_kv_head': c.kv_heads, 'head_dim': c.head_size, 'n_inner': c.mlp_width}
    hf = {'architectures': [f'{kind.capitalize()}ForCausalLM'], 'model_type': kind,
          **{key: values[field] for field, key in FIELDS['llama'].items()},
          'hidden_act': 'silu', 'rope_theta': c.rope_base, 'rope_scaling': c.rope_scaling,
          'attention_dropout': c.dropout}
    if kind != 'qwen2':
        hf['attention_bias'] = bool(biased - {'mlp'})
    return {**hf, **({'mlp_bias': 'mlp' in biased} if kind == 'llama' else
                     {'use_sliding_window': False})}


def tensors_of(model, hf):
    """Return {name: tensor} as the model type of the config.json `hf` has them.

    Biases that only transformers' model has are 0. QK-norm there has weights, and the eps of the
    other norms: x / sqrt(mean(x^2) + eps) does not change if x grows by s and eps by s^2, so
    queries and keys are scaled where QK_NORM_EPS differs.
    """
    c, weights, tensors = model.config, weights_of(model), {}
    lacks_weights = c.qk_norm and not c.qk_norm_weight
    for name, weight in weights.items():
        module, kind = name.rsplit('.', 1)
        if kind == 'bias':
            continue  # written with its weight
        is_scaled = lacks_weights and module.endswith(('q_proj', 'k_proj'))
        scale = (c.norm_eps / QK_NORM_EPS) ** 0.5 if is_scaled else 1.0
        tensors[name] = weight if scale == 1.0 else weight * scale
        if has_bias(hf, module):
            n_out = weight.shape[-1 if c.pos == 'learned' else 0]
            bias = weights.get(f'{module}.bias', torch.zeros(n_out))
            tensors[f'{module}.bias'] = bias if scale == 1.0 else bias * scale
    if lacks_weights:
        tensors |= {f'model.layers.{layer}.self_attn.{name}.weight': torch.ones(c.head_size)
                    for layer in range(c.n_layer) for name in ('q_norm', 'k_norm')}
    return tensors


def write_tensors(tensors, folder, dtype):
    """Write {name: tensor} as model.safetensors; above SHARD as files with an index."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards = list(batches(tensors.items(), SHARD, lambda item: item[1].numel() * dtype.itemsize))
    n = len(shards)
    files = ['model.safetensors'] if n == 1 else [
        f'model-{i:05}-of-{n:05}.safetensors' for i in range(1, n + 1)]
    for file, shard in zip(files, shards, strict=True):
        path = os.path.join(folder, file)
        copies = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in shard}
        try:
            save_file(copies, path, {'format': 'pt'})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(str(error)) from error
        # save_file() makes a file that only its owner can read
        shutil.copymode(os.path.join(folder, 'config.json'), path)
        with open(path, 'rb') as f:
            os.fsync(f.fileno())
    if n > 1:
        size = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
        index = {'metadata': {'total_size': size}, 'weight_map': {
            name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}}
        write_file(os.path.join(folder, 'model.safetensors.index.json'), vocabulary.to_json(index))
