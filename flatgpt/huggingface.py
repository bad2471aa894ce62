"""
Models from and to folders in Hugging Face's layout: config.json, safetensors, tokenizer.json.

    model, described, chat_template = load('Qwen/Qwen3-0.6B')     # a folder, a hub id, or one of GPT-2's names
    save(model, described, chat_template, 'folder')               # for transformers, vLLM, llama.cpp, ...

Two families have the network of model.py: GPT-2, and what came of Llama, the model types llama, mistral, qwen2 and
qwen3. Their tensors are parts of the parameters here: queries, keys and values are one matrix, and so are the two of
SwiGLU. Values are copied as they are, bf16 and fp16 into fp32, which holds them exactly. Whatever config.json says that
this network would not do is refused by name.
"""

import json
import os
import re
import shutil
from contextlib import ExitStack

import torch

import tokenizer
from configurator import UserError
from flatgpt.files import sync_folder
from model import GPT, ROPE_SCALINGS, GPTConfig
from tokenizer import chat, formats
from tokenizer.patterns import PATTERNS, batches

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
HUB_ID = r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*'  # owner/name
FILES = ['config.json', 'model*.safetensors', 'model.safetensors.index.json', 'tokenizer.json', 'tokenizer_config.json',
         'vocab.json', 'merges.txt', 'chat_template.jinja']

# What transformers takes where a config.json does not say it, as transformers leaves out what is usual.
GPT2_DEFAULTS = {'n_positions': 1024, 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5, 'n_inner': None,
                 'tie_word_embeddings': True}
LLAMA_DEFAULTS = {'num_key_value_heads': None, 'head_dim': None, 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6,
                  'tie_word_embeddings': False, 'attention_bias': False, 'mlp_bias': False, 'sliding_window': None,
                  'use_sliding_window': False, 'max_window_layers': 28}
DEFAULTS = {
    'gpt2': GPT2_DEFAULTS, 'llama': LLAMA_DEFAULTS,
    'mistral': {**LLAMA_DEFAULTS, 'num_key_value_heads': 8, 'max_position_embeddings': 131072, 'sliding_window': 4096},
    'qwen2': {**LLAMA_DEFAULTS, 'num_key_value_heads': 32, 'max_position_embeddings': 32768, 'sliding_window': 4096},
    'qwen3': {**LLAMA_DEFAULTS, 'num_key_value_heads': 32, 'max_position_embeddings': 32768, 'sliding_window': 4096,
              'head_dim': 128},
}
# of config.json, by family: the keys that have to be there, and of others the values that can be read
NEEDED = {'gpt2': ('vocab_size', 'n_embd', 'n_layer', 'n_head'),
          'llama': ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')}
READABLE = {'gpt2': {'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
                     'add_cross_attention': (False,), 'quantization_config': (None,)},
            'llama': {'hidden_act': ('silu', 'swish'), 'partial_rotary_factor': (1, None), 'rope_interleaved': (False,),
                      'quantization_config': (None,)}}
ACTIVATIONS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_erf'}  # -> GPTConfig.mlp

# modules here -> there; the heads of queries, keys and values, and the halves of SwiGLU, stand side by side here
LLAMA_NAMES = {
    'wte': ['embed_tokens'], 'ln_f': ['norm'], 'ln_1': ['input_layernorm'], 'ln_2': ['post_attention_layernorm'],
    'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'], 'attn.c_proj': ['self_attn.o_proj'],
    'attn.q_norm': ['self_attn.q_norm'], 'attn.k_norm': ['self_attn.k_norm'],
    'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'], 'mlp.c_proj': ['mlp.down_proj'],
}
QKV = ('q_proj', 'k_proj', 'v_proj')
QK_NORM_EPS = 1e-6  # of model.py's QK-norm without weights
SHARD = 4 * 2**30  # bytes; larger models are written as several files


# from there -----------------------------------------------------------------------------------------------------------

