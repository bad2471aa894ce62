"""Small random models of transformers and of model.py, for the tests of huggingface.py."""

import json

import torch
import transformers

from config.presets import PRESETS
from model import GPT, GPTConfig
from tokenizer import formats, patterns

BYTES = {'kind': 'byte'}
QWENS = {**formats.BYTES, 'pattern': patterns.PATTERNS['qwen2'], 'normalizer': 'NFC'}
GPT2 = {'vocab_size': 300, 'n_positions': 32, 'n_embd': 24, 'n_layer': 2, 'n_head': 3, 'bos_token_id': 0,
        'eos_token_id': 0, 'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0}
LLAMA = {'vocab_size': 300, 'hidden_size': 32, 'intermediate_size': 40, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 32, 'bos_token_id': 0,
         'eos_token_id': 1}
LLAMA_3_ROPE = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                'original_max_position_embeddings': 16}


def sharpened(model):
    """The model with larger random weights: attention that attends, logits that differ, biases that are not 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def build(kind, **changes):
    """A small model of transformers' own."""
    torch.manual_seed(2)
    changes = json.loads(json.dumps({**(GPT2 if kind == 'gpt2' else LLAMA), **changes}))  # copies, which it changes
    config = transformers.AutoConfig.for_model(kind, **changes)
    return sharpened(transformers.AutoModelForCausalLM.from_config(config))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def tiny(**changes):
    torch.manual_seed(0)
    return sharpened(GPT(GPTConfig(**{'block_size': 32, 'vocab_size': 300, 'n_layer': 2, 'n_head': 4, 'n_embd': 32,
                                      **changes})))


# the architecture of the preset, without its optimizer
PRESET = {name: value for name, value in PRESETS['modern'].items() if name in GPTConfig.__dataclass_fields__}
MODERN = {**PRESET, 'logit_softcap': 0.0}
