"""Folders of huggingface.py in transformers. Run: pytest tests/test_huggingface_save.py"""

import json
import os

import pytest
import tokenizers
import torch
from conftest import load_or_skip

pytest.importorskip('transformers')  # before hf_models, which imports it

import transformers
from hf_models import BYTES, LLAMA_3_ROPE, MODERN, PRESET, QWENS, YARN, build, close, tiny

import tokenizer
from config.presets import PRESETS
from configurator import UserError
from flatgpt import huggingface
from tokenizer import chat, tokenizer_json

OURS = {
    'nanoGPT': ('gpt2', {'bias': False}), 'gpt2': ('gpt2', {}),
    'untied': ('gpt2', {'tie_embeddings': False}),
    'exact gelu': ('gpt2', {'mlp': 'gelu_erf', 'n_inner': 50, 'norm_eps': 1e-4}),
    'no biases of queries': ('gpt2', {'qkv_bias': False}), 'llama': ('llama', PRESETS['llama']),
    'grouped queries': ('llama', {**PRESETS['llama'], 'n_kv_head': 1}),
    'biases': ('llama', {**PRESETS['llama'], 'bias': True}),
    'biases but of queries': ('llama', {**PRESETS['llama'], 'bias': True, 'qkv_bias': False}),
    'tied': ('llama', {**PRESETS['llama'], 'tie_embeddings': True, 'rope_base': 5e5,
                       'head_dim': 6}),
    'llama 3': ('llama', {**PRESETS['llama'], 'rope_scaling': LLAMA_3_ROPE}),
    'llama, yarn': ('llama', {**PRESETS['llama'], 'rope_scaling': {
        **YARN, 'beta_fast': 32.0, 'beta_slow': 1.0, 'attention_factor': 1.2}}),
    'a window of all': ('llama', {**PRESETS['llama'], 'window': 32}),
    'biases of queries': ('qwen2', {**PRESETS['llama'], 'qkv_bias': True}),
    'biases of queries of wide heads': ('llama', {**PRESETS['llama'], 'qkv_bias': True,
                                                  'head_dim': 12}),
    'modern': ('qwen3', MODERN),
    'modern, with weights': ('qwen3', {**MODERN, 'qk_norm_weight': True}),
    'modern, eps of qwen3': ('qwen3', {**MODERN, 'norm_eps': 1e-6, 'n_kv_head': 2,
                                       'head_dim': 10}),
    'modern, biases of queries': ('qwen3', {**MODERN, 'qkv_bias': True}),
}