def load(name_or_folder):
    """
    -> (model on the CPU in fp32, its tokenizer as tokenizer.from_dict() takes it, its chat template). The tokenizer is
    None where the folder has none, the template, Jinja's, where the model has none. name_or_folder: see find(). Raises
    ValueError for what can't be read; where only the tokenizer can't, load_model() still does the model.
    """
    folder = find(name_or_folder)
    described = load_tokenizer(folder)
    return load_model(folder), described, load_chat_template(folder, described)


def find(name_or_folder):
    """
    The folder of a model: itself, or of one of GPT2_NAMES or a hub id such as 'Qwen/Qwen3-0.6B' the copy in the hub's
    cache, downloaded if need be. Raises ValueError where there is none.
    """
    if os.path.isdir(name_or_folder):
        return name_or_folder
    hub_id = f'openai-community/{name_or_folder}' if name_or_folder in GPT2_NAMES else name_or_folder
    if not re.fullmatch(HUB_ID, hub_id):
        raise UserError(f'{name_or_folder!r} is neither a folder nor one of {", ".join(GPT2_NAMES)}, nor the id of a '
                         f'model on the hub, such as Qwen/Qwen3-0.6B')
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f'{name_or_folder!r} is no folder here, and to get it from the hub needs huggingface_hub: '
                         f"pip install -c constraints.txt -e '.[hf]'") from None
    try:
        return snapshot_download(hub_id, allow_patterns=FILES)
    except Exception as error:  # the hub's errors have no common base across its versions and its HTTP libraries
        why = f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'
        raise UserError(f'{name_or_folder!r} is no folder here and could not be downloaded ({why}). Without a '
                         f'network: copy config.json, the *.safetensors files and their index, tokenizer.json and '
                         f'tokenizer_config.json of huggingface.co/{hub_id} into a folder and pass '
                         f'--init_from=FOLDER') from error


def load_model(folder, dropout=0.0):
    """
    The GPT in a folder, on the CPU in fp32. Raises ValueError naming what is damaged, missing or too much, or what this
    network does not do.
    """
    hf = read_config(folder)
    fields = gpt2_fields(hf, folder) if hf['model_type'] == 'gpt2' else llama_fields(hf, folder)
    try:
        config = GPTConfig(**fields, dropout=dropout)
    except ValueError as error:
        raise UserError(f'{os.path.join(folder, "config.json")} is of no model that can be: {error}') from error
    with torch.device('meta'):  # neither memory nor random numbers for weights that are replaced
        model = GPT(config)
    model.to_empty(device='cpu')
    if config.tie_embeddings:  # which to_empty() undoes
        model.transformer.wte.weight = model.lm_head.weight
    with ExitStack() as stack:
        copy_weights(weights_of(model), open_tensors(folder, stack), hf, folder)
    return model


def read_config(folder):
    """The content of config.json, with what transformers takes for what it doesn't say."""
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        raise UserError(f'{folder}: no config.json; expected a folder in Hugging Face layout with config.json and '
                         f'model.safetensors')
    try:
        with open(path, encoding='utf-8') as f:
            hf = dict(json.load(f))
    except (TypeError, ValueError) as error:
        raise UserError(f'{path} is damaged ({error}); copy it again') from error
    kind = hf.get('model_type')
    if 'model_type' not in hf and any(os.path.exists(os.path.join(folder, name)) for name in ('best.pt', 'ckpt.pt')):
        raise UserError(f'{folder} is a run of train.py, not a Hugging Face folder; say --out_dir={folder} instead '
                         f'(train.py: --init_from=resume --out_dir={folder})')
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise UserError(f'{path}: model_type is {kind!r}; can be read: {", ".join(DEFAULTS)}')
    family = 'gpt2' if kind == 'gpt2' else 'llama'
    if missing := [key for key in NEEDED[family] if key not in hf]:
        raise UserError(f'{path} lacks {", ".join(missing)}; copy it again')
    for key in NEEDED[family]:
        if type(hf[key]) is not int or hf[key] < 1:
            raise UserError(f'{path}: {key} is {hf[key]!r}; expected a number of 1 or more')
    for key, values in READABLE[family].items():
        if hf.get(key, values[0]) not in values:
            refuse(folder, key, hf[key], ' or '.join(map(repr, values)))
    hf = {**DEFAULTS[kind], **hf}
    for key in ('max_position_embeddings', 'sliding_window', 'max_window_layers'):
        if not isinstance(hf.get(key), int | float | None):
            refuse(folder, key, hf[key], 'a number')
    return hf


