"""Models that transformers saved, read by huggingface.py. Run: pytest tests/test_huggingface.py"""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip('transformers')  # before hf_models, which imports it

import huggingface_hub
import transformers
from hf_models import BYTES, LLAMA_3_ROPE, QWENS, YARN, build, close
from safetensors import torch as safetensors_torch

from configurator import UserError
from flatgpt import checkpoint, huggingface, pretrained
from flatgpt.generate import KVCache
from model import GPT, GPTConfig
from tokenizer import formats, tokenizer_json

CASES = {
    'gpt2': ('gpt2', {}), 'gpt2 with the exact gelu': ('gpt2', {'activation_function': 'gelu'}),
    'gpt2 untied': ('gpt2', {'tie_word_embeddings': False, 'n_inner': 50,
                             'layer_norm_epsilon': 1e-3}),
    'llama': ('llama', {}),
    'llama tied': ('llama', {'tie_word_embeddings': True, 'rms_norm_eps': 1e-4}),
    'llama of whole heads': ('llama', {'num_key_value_heads': 4}),
    'llama of one head of keys': ('llama', {'num_key_value_heads': 1, 'rope_theta': 5e5}),
    'llama with biases': ('llama', {'attention_bias': True, 'mlp_bias': True}),
    'llama with biases in attention': ('llama', {'attention_bias': True}),
    'llama with biases in the MLP': ('llama', {'mlp_bias': True}),
    'llama of wide heads': ('llama', {'head_dim': 12}),
    'llama 3': ('llama', {'rope_theta': 5e5, 'rope_scaling': LLAMA_3_ROPE}),
    'llama, yarn': ('llama', {'rope_scaling': YARN, 'head_dim': 32}),
    'llama, yarn with numbers': ('llama', {'rope_theta': 5e5, 'head_dim': 32, 'rope_scaling': {
        **YARN, 'beta_fast': 4.0, 'beta_slow': 0.5, 'attention_factor': 1.3}}),
    'llama, linear': ('llama', {'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}),
    'mistral': ('mistral', {'sliding_window': None}),
    'mistral with a window': ('mistral', {'sliding_window': 12}), 'qwen2': ('qwen2', {}),
    'qwen2 tied': ('qwen2', {'tie_word_embeddings': True}),
    'qwen2, window off': ('qwen2', {'use_sliding_window': False, 'sliding_window': 9}),
    'qwen2 with a window': ('qwen2', {'use_sliding_window': True, 'sliding_window': 10,
                                      'max_window_layers': 1}),
    'qwen3': ('qwen3', {'head_dim': 16}),
    'qwen3 tied': ('qwen3', {'head_dim': 8, 'tie_word_embeddings': True}),
    'qwen3 with another eps': ('qwen3', {'head_dim': 16, 'rms_norm_eps': 1e-3}),
    'qwen3 with biases': ('qwen3', {'head_dim': 8, 'attention_bias': True}),
}


def change_config(folder, **changes):
    """Set keys of a folder's config.json; None removes a key."""
    path = os.path.join(folder, 'config.json')
    with open(path) as f:
        config = {**json.load(f), **changes}
    with open(path, 'w') as f:
        json.dump({key: value for key, value in config.items() if value is not None}, f)


def add_byte_tokenizer(folder):
    formats.write_hf_folder(BYTES, folder)


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_transformers_both_ways(case, tmp_path):
    kind, changes = CASES[case]
    theirs = build(kind, **changes)
    theirs.save_pretrained(tmp_path / 'theirs')
    ours = huggingface.load_model(tmp_path / 'theirs').eval()
    # within the window, attention is full
    windows = {'mistral with a window': 12, 'qwen2 with a window': 10}
    assert ours.config.block_size == windows.get(case, 32)
    idx = torch.randint(300, (2, ours.config.block_size))
    with torch.no_grad():
        expected = theirs(idx).logits
        close(ours(idx, idx)[0], expected)
        cache = KVCache(ours.config, 2)
        close(ours(idx[:, :5], cache=cache)[0], expected[:, 4:5])
        for t in range(5, 9):
            close(ours(idx[:, t : t + 1], cache=cache)[0], expected[:, t : t + 1])

    hf = huggingface.save(ours, QWENS, None, str(tmp_path / 'ours'))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
    assert hf['model_type'] == ('llama' if kind == 'mistral' else kind)
    assert again.dtype == torch.float32
    prompt, n = idx[:1, :3], ours.config.block_size - 3
    with torch.no_grad():
        close(ours(idx, idx)[0], again(idx).logits)
        assert torch.equal(ours.generate(prompt, n, temperature=0),
                           again.generate(prompt, max_new_tokens=n, do_sample=False,
                                          pad_token_id=0))
    if 'another eps' not in case:  # with which queries and keys are scaled
        assert again.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(again.state_dict()[name], p)
                   for name, p in theirs.state_dict().items())


@settings(max_examples=8)
@given(layers=st.integers(1, 3), heads=st.integers(1, 4), width=st.integers(1, 12),
       vocab=st.integers(2, 70), positions=st.integers(1, 20), data=st.data())
def test_gpt2s_of_any_size(tmp_path_factory, layers, heads, width, vocab, positions, data):
    theirs = build('gpt2', n_layer=layers, n_head=heads, n_embd=heads * width, vocab_size=vocab,
                   n_positions=positions)
    folder = tmp_path_factory.mktemp('hf')
    theirs.save_pretrained(folder)
    ours = GPT.from_pretrained(str(folder)).eval()
    idx, targets = torch.randint(vocab, (2, 2, data.draw(st.integers(1, positions))))
    with torch.no_grad():
        expected = theirs(idx).logits
        close(ours(idx, targets)[0], expected)
        close(ours(idx)[0], expected[:, -1:])
        close(ours(idx, targets)[1], F.cross_entropy(expected.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'qwen3'])
def test_gradients_equal_transformers(kind, tmp_path):
    theirs = build(kind)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    idx = torch.randint(300, (2, 16))
    ours(idx, idx)[1].backward()
    F.cross_entropy(theirs(idx).logits.flatten(0, 1), idx.flatten()).backward()
    close(ours.lm_head.weight.grad, theirs.lm_head.weight.grad)
    for p in ours.parameters():
        p.data = p.grad  # so that weights_of() finds the parts of the gradients
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, gradient in huggingface.weights_of(ours).items():
        close(gradient, expected[name])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_written_exactly(dtype, tmp_path):
    theirs = build('qwen2').to(dtype)
    theirs.save_pretrained(tmp_path / 'theirs')
    ours = huggingface.load_model(tmp_path / 'theirs')
    for name, weight in huggingface.weights_of(ours).items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, theirs.state_dict()[name].float())
    huggingface.save(ours, QWENS, None, str(tmp_path / 'ours'), dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', dtype='auto')
    assert again.dtype == dtype
    assert all(torch.equal(p, theirs.state_dict()[name]) for name, p in again.state_dict().items())


def test_through_a_checkpoint_and_back(tmp_path):
    """Read, save as ckpt.pt, open, export: weights and template stay the same, bit for bit."""
    theirs = build('qwen3', vocab_size=320)
    theirs.save_pretrained(tmp_path / 'theirs')
    formats.write_hf_folder(BYTES, str(tmp_path / 'theirs'), {'chat_template': 'Hi {{ messages }}'})
    model, described, chat_template = huggingface.load(str(tmp_path / 'theirs'))
    (tmp_path / 'out').mkdir()
    checkpoint.save(str(tmp_path / 'out'), {
        'model': model.state_dict(), 'model_args': vars(model.config), 'iter_num': 3,
        'best_val_loss': 1.0, 'tokenizer': described, 'chat_template': chat_template}, is_best=True)
    opened = pretrained.open_model('resume', str(tmp_path / 'out'))
    model, text_tokenizer, chat_template, line = opened
    assert 'step 3' in line and chat_template == 'Hi {{ messages }}' and not model.training
    huggingface.save(model, text_tokenizer.to_dict(), chat_template, str(tmp_path / 'ours'))
    one, other = (safetensors_torch.load_file(tmp_path / name / 'model.safetensors')
                  for name in ('theirs', 'ours'))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / 'ours')
    assert fast.chat_template == 'Hi {{ messages }}'
    assert fast('é\n')['input_ids'] == [0xc3, 0xa9, 10]