@pytest.mark.parametrize('case', OURS)
def test_transformers_reads_what_we_trained(case, tmp_path):
    kind, changes = OURS[case]
    ours = tiny(**changes)
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    hf = huggingface.save(ours, QWENS, None, str(tmp_path / 'hf'))
    assert all(torch.equal(before[name], p) for name, p in ours.state_dict().items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    idx = torch.randint(300, (2, 32))
    with torch.no_grad():
        close(ours(idx, idx)[0], theirs(idx).logits)
        assert torch.equal(ours.generate(idx[:1, :3], 29, temperature=0), theirs.generate(
            idx[:1, :3], max_new_tokens=29, do_sample=False, pad_token_id=0, eos_token_id=None))
        again = huggingface.load_model(tmp_path / 'hf').eval()
        close(again(idx, idx)[0], ours(idx, idx)[0])
    assert hf['model_type'] == kind and theirs.config.model_type == kind
    assert os.listdir(tmp_path) == ['hf']


@pytest.mark.parametrize('changes, said', [
    (PRESET, ['logit_softcap=15.0', "Llama's layout", '--logit_softcap=0']),
    ({**PRESETS['llama'], 'mlp': 'relu2'}, ["mlp='relu2'", "Llama's layout", '--mlp=swiglu']),
    ({'mlp': 'relu2'}, ["mlp='relu2'", "GPT-2's layout", '--mlp=gelu']),
    ({'mlp': 'swiglu'}, ["mlp='swiglu'", '--mlp=gelu']),
    ({**PRESETS['llama'], 'window': 16}, ['window=16', '--window=0']),
    ({**PRESETS['llama'], 'value_embeddings': True},
     ['value_embeddings=True', '--value_embeddings=False']),
    ({'residual_lambdas': True}, ['residual_lambdas=True', '--residual_lambdas=False']),
    ({'head_gates': True}, ['head_gates=True', '--head_gates=False']),
    ({'value_embeddings': True, 'value_gates': True}, ['value_gates=True', '--value_gates=False']),
    ({'norm': 'rmsnorm'}, ["norm='rmsnorm'", '--norm=layernorm']),
    ({**PRESETS['llama'], 'norm': 'layernorm'}, ["norm='layernorm'", '--norm=rmsnorm']),
    ({'n_kv_head': 2}, ['n_kv_head=2', '--n_kv_head=None']), ({'qk_norm': True}, ['qk_norm=True']),
    ({'head_dim': 10}, ['head_dim=10']),
    ({'n_embd': 30, 'head_dim': 8, **PRESETS['llama']}, ['head_dim=8']),
    ({**MODERN, 'bias': True}, ['bias=True', 'QK-norm', '--bias=False']),
    ({'norm': 'rmsnorm', 'window': 3}, ["window=3, norm='rmsnorm'", '--window=0 --norm=layernorm']),
])
def test_models_that_no_layout_has(changes, said, tmp_path):
    with pytest.raises(UserError) as error:
        huggingface.save(tiny(**changes), BYTES, None, str(tmp_path / 'hf'))
    for text in said:
        assert text in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    model = tiny()
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf' / 'mine').write_text('')
    with pytest.raises(UserError, match='hf exists and is not empty; name another'):
        huggingface.save(model, BYTES, None, str(tmp_path / 'hf'))
    (tmp_path / 'hf' / 'mine').unlink()
    with pytest.raises(UserError, match='the tokenizer has 301 ids and the model 300'):
        huggingface.save(model, {**tokenizer_json.BYTES, 'special_tokens': {'<|x|>': 300}}, None,
                         str(tmp_path / 'hf'))

    def full(*arguments):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(huggingface, 'write_tensors', full)
        with pytest.raises(UserError, match='hf could not be written .No space left on device.'):
            huggingface.save(model, BYTES, None, str(tmp_path / 'hf'))
    assert os.listdir(tmp_path) == ['hf'] and os.listdir(tmp_path / 'hf') == []
    huggingface.save(model, BYTES, None, str(tmp_path / 'hf'))
    assert sorted(os.listdir(tmp_path / 'hf')) == ['config.json', 'generation_config.json',
                                                   'model.safetensors', 'tokenizer.json',
                                                   'tokenizer_config.json']


# Tokenizers ---------------------------------------------------------------------------------------

TEXT = ("Hello world, it's 2024:  12 345 and 6!\n\n\tdef f(x):\n        return 'é\u0301' + "
        "'e\u0301' \u2126 \U0001f642 안녕\n")


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'qwen2', 'qwen3'])
@pytest.mark.parametrize('described', ['byte', 'char', 'word', 'bpe', 'qwen'])
def test_autotokenizer_gives_the_same_ids(kind, described, tmp_path):
    """In a folder of each model type; transformers has its own tokenizers for some of them."""
    text = 'a man, a plan, a canal; panama \n' * 3 + TEXT
    specials = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    made = {'byte': tokenizer.ByteTokenizer,
            'char': lambda: tokenizer.CharTokenizer.from_text(text),
            'word': lambda: tokenizer.WordTokenizer.train('a man, a plan, a canal; panama \n', 10),
            'bpe': lambda: tokenizer.BPETokenizer.train(text, 290, 'gpt4', specials),
            'qwen': lambda: tokenizer.BPETokenizer.train(text, 290, 'qwen2', specials)}[described]()
    if described == 'qwen':
        made = tokenizer.from_dict({**made.to_dict(), 'normalizer': 'NFC',
                                    'visible_tokens': ['<|im_start|>']})
    changes = {'gpt2': {}, 'llama': PRESETS['llama'],
               'qwen2': {**PRESETS['llama'], 'qkv_bias': True}, 'qwen3': MODERN}[kind]
    huggingface.save(tiny(**changes), made.to_dict(), None, str(tmp_path / 'hf'))
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ids = made.encode(text)
    assert fast(text)['input_ids'] == ids and fast.decode(ids) == made.decode(ids)
    assert fast.eos_token_id == made.eot
    again = tokenizer.from_dict(huggingface.load_tokenizer(tmp_path / 'hf'))
    assert again.encode(text) == ids and again.decode(ids) == made.decode(ids)
    if described != 'byte':  # said as byte pairs without merges
        assert again.to_dict() == made.to_dict()
    if described == 'char':
        with pytest.raises(Exception, match='Missing'):
            fast('ζ')
    if described == 'qwen':
        marked = made.encode('<|im_start|>a<|im_end|>', 'all')
        assert fast('<|im_start|>a<|im_end|>')['input_ids'] == marked
        assert fast.decode(marked, skip_special_tokens=True) == '<|im_start|>a'


def test_where_an_answer_ends(tmp_path):
    """A chat model ends with its turn, and generation also stops at the end of a document."""
    values = {**tokenizer_json.BYTES, 'special_tokens': {'<|endoftext|>': 256, '<|im_end|>': 258}}
    model = tiny(**PRESETS['llama'])
    for name, chat_template, ends in (('base', None, 256), ('chat', '{{ messages }}', [258, 256])):
        huggingface.save(model, values, chat_template, str(tmp_path / name))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs.generation_config.eos_token_id == ends and theirs.config.bos_token_id == 256
        assert fast.eos_token_id == (258 if chat_template else 256) == theirs.config.eos_token_id
        assert fast.chat_template == chat_template and fast.model_max_length == 32