def refuse(folder, key, value, expected):
    raise UserError(f'{os.path.join(folder, "config.json")}: {key} = {value!r} is not supported, expected {expected}')


def gpt2_fields(hf, folder):
    """{field of GPTConfig: value} of a GPT-2's config.json."""
    activation = hf['activation_function']
    if activation not in ACTIVATIONS:
        refuse(folder, 'activation_function', activation, ' or '.join(map(repr, ACTIVATIONS)))
    return {'block_size': hf['n_positions'], 'vocab_size': hf['vocab_size'], 'n_layer': hf['n_layer'],
            'n_head': hf['n_head'], 'n_embd': hf['n_embd'], 'bias': True, 'mlp': ACTIVATIONS[activation],
            'n_inner': None if hf['n_inner'] == 4 * hf['n_embd'] else hf['n_inner'],
            'norm_eps': hf['layer_norm_epsilon'], 'tie_embeddings': hf['tie_word_embeddings']}


def llama_fields(hf, folder):
    """{field of GPTConfig: value} of the config.json of a Llama, Mistral, Qwen2 or Qwen3."""
    kind, n_head, n_embd = hf['model_type'], hf['num_attention_heads'], hf['hidden_size']
    rope_base, rope_scaling = rope_of(hf, folder)
    # a window as wide as the context is none, so a model with one is read with the context in which it is none
    block_size, window = hf['max_position_embeddings'], window_of(hf, folder)
    has_bias = biases_of(hf)
    bias, qkv_bias = has_bias['self_attn.o_proj'] or has_bias['mlp'], has_bias['self_attn.q_proj']
    return {'block_size': block_size if window is None else min(block_size, window), 'vocab_size': hf['vocab_size'],
            'n_layer': hf['num_hidden_layers'], 'n_head': n_head, 'n_kv_head': hf['num_key_value_heads'],
            'n_embd': n_embd, 'head_dim': None if hf['head_dim'] == n_embd / n_head else hf['head_dim'],
            'n_inner': hf['intermediate_size'], 'bias': bias, 'qkv_bias': None if qkv_bias == bias else qkv_bias,
            'mlp': 'swiglu', 'norm': 'rmsnorm', 'norm_eps': hf['rms_norm_eps'], 'pos': 'rope', 'rope_base': rope_base,
            'rope_scaling': rope_scaling, 'qk_norm': kind == 'qwen3', 'qk_norm_weight': kind == 'qwen3',
            'tie_embeddings': hf['tie_word_embeddings']}


def biases_of(hf):
    """Which linear layers of a Llama's blocks have biases there: {'self_attn.q_proj': bool, ..., 'mlp': bool}."""
    kind = hf['model_type']
    attention = hf['attention_bias'] if kind in ('llama', 'qwen3') else False
    qkv = kind == 'qwen2' or attention
    return {**{f'self_attn.{name}': qkv for name in QKV}, 'self_attn.o_proj': attention,
            'mlp': hf['mlp_bias'] if kind == 'llama' else False}


def rope_of(hf, folder):
    """-> (rope_base, rope_scaling) of GPTConfig. transformers 5 writes all of it to rope_parameters, 4 beside it."""
    key = 'rope_scaling' if hf.get('rope_scaling') else 'rope_parameters'
    rope = hf.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        refuse(folder, key, rope, 'an object with rope_type, the same for all layers')
    if rope.get('partial_rotary_factor', 1) not in (1, None):
        refuse(folder, 'partial_rotary_factor', rope['partial_rotary_factor'], '1: all channels of a head are rotated')
    base = rope.get('rope_theta') or hf.get('rope_theta') or 10000.0
    if not isinstance(base, int | float):
        refuse(folder, 'rope_theta', base, 'a number')
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind == 'default':
        return float(base), None
    if kind not in ROPE_SCALINGS:
        refuse(folder, key, rope, f"a rope_type of 'default', {', '.join(map(repr, ROPE_SCALINGS))}")
    return float(base), {'rope_type': kind, **{name: rope.get(name) for name in ROPE_SCALINGS[kind]}}