def test_open_model_takes_a_folder(tmp_path):
    build('llama').save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no tokenizer.json, and its vocab_size of 300 is not"):
        pretrained.open_model(str(tmp_path), 'out')
    add_byte_tokenizer(tmp_path)
    model, text_tokenizer, chat_template, line = pretrained.open_model(str(tmp_path), 'out')
    assert model.config.norm == 'rmsnorm' and not model.training and line == str(tmp_path)
    assert text_tokenizer.encode('é') == [0xc3, 0xa9] and chat_template is None


def test_where_rope_is_written(tmp_path):
    """transformers 4 and 5 write it to different keys; rope_type was first called type."""
    build('llama', rope_theta=5e5, rope_scaling=LLAMA_3_ROPE).save_pretrained(tmp_path)
    expected = GPTConfig(**huggingface.fields_of(huggingface.read_config(tmp_path), tmp_path))
    assert expected.rope_base == 5e5 and expected.rope_scaling == LLAMA_3_ROPE
    inside = {**LLAMA_3_ROPE, 'rope_theta': 5e5}
    older = {**LLAMA_3_ROPE, 'type': 'llama3'}
    del older['rope_type']
    for place in ({'rope_parameters': inside}, {'rope_theta': 5e5, 'rope_scaling': LLAMA_3_ROPE},
                  {'rope_theta': 500000, 'rope_scaling': older}):
        change_config(tmp_path, **{'rope_parameters': None, 'rope_theta': None,
                                   'rope_scaling': None, **place})
        assert GPTConfig(**huggingface.fields_of(huggingface.read_config(tmp_path),
                                                 tmp_path)) == expected
    change_config(tmp_path, rope_parameters={'rope_theta': 123.0}, rope_scaling=None,
                  rope_theta=None)
    plain = huggingface.fields_of(huggingface.read_config(tmp_path), tmp_path)
    assert plain['rope_base'] == 123.0 and plain['rope_scaling'] is None


