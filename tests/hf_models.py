"""Small random models of transformers and of model.py, for the tests of huggingface.py."""

import json

import torch
import transformers

from config.presets import PRESETS
from model import GPT, GPTConfig
from tokenizer import patterns, tokenizer_json

BYTES = {'kind': 'byte'}
QWENS = {**tokenizer_json.BYTES, 'pattern': patterns.PATTERNS['qwen2'], 'normalizer': 'NFC'}
GPT2 = {'vocab_size': 300, 'n_positions': 32, 'n_embd': 24, 'n_layer': 2, 'n_head': 3,
        'bos_token_id': 0, 'eos_token_id': 0, 'resid_pdrop': 0.0, 'embd_pdrop': 0.0,
        'attn_pdrop': 0.0}
LLAMA = {'vocab_size': 300, 'hidden_size': 32, 'intermediate_size': 40, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 32,
         'bos_token_id': 0, 'eos_token_id': 1}
LLAMA_3_ROPE = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
                'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8}


def sharpened(model):
    """Enlarge random weights, so that attention has peaks, logits differ and biases are not 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def build(kind, **changes):
    """Build a small model of transformers."""
    torch.manual_seed(2)
    values = {**(GPT2 if kind == 'gpt2' else LLAMA), **changes}
    values = json.loads(json.dumps(values))  # a copy, because transformers changes it
    config = transformers.AutoConfig.for_model(kind, **values)
    return sharpened(transformers.AutoModelForCausalLM.from_config(config))


def close(ours, theirs):
    """Assert that two tensors agree but for rounding."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def tiny(**changes):
    """Build a small model of model.py."""
    torch.manual_seed(0)
    return sharpened(GPT(GPTConfig(**{'block_size': 32, 'vocab_size': 300, 'n_layer': 2,
                                      'n_head': 4, 'n_embd': 32, **changes})))


# the architecture of the preset, without its optimizer
PRESET = {name: value for name, value in PRESETS['modern'].items()
          if name in GPTConfig.__dataclass_fields__}
MODERN = {**PRESET, 'logit_softcap': 0.0}