def window_of(hf, folder):
    """How many positions some layer of a Mistral or Qwen sees, or None for all."""
    kind, window = hf['model_type'], hf['sliding_window']
    if kind == 'llama' or (kind != 'mistral' and not hf['use_sliding_window']):
        return None
    layers = hf.get('layer_types') or ['sliding_attention'] * (hf['num_hidden_layers'] > hf['max_window_layers'])
    if kind != 'mistral' and set(layers) - {'full_attention', 'sliding_attention'}:
        refuse(folder, 'layer_types', layers, "'full_attention' and 'sliding_attention'")
    return window if kind == 'mistral' or 'sliding_attention' in layers else None


def open_tensors(folder, stack):
    """
    {name: (open safetensors file, its name in there)} of all tensors in a folder, names without the prefix by which a
    model with a head differs from one without. The files stay open as long as the ExitStack.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("safetensors is not installed: pip install -c constraints.txt -e '.[hf]'") from None
    tensors = {}
    for file in tensor_files(folder):
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise UserError(f'{path} is missing, which model.safetensors.index.json names; copy it there')
        try:
            opened = stack.enter_context(safe_open(path, 'pt'))
        except SafetensorError as error:
            raise UserError(f'{path}, {os.path.getsize(path):,} bytes, can not be read ({error}): it is truncated or '
                             f'something else, such as a pointer of git-lfs; copy it again') from error
        tensors |= {without_prefix(name): (opened, name) for name in opened.keys()}
    return tensors


def tensor_files(folder):
    """The names of a model's safetensors files: those of the index, or model.safetensors, or whatever there is."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    if os.path.exists(index):
        try:
            with open(index, encoding='utf-8') as f:
                return sorted({os.path.basename(file) for file in json.load(f)['weight_map'].values()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f'{index} is damaged ({type(error).__name__}: {error}); copy it again') from error
    files = sorted(file for file in os.listdir(folder) if file.endswith('.safetensors'))
    if not files:
        raise UserError(f'{folder}: no .safetensors file in it (a pytorch_model.bin is a pickle and is not read; load '
                         f'it with transformers and call save_pretrained(), which writes one)')
    return ['model.safetensors'] if 'model.safetensors' in files else files


def without_prefix(name):
    return name.removeprefix('transformer.').removeprefix('model.')


def copy_weights(weights, tensors, hf, folder):
    """Fill `weights`, of weights_of(), from `tensors`, of open_tensors(). Raises ValueError unless all are there."""
    # what some published files have besides: the causal mask, RoPE's frequencies, and a head that is the embedding
    extra = ('.attn.bias', '.attn.masked_bias', '.rotary_emb.inv_freq')
    tied_head = tensors.pop('lm_head.weight', None) if hf['tie_word_embeddings'] else None
    unexpected = sorted(name for name in tensors.keys() - {without_prefix(name) for name in weights}
                        if not name.endswith(extra))
    has_bias = {} if hf['model_type'] == 'gpt2' else biases_of(hf)
    missing, wrong = [], []
    for name, weight in weights.items():
        found = tensors.get(without_prefix(name))
        if name.endswith('.bias') and any(key in name and not has_bias[key] for key in has_bias):
            weight.zero_()  # it has one here because others have
            unexpected += [name] * (found is not None)
        elif found is None:
            missing.append(name)
        elif (shape := tuple(found[0].get_slice(found[1]).get_shape())) != tuple(weight.shape):
            wrong.append(f'{found[1]} has shape {shape}, config.json says {tuple(weight.shape)}')
        elif (dtype := found[0].get_slice(found[1]).get_dtype()) not in ('F32', 'BF16', 'F16'):
            wrong.append(f'{found[1]} is of type {dtype}, expected F32, BF16 or F16')
    for found, what in ((missing, 'no tensor'), (wrong, ''), (unexpected, 'unexpected tensor')):
        if found:
            more = f' and {len(found) - 3} more of {len(weights)}' if len(found) > 3 else ''
            named = ', '.join(found[:3]) if what else '; '.join(found[:3])
            raise UserError(f'{folder}: {f"{what} " if what else ""}{named}{more}. The files are not those of a whole '
                             f'{hf["model_type"]} of this config.json: copy all of them again')
    for name, weight in weights.items():
        if (found := tensors.get(without_prefix(name))) is not None:
            weight.copy_(found[0].get_tensor(found[1]))
    embedding = next(weight for name, weight in weights.items() if name.endswith(('embed_tokens.weight', 'wte.weight')))
    if tied_head and not torch.equal(tied_head[0].get_tensor(tied_head[1]).to(embedding.dtype), embedding):
        refuse(folder, 'tie_word_embeddings', True, 'False, as lm_head.weight is not the embedding')


def load_tokenizer(folder):
    """
    The tokenizer of the model in a folder, as tokenizer.from_dict() takes it; None where there is none, unless its ids
    are GPT-2's. Raises ValueError where its ids could differ, or are more than the model's.
    """
    hf = read_config(folder)
    files = set(os.listdir(folder))
    if 'tokenizer.json' in files or any({*names} <= files for names in formats.GPT2_FILES):
        described = formats.read(folder)
    elif 'tokenizer.model' in files:
        raise UserError(f'{folder}: its tokenizer.model is one of SentencePiece, whose tokens do not come from bytes, '
                         f'and it has no tokenizer.json; the model can be read, its text can not')
    else:
        is_gpt2s = hf['model_type'] == 'gpt2' and hf['vocab_size'] in (50257, 50304)  # as it is, and padded
        return {'kind': 'tiktoken', 'name': 'gpt2'} if is_gpt2s else None
    n_ids = tokenizer.from_dict(described).vocab_size
    if n_ids > hf['vocab_size']:
        raise UserError(f'{folder}: the tokenizer has ids up to {n_ids - 1}, the model only {hf["vocab_size"]}; copy '
                         f'the tokenizer.json that belongs to the model')
    return described


def load_chat_template(folder, described=None):
    """
    The Jinja template with which a model was trained to chat, or None. described: its tokenizer, of load_tokenizer();
    where the folder says that bos_token or eos_token is another than chat.py finds by name, so does the template then.
    """
    path, own = os.path.join(folder, 'tokenizer_config.json'), os.path.join(folder, 'chat_template.jinja')
    content = formats.read_json(path) if os.path.exists(path) else {}
    template = content.get('chat_template') if isinstance(content, dict) else content
    if os.path.exists(own):
        template = formats.read_utf8(own)
    if isinstance(template, list):  # several by name
        named = {entry.get('name'): entry.get('template') for entry in template if isinstance(entry, dict)}
        template = named.get('default')
    if not isinstance(template, str | None) or not isinstance(content, dict):
        raise UserError(f'{path} is damaged: expected an object whose chat_template is a text; copy it again')
    used = [name for name in ('bos_token', 'eos_token') if re.search(rf'\b{name}\b', template or '')]
    if not (used and described):
        return template
    bos_token, eos_token = chat.ends_of_text(tokenizer.from_dict(described))
    for name, by_name in (('bos_token', bos_token), ('eos_token', eos_token)):
        token = content.get(name)
        token = token.get('content') if isinstance(token, dict) else token
        if name in used and isinstance(token, str) and token != by_name:
            template = f'{{%- set {name} = {json.dumps(token)} %}}\n{template}'
    return template


def same_tokenizer(one, other):
    """Whether two descriptions give the same ids for every text and special token."""
    def spelt_out(values):
        if values['kind'] == 'tiktoken':
            values = tokenizer.TiktokenTokenizer(values['name']).bpe.to_dict()
        values = formats.BYTES if values['kind'] == 'byte' else values
        return {key: value for key, value in values.items() if key not in ('bos_token', 'visible_tokens')}

    return one == other or spelt_out(one) == spelt_out(other)


# both ways ------------------------------------------------------------------------------------------------------------

def weights_of(model):
    """
    {name there: view of a parameter here, in the shape it has there}, in GPT-2's layout or, with RoPE, in Llama's. A
    tied head is not among them, as it isn't in transformers' files.
    """
    c, weights = model.config, {}
    kv = c.kv_heads * c.head_size
    sizes = {'attn.c_attn': [c.n_head * c.head_size, kv, kv], 'mlp.c_fc': [c.mlp_width, c.mlp_width]}
    for name, parameter in model.named_parameters():
        name, data = name.removeprefix('transformer.'), parameter.data
        if name == 'lm_head.weight':
            weights[name] = data
        elif c.pos == 'learned':
            stored_as_in_out = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))  # OpenAI's Conv1D
            weights[f'transformer.{name}'] = data.t() if stored_as_in_out else data
        else:
            block, module, kind = re.fullmatch(r'(?:h\.(\d+)\.)?(.+)\.(weight|bias)', name).groups()
            prefix = 'model.' if block is None else f'model.layers.{block}.'
            parts = data.split(sizes[module]) if module in sizes else [data]
            for there, part in zip(LLAMA_NAMES[module], parts, strict=True):
                weights[f'{prefix}{there}.{kind}'] = part
    return weights