def test_what_a_config_leaves_out(tmp_path):
    """transformers omits its defaults from config.json; ours are the same."""
    for kind in ('gpt2', 'llama', 'mistral', 'qwen2', 'qwen3'):
        folder = tmp_path / kind
        folder.mkdir()
        needed = [key for key in huggingface.FIELDS[kind].values()
                  if key not in huggingface.DEFAULTS[kind]]
        sizes = dict(zip(needed, (70, 2, 4, 64) if kind == 'gpt2' else (70, 2, 64, 512, 24),
                         strict=True))
        (folder / 'config.json').write_text(json.dumps({'model_type': kind, **sizes}))
        ours = huggingface.read_config(folder)
        theirs = transformers.AutoConfig.from_pretrained(folder)
        for key, value in huggingface.DEFAULTS[kind].items():
            if key != 'use_sliding_window' and hasattr(theirs, key):
                # None unless use_sliding_window is set
                is_off = key == 'sliding_window' and kind in ('qwen2', 'qwen3')
                # computed from sizes where the default is None
                derived = {'head_dim': 8, 'num_key_value_heads': 64}
                expected = None if is_off else derived.get(key) if value is None else value
                assert getattr(theirs, key) == expected, (kind, key)
                assert ours[key] == value


@pytest.mark.parametrize('name, n_parameters, config', [
    # as published on the hub; the numbers are those of its safetensors
    ('gpt2', 124_439_808,
     {'model_type': 'gpt2', 'n_ctx': 1024, 'n_embd': 768, 'n_head': 12, 'n_layer': 12,
                           'n_positions': 1024, 'vocab_size': 50257, 'task_specific_params': {}}),
    ('SmolLM2-135M', 134_515_008, {
        'model_type': 'llama', 'attention_bias': False, 'hidden_act': 'silu', 'hidden_size': 576,
        'intermediate_size': 1536, 'is_llama_config': True, 'max_position_embeddings': 8192,
        'num_attention_heads': 9, 'num_hidden_layers': 30, 'num_key_value_heads': 3,
        'pretraining_tp': 1, 'rms_norm_eps': 1e-5, 'rope_interleaved': False, 'rope_scaling': None,
        'rope_theta': 100000, 'tie_word_embeddings': True, 'vocab_size': 49152}),
    ('Llama-3.2-1B', 1_235_814_400, {
        'model_type': 'llama', 'head_dim': 64, 'hidden_size': 2048, 'intermediate_size': 8192,
        'mlp_bias': False, 'max_position_embeddings': 131072, 'num_attention_heads': 32,
        'num_hidden_layers': 16, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-5,
        'rope_scaling': {**LLAMA_3_ROPE, 'factor': 32.0}, 'rope_theta': 500000.0,
        'tie_word_embeddings': True, 'vocab_size': 128256}),
    ('Qwen2.5-0.5B', 494_032_768, {
        'model_type': 'qwen2', 'hidden_size': 896, 'intermediate_size': 4864,
        'max_position_embeddings': 32768, 'max_window_layers': 24, 'num_attention_heads': 14,
        'num_hidden_layers': 24, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-6,
        'rope_theta': 1000000.0, 'sliding_window': 32768, 'tie_word_embeddings': True,
        'use_mrope': False, 'use_sliding_window': False, 'vocab_size': 151936}),
    ('Qwen3-0.6B', 596_049_920, {
        'model_type': 'qwen3', 'attention_bias': False, 'head_dim': 128, 'hidden_size': 1024,
        'intermediate_size': 3072, 'max_position_embeddings': 40960, 'max_window_layers': 28,
        'num_attention_heads': 16, 'num_hidden_layers': 28, 'num_key_value_heads': 8,
        'rms_norm_eps': 1e-6, 'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None,
        'tie_word_embeddings': True, 'use_sliding_window': False, 'vocab_size': 151936}),
    ('Mistral-7B-v0.3', 7_248_023_552, {
        'model_type': 'mistral', 'hidden_size': 4096, 'intermediate_size': 14336,
        'max_position_embeddings': 32768, 'num_attention_heads': 32, 'num_hidden_layers': 32,
        'num_key_value_heads': 8, 'rms_norm_eps': 1e-5, 'rope_theta': 1000000.0,
        'sliding_window': None, 'tie_word_embeddings': False, 'vocab_size': 32768}),
])
def test_published_sizes(name, n_parameters, config, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with torch.device('meta'):
        model = GPT(GPTConfig(**huggingface.fields_of(huggingface.read_config(tmp_path), tmp_path)))
    assert model.get_num_params(non_embedding=False) == n_parameters


def test_layouts_in_which_gpt2_is_published(tmp_path):
    """With the prefix and without, with causal masks, with the head, in several files."""
    theirs = build('gpt2')
    theirs.save_pretrained(tmp_path / 'theirs')
    expected = GPT.from_pretrained(str(tmp_path / 'theirs')).state_dict()
    saved = safetensors_torch.load_file(tmp_path / 'theirs' / 'model.safetensors')
    assert all(name.startswith('transformer.') for name in saved)
    bare = {name.removeprefix('transformer.'): tensor for name, tensor in saved.items()}
    bare['h.0.attn.bias'] = torch.ones(1, 1, 32, 32)
    bare['h.1.attn.masked_bias'] = torch.tensor(-1e4)
    with_head = {**saved, 'lm_head.weight': saved['transformer.wte.weight'].clone()}
    half = sorted(saved)[: len(saved) // 2]
    parts = [{name: t for name, t in saved.items() if (name in half) == first}
             for first in (True, False)]
    for i, files in enumerate(([bare], [with_head], parts)):
        other = tmp_path / str(i)
        other.mkdir()
        shutil.copy(tmp_path / 'theirs' / 'config.json', other)
        for n, part in enumerate(files, 1):
            name = f'model-{n:05}-of-{len(files):05}.safetensors'
            safetensors_torch.save_file(part, other / name)
        loaded = GPT.from_pretrained(str(other)).state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_several_files(tmp_path, monkeypatch):
    theirs = build('llama')
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='20KB')
    files = sorted(file for file in os.listdir(tmp_path / 'theirs')
                   if file.endswith('.safetensors'))
    assert len(files) > 2
    ours = huggingface.load_model(tmp_path / 'theirs')
    monkeypatch.setattr(huggingface, 'SHARD', 20_000)
    huggingface.save(ours, BYTES, None, str(tmp_path / 'ours'))
    index = json.loads((tmp_path / 'ours' / 'model.safetensors.index.json').read_text())
    assert len(index['weight_map']) == 21
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
    assert all(torch.equal(p, theirs.state_dict()[name]) for name, p in again.state_dict().items())
    (tmp_path / 'theirs' / files[1]).unlink()
    with pytest.raises(UserError, match='no tensor .* more. .*copy all of them again'):
        huggingface.load_model(tmp_path / 'theirs')


def test_no_weights_are_drawn_to_be_replaced(tmp_path):
    build('llama').save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    model = huggingface.load_model(tmp_path, dropout=0.25)
    assert torch.equal(torch.random.get_rng_state(), state)
    dropouts = [model.transformer.h[1].attn.attn_dropout.p, model.transformer.drop.p]
    assert dropouts == [0.25, 0.25] and model.config.dropout == 0.25
    assert all(p.requires_grad and p.device.type == 'cpu' for p in model.parameters())


# What is refused ----------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, changes, said', [
    ('gpt2', {'model_type': 'opt'},
     "model_type is 'opt'; expected one of gpt2, llama, mistral, qwen2, qwen3"),
    ('gpt2', {'model_type': 3}, 'model_type is 3'),
    ('gpt2', {'activation_function': 'relu'}, "activation_function = 'relu'"),
    ('gpt2', {'scale_attn_weights': False},
     'scale_attn_weights = False is not supported; expected True'),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx = True'),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention = True'),
    ('gpt2', {'quantization_config': {'bits': 4}}, "quantization_config = {'bits': 4}"),
    ('gpt2', {'tie_word_embeddings': False}, 'no tensor lm_head.weight'),
    ('gpt2', {'n_inner': 50}, 'c_fc.weight has shape (24, 96), config.json gives (24, 50)'),
    ('gpt2', {'n_head': 5}, 'n_embd=24 is not divisible by n_head=5'),
    ('llama', {'hidden_act': 'gelu'}, "hidden_act = 'gelu' is not supported; expected 'silu'"),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
    ('llama', {'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}},
     'partial_rotary_factor'),
    ('llama', {'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}}, "'yarn'"),
    ('llama', {'rope_scaling': {'type': 'dynamic', 'factor': 4.0}},
     "expected rope_type 'default', 'linear'"),
    ('llama', {'rope_scaling': {'rope_type': 'longrope'}}, "'longrope'"),
    ('llama', {'rope_scaling': {**YARN, 'truncate': False}}, 'truncate'),
    ('llama', {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}, 'expected numbers for factor'),
    ('llama', {'rope_scaling': {'rope_type': 'linear'}}, 'expected numbers for factor'),
    ('llama', {'rope_parameters': {'full_attention': {'rope_type': 'default'}}},
     'the same for all layers'),
    ('llama', {'rope_parameters': 3}, 'rope_parameters = 3'),
    ('llama', {'rope_theta': '10000'}, "rope_theta = '10000'"),
    ('llama', {'rope_parameters': {'rope_theta': [1]}}, 'rope_theta = [1]'),
    ('llama', {'num_hidden_layers': 0}, 'num_hidden_layers = 0'),
    ('llama', {'hidden_size': 'big'}, "= 'big'"),
    ('llama', {'num_key_value_heads': 3}, 'n_kv_head=3: expected a divisor of n_head=4'),
    ('llama', {'max_position_embeddings': 'many'}, "max_position_embeddings = 'many'"),
    ('llama', {'rope_interleaved': True}, 'rope_interleaved = True'),
    ('llama', {'attention_bias': True}, 'no tensor model.layers.0.self_attn.q_proj.bias'),
    ('qwen2', {'use_sliding_window': True, 'sliding_window': 8, 'layer_types': ['chunked']},
     "['chunked']"),
    ('qwen3', {'hidden_size': None}, 'hidden_size = None'),
])
def test_configs_that_are_refused(kind, changes, said, tmp_path):
    build(kind).save_pretrained(tmp_path)
    if 'rope_theta' in changes:
        change_config(tmp_path, rope_parameters=None)
    change_config(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        huggingface.load_model(tmp_path)
    assert said in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_tensors_that_are_refused(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    saved = safetensors_torch.load_file(path)
    name = {'gpt2': 'transformer.h.1.mlp.c_fc.weight',
            'llama': 'model.layers.1.mlp.up_proj.weight'}[kind]
    shape = tuple(saved[name].shape)

    def refused(tensors, *said):
        safetensors_torch.save_file(tensors, path)
        with pytest.raises(UserError) as error:
            GPT.from_pretrained(str(tmp_path))
        for text in (str(tmp_path), *said):
            assert text in str(error.value)

    refused({n: t for n, t in saved.items() if n != name}, f'no tensor {name}.', kind,
            'copy all of them')
    refused({n: t for n, t in saved.items() if '.0.' in n}, 'no tensor', ' more. ')
    refused({**saved, name: torch.zeros(17, 24)},
            f'{name} has shape (17, 24), config.json gives {shape}')
    refused({**saved, name: torch.zeros(shape, dtype=torch.int8)},
            f'{name} is of type I8, expected F32, BF16 or F16')
    refused({**saved, name.replace('.1.', '.2.'): torch.zeros(3)}, 'unexpected tensor')
    if kind == 'gpt2':
        refused({**saved, 'lm_head.weight': torch.zeros(300, 24)}, 'tie_word_embeddings = True',
                'differs from the embedding')
    if kind == 'llama':
        refused({**saved, name.replace('weight', 'bias'): torch.zeros(40)}, 'unexpected tensor',
                'up_proj.bias')
    safetensors_torch.save_file(saved, path)
    whole = path.read_bytes()
    for damaged in (b'', whole[:5], whole[:500], whole[:-1], bytes(100),
                    b'version https://git-lfs.github.com/spec/v1'):
        path.write_bytes(damaged)
        said = rf'model.safetensors, {len(damaged):,} bytes, cannot .*copy it again'
        with pytest.raises(UserError, match=said):
            GPT.from_pretrained(str(tmp_path))
    path.rename(tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='no .safetensors file. A pytorch_model.bin, a pickle, is'):
        GPT.from_pretrained(str(tmp_path))


def test_damaged_config(tmp_path):
    build('gpt2').save_pretrained(tmp_path)
    for damaged in ('', '{"model_type": "gpt2"', '[1, 2]', 'null'):
        (tmp_path / 'config.json').write_text(damaged)
        with pytest.raises(UserError, match='config.json is damaged'):
            GPT.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').unlink()
    with pytest.raises(UserError, match='has no config.json; expected a folder in Hugging Face'):
        GPT.from_pretrained(str(tmp_path))


def test_wrong_names(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'gpt3' is neither a folder nor one of gpt2,.*Qwen/Qwen3"):
        GPT.from_pretrained('gpt3')
    with pytest.raises(UserError, match="n_layer.*expected dropout alone"):
        GPT.from_pretrained(str(tmp_path), {'n_layer': 3})


def test_the_hubs_cache_serves_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    snapshot = tmp_path / 'models--some--gpt' / 'snapshots' / ('0' * 40)
    said = ("'some/gpt' is no folder here and could not be downloaded.*copy config.json.*"
            'huggingface.co/some/gpt into a folder; --init_from=FOLDER')
    with pytest.raises(UserError, match=said):
        huggingface.load('some/gpt')
    with pytest.raises(UserError, match='huggingface.co/openai-community/gpt2-xl into a folder'):
        huggingface.load('gpt2-xl')
    theirs = build('llama')
    theirs.save_pretrained(snapshot)
    (tmp_path / 'models--some--gpt' / 'refs').mkdir()
    (tmp_path / 'models--some--gpt' / 'refs' / 'main').write_text('0' * 40)
    model, described, _ = huggingface.load('some/gpt')
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight) and described is None


def test_tokenizers_that_are_refused(tmp_path):
    build('llama').save_pretrained(tmp_path)
    (tmp_path / 'tokenizer.model').write_bytes(b'\n\x0e')
    with pytest.raises(UserError, match='SentencePiece.*the model can be read, its text cannot'):
        huggingface.load(str(tmp_path))
    assert huggingface.load_model(tmp_path).config.vocab_size == 300
    (tmp_path / 'tokenizer.json').write_text(json.dumps({'model': {
        'type': 'BPE', 'byte_fallback': True, 'vocab': {}, 'merges': []}}))
    with pytest.raises(UserError, match='byte_fallback is true'):
        huggingface.load(str(tmp_path))
    formats.write_hf_folder({**tokenizer_json.BYTES, 'special_tokens': {'<|pad|>': 300}}, tmp_path)
    with pytest.raises(UserError, match='the tokenizer has ids up to 300, the model only 300'):
        huggingface.load(str(tmp_path))


def test_chat_templates(tmp_path):
    build('llama').save_pretrained(tmp_path)
    assert huggingface.load_chat_template(tmp_path) is None
    for written, expected in (('a', 'a'), ([{'name': 'tools', 'template': 'b'}], None),
                              ([{'name': 'tools', 'template': 'b'},
                                {'name': 'default', 'template': 'c'}], 'c')):
        (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'chat_template': written}))
        assert huggingface.load_chat_template(tmp_path) == expected
    (tmp_path / 'chat_template.jinja').write_text('d\n')
    assert huggingface.load_chat_template(tmp_path) == 'd\n'