TALK = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'},
        {'role': 'user', 'content': 'c'}]


@pytest.mark.parametrize('specials, template, ends', [
    (['<s>', '</s>', '[INST]', '[/INST]'],
     "{{ bos_token }}{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' if "
     "m.role == 'user' else m.content + eos_token }}{% endfor %}", ['</s>']),
    (['<|endoftext|>', '<|user|>', '<|assistant|>', '<|end|>'],
     "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}",
     ['<|endoftext|>', '<|end|>']),
    (['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'],
     "{{ bos_token }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}",
     ['<|eot_id|>', '<|end_of_text|>'])])
def test_ends_of_a_chat_are_the_same_there(tmp_path, specials, template, ends):
    """transformers renders the same ids and stops at the same ones."""
    values = {**tokenizer_json.BYTES,
              'special_tokens': {token: 256 + i for i, token in enumerate(specials)}}
    huggingface.save(tiny(**PRESETS['llama']), values, template, str(tmp_path / 'hf'))
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    theirs, ours = model.generation_config.eos_token_id, tokenizer.from_dict(values)
    assert fast.apply_chat_template(TALK, return_dict=False) == chat.render(TALK, template, ours)
    assert theirs == ([values['special_tokens'][token] for token in ends] if len(ends) > 1 else
                      values['special_tokens'][ends[0]])
    assert huggingface.load(str(tmp_path / 'hf'))[2] == template


@pytest.mark.parametrize('token', ['<|end_of_text|>',
                                   {'__type': 'AddedToken', 'content': '<|end_of_text|>'}])
def test_the_end_that_a_folder_names(tmp_path, token):
    """A folder may name another end than the usual one; the template keeps it, there and back."""
    specials = ['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>']
    values = {**tokenizer_json.BYTES,
              'special_tokens': {token: 256 + i for i, token in enumerate(specials)}}
    template = ("\n{% for m in messages %}{{ '<|begin_of_text|>' + m.role + m.content + eos_token "
                '}}{% endfor %}')
    huggingface.save(tiny(**PRESETS['llama']), values, None, str(tmp_path / 'hf'))
    path = tmp_path / 'hf' / 'tokenizer_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'chat_template': template,
                                'eos_token': token}))
    _, described, found = huggingface.load(str(tmp_path / 'hf'))
    ids = chat.render(TALK, found, tokenizer.from_dict(described))
    assert ids.count(257) == 3
    huggingface.save(tiny(**PRESETS['llama']), described, found, str(tmp_path / 'again'))
    for name in ('hf', 'again'):
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert ids == fast.apply_chat_template(TALK, return_dict=False)
    assert chat.render(TALK, huggingface.load(str(tmp_path / 'again'))[2],
                       tokenizer.from_dict(described)) == ids


def test_same_tokenizer():
    bytes_too = {**tokenizer_json.BYTES, 'visible_tokens': [], 'special_tokens': {}}
    assert huggingface.same_tokenizer(BYTES, bytes_too)
    assert not huggingface.same_tokenizer(BYTES, {**bytes_too, 'normalizer': 'NFC'})
    assert not huggingface.same_tokenizer(BYTES, {'kind': 'char', 'chars': 'ab'})
    load_or_skip('gpt2')
    spelt_out = tokenizer.BPETokenizer.from_tiktoken('gpt2').to_dict()
    assert huggingface.same_tokenizer({'kind': 'tiktoken', 'name': 'gpt2'}, spelt_out)


def test_gpt2s_own_files(tmp_path):
    """A GPT-2 folder without tokenizer gets GPT-2's; its tokenizer.json has the same ids."""
    build('gpt2', vocab_size=50257, n_embd=6).save_pretrained(tmp_path)
    assert huggingface.load_tokenizer(tmp_path) == {'kind': 'tiktoken', 'name': 'gpt2'}
    load_or_skip('gpt2')
    gpt2 = tokenizer.BPETokenizer.from_tiktoken('gpt2')
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(*gpt2_files(gpt2)))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens(['<|endoftext|>'])
    hf.save(str(tmp_path / 'tokenizer.json'))
    assert huggingface.same_tokenizer(huggingface.load_tokenizer(tmp_path),
                                      {'kind': 'tiktoken', 'name': 'gpt2'})


def gpt2_files(gpt2):
    values = gpt2.to_dict()
    vocab = tokenizer_json.hf_tokenizer(values, '')['model']['vocab']
    return vocab, [tuple(merge.split(' ')) for merge in values['merges']]


def test_gpt2s_vocabulary_leaves_padded_as_the_model_is(tmp_path):
    gpt2 = load_or_skip('gpt2')
    model = tiny(vocab_size=50304, n_embd=8, n_layer=1)
    huggingface.save(model, gpt2.to_dict(), None, str(tmp_path / 'hf'))
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert fast(TEXT)['input_ids'] == gpt2.encode(TEXT) and fast.eos_token_id == 50256
    assert theirs.config.vocab_size == 50304
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == 50256