# to there -------------------------------------------------------------------------------------------------------------

def check_expressible(config):
    """Raises ValueError naming the fields of GPTConfig that no model type of transformers has like this."""
    c = config
    remedies = {'logit_softcap': '--logit_softcap=0', 'residual_lambdas': '--residual_lambdas=False',
                'value_embeddings': '--value_embeddings=False'}
    wrong = [(name, remedy) for name, remedy in remedies.items() if getattr(c, name)]
    if any(0 < c.window_of(layer) < c.block_size for layer in range(c.n_layer)):
        wrong.append(('window', '--window=0'))
    if c.pos == 'learned':
        layout = "GPT-2's layout, that of pos='learned'"
        wrong += [('norm', '--norm=layernorm')] * (c.norm != 'layernorm')
        wrong += [('mlp', '--mlp=gelu')] * (c.mlp not in ACTIVATIONS.values())
        wrong += [('n_kv_head', '--n_kv_head=None')] * (c.kv_heads != c.n_head)
        wrong += [('head_dim', '--preset=llama')] * (c.n_head * c.head_size != c.n_embd)
        wrong += [('qk_norm', '--qk_norm=False')] * c.qk_norm
    else:
        layout = "Llama's layout, that of pos='rope'"
        wrong += [('norm', '--norm=rmsnorm')] * (c.norm != 'rmsnorm')
        wrong += [('mlp', '--mlp=swiglu')] * (c.mlp != 'swiglu')
        wrong += [('head_dim', '--preset=llama')] * (c.n_embd % c.n_head != 0 and not c.qk_norm)
    if wrong:
        name, remedy = wrong[0]
        others = f' (and {", ".join(f"{n}={getattr(c, n)!r}" for n, _ in wrong[1:])})' if wrong[1:] else ''
        nowhere = 'no model type of transformers has it together with the rest'
        why = nowhere if name in (*remedies, 'window') else f'{layout}, does not have it'
        raise UserError(f'{name}={getattr(c, name)!r}{others}: {why}, so this model can not be exported. Train one '
                         f'that can: {" ".join(dict.fromkeys(remedy for _, remedy in wrong))}')


def save(model, described, chat_template, folder, dtype=torch.float32):
    """
    Write a model, its tokenizer (as tokenizer.from_dict() takes it) and its chat template (or None) as a new folder,
    which is there when it is complete. dtype: of the tensors in it. -> its config.json as a dict. Raises ValueError
    where no model type of transformers is like this one, the tokenizer can't be said in a tokenizer.json, or the folder
    can't be written.
    """
    check_expressible(model.config)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f'{folder} is there already and not empty; name another one (--out), or remove it first')
    if described['kind'] == 'tiktoken':
        described = tokenizer.TiktokenTokenizer(described['name']).bpe.to_dict()
    text_tokenizer = tokenizer.from_dict(described)
    specials = text_tokenizer.special_tokens
    if text_tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f'the tokenizer has {text_tokenizer.vocab_size} ids and the model {model.config.vocab_size}: '
                         f'they do not belong together')
    if model.config.pos == 'learned':
        hf = gpt2_json(model.config)
    else:
        hf = llama_json(model.config, weights_of(model), described)
    ends, more = formats.document_ends(described), {'model_max_length': model.config.block_size}
    begin = described.get('bos_token') or next(iter(ends), None)
    end_ids = [specials[token] for token in ends]
    if chat_template is not None:  # there they are what they are here
        begin, end = chat.ends_of_text(text_tokenizer)
        stop_ids, _ = chat.find_endings(chat_template, text_tokenizer)
        end_ids = sorted(stop_ids, key=lambda i: (i != specials.get(end), i))  # the usual first
        named = {'bos_token': begin, 'eos_token': end}
        more |= {'chat_template': chat_template, **{name: token for name, token in named.items() if token}}
    ids = {'bos_token_id': specials.get(begin), 'eos_token_id': end_ids[0] if end_ids else None}
    hf |= {**ids, 'torch_dtype': str(dtype).removeprefix('torch.')}
    if len(end_ids) > 1:  # any of them
        ids['eos_token_id'] = end_ids

    temporary = f'{folder.rstrip("/")}.tmp-{os.getpid()}'
    try:
        os.makedirs(temporary)
        formats.write_hf_folder(described, temporary, more)
        for name, content in (('generation_config.json', ids), ('config.json', hf)):
            formats.write_file(os.path.join(temporary, name), formats.to_json(content))
        write_tensors(tensors_of(model, hf), temporary, dtype)
        if os.path.isdir(folder):  # empty
            os.rmdir(folder)
        os.rename(temporary, folder)
        sync_folder(os.path.dirname(os.path.abspath(folder)))
    except OSError as error:
        raise UserError(f'{folder} could not be written ({error.strerror or error}); free some space, or name another '
                         f'one (--out)') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return hf


def gpt2_json(c):
    """config.json of a GPT-2."""
    names = {mlp: name for name, mlp in reversed(ACTIVATIONS.items())}
    return {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'vocab_size': c.vocab_size,
            'n_positions': c.block_size, 'n_embd': c.n_embd, 'n_layer': c.n_layer, 'n_head': c.n_head,
            'n_inner': c.n_inner, 'activation_function': names[c.mlp], 'layer_norm_epsilon': c.norm_eps,
            'tie_word_embeddings': c.tie_embeddings, 'resid_pdrop': c.dropout, 'embd_pdrop': c.dropout,
            'attn_pdrop': c.dropout}


def llama_json(c, weights, described):
    """
    config.json of the model type that has what this model has: qwen3 with QK-norm, qwen2 where only queries, keys and
    values have biases, else llama, which can have all of them. Biases that are all 0 count as none, which they are.
    """
    biased = {module for module in (*QKV, 'o_proj', 'mlp') if any(
        module in name and name.endswith('.bias') and weight.any() for name, weight in weights.items())}
    if c.qk_norm and 'mlp' in biased:
        raise UserError('bias=True: Qwen3, the one model type with QK-norm, has no biases in its MLPs, so this model '
                         'can not be exported. Train one that can: --bias=False')
    kind = 'qwen3' if c.qk_norm else 'qwen2' if biased and biased <= {*QKV} else 'llama'
    # Qwen2 has no head_dim, and transformers 5 gives it Qwen's way to cut text, whatever its tokenizer.json says
    is_qwens = (described.get('pattern') == PATTERNS['qwen2'] and described.get('normalizer') == 'NFC'
                and not described['ignore_merges'])
    if kind == 'qwen2' and not (is_qwens and c.head_size * c.n_head == c.n_embd):
        kind = 'llama'
    scaling = c.rope_scaling and {
        name: c.rope_scaling[name] for name in ('rope_type', *ROPE_SCALINGS[c.rope_scaling['rope_type']])}
    hf = {'architectures': [f'{kind.capitalize()}ForCausalLM'], 'model_type': kind, 'vocab_size': c.vocab_size,
          'hidden_size': c.n_embd, 'intermediate_size': c.mlp_width, 'num_hidden_layers': c.n_layer,
          'num_attention_heads': c.n_head, 'num_key_value_heads': c.kv_heads, 'head_dim': c.head_size,
          'hidden_act': 'silu', 'max_position_embeddings': c.block_size, 'rms_norm_eps': c.norm_eps,
          'rope_theta': c.rope_base, 'rope_scaling': scaling, 'tie_word_embeddings': c.tie_embeddings,
          'attention_dropout': c.dropout}
    if kind != 'qwen2':
        hf['attention_bias'] = bool(biased - {'mlp'})
    if kind == 'llama':
        hf['mlp_bias'] = 'mlp' in biased
    else:
        hf['use_sliding_window'] = False
    return hf


def tensors_of(model, hf):
    """
    {name: tensor} of a model as the model type of the config.json `hf` has them: with biases of 0 where only that has
    some, without those that are 0 where only this has some; QK-norm with weights.

    There QK-norm has the eps of the other norms. x / sqrt(mean(x^2) + eps) is the same for s x and s^2 eps, so where
    that is another than the one here, queries and keys are scaled, and nothing else.
    """
    c, weights, tensors = model.config, weights_of(model), {}
    of_ones = c.qk_norm and not c.qk_norm_weight
    has_bias = {} if hf['model_type'] == 'gpt2' else biases_of({**DEFAULTS[hf['model_type']], **hf})
    for name, weight in weights.items():
        module, kind = name.rsplit('.', 1)
        if kind == 'bias':
            continue  # comes with its weight
        is_scaled = of_ones and module.endswith(('q_proj', 'k_proj'))
        scale = (c.norm_eps / QK_NORM_EPS) ** 0.5 if is_scaled else 1.0
        tensors[name] = weight if scale == 1.0 else weight * scale
        is_biased = any(has_bias[key] and key in module for key in has_bias)
        if hf['model_type'] == 'gpt2':
            is_biased = not module.endswith(('wte', 'wpe', 'lm_head'))
        if is_biased:
            n_out = weight.shape[-1] if hf['model_type'] == 'gpt2' else weight.shape[0]
            bias = weights.get(f'{module}.bias', torch.zeros(n_out))
            tensors[f'{module}.bias'] = bias if scale == 1.0 else bias * scale
    if of_ones:
        tensors |= {f'model.layers.{layer}.self_attn.{name}.weight': torch.ones(c.head_size)
                    for layer in range(c.n_layer) for name in ('q_norm', 'k_norm')}
    return tensors


def write_tensors(tensors, folder, dtype):
    """
    Write {name: tensor} as model.safetensors or, where that is larger than SHARD, as several files and an index.

    All with the permissions of the config.json that is there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards = list(batches(tensors.items(), SHARD, lambda item: item[1].numel() * dtype.itemsize))
    files = ['model.safetensors'] if len(shards) == 1 else [
        f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        path = os.path.join(folder, file)
        try:
            save_file({name: t.to(dtype, copy=True).contiguous() for name, t in shard}, path, {'format': 'pt'})
        except SafetensorError as error:  # in which a full disk is wrapped
            raise OSError(str(error)) from error
        shutil.copymode(os.path.join(folder, 'config.json'), path)  # save_file() lets nobody but the owner read it
        with open(path, 'rb') as f:
            os.fsync(f.fileno())
    if len(files) > 1:
        size = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
        index = {'metadata': {'total_size': size},
                 'weight_map': {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}}
        formats.write_file(os.path.join(folder, 'model.safetensors.index.json'), formats.to_json(index))
