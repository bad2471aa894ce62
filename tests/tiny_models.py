"""Tiny models with random weights, and what the tests of the model do with them."""

import torch
from hypothesis import strategies as st

from config.presets import PRESETS
from model import GPT, GPTConfig

# of each preset what GPTConfig has; the rest are settings of train.py
ARCHITECTURES = {name: {key: value for key, value in preset.items() if key in GPTConfig.__dataclass_fields__}
                 for name, preset in PRESETS.items()}


def tiny(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{'block_size': 16, 'vocab_size': 40, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, **changes}))


def sharpened(model):
    """The model with larger random weights: attention that attends, logits that differ, biases that are not 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def gradients_to_the_future(function, x):
    """For x (B, T, C): the largest gradient of any output position with respect to any later input position."""
    x = x.requires_grad_()
    y = function(x)
    largest = 0.0
    for t in range(x.size(1) - 1):
        grad, = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert grad[:, : t + 1].abs().max() > 0  # the test would otherwise pass on a function of nothing
        largest = max(largest, grad[:, t + 1 :].abs().max().item())
    return largest


def gradients(model, *losses):
    """For each function that computes a loss: the loss and {name: gradient}."""
    found = []
    for loss_of in losses:
        model.zero_grad()
        loss = loss_of()
        (3 * loss).backward()
        found.append({'loss': loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}})
    return found


# every option, in any combination that GPTConfig allows
def possible(options):
    """Without what another option excludes."""
    return {**options, 'rope_scaling': options['rope_scaling'] if options['pos'] == 'rope' else None,
            'qk_norm_weight': options['qk_norm_weight'] and options['qk_norm'],
            'value_gates': options['value_gates'] and options['value_embeddings']}


CHOICES = {
    'n_layer': st.integers(1, 3), 'n_head': st.just(4), 'bias': st.booleans(),
    'n_kv_head': st.sampled_from([None, 1, 2, 4]), 'norm': st.sampled_from(['layernorm', 'rmsnorm']),
    'pos': st.sampled_from(['learned', 'rope']), 'rope_base': st.sampled_from([100.0, 10000.0]),
    'mlp': st.sampled_from(['gelu', 'gelu_erf', 'swiglu', 'relu2']), 'qk_norm': st.booleans(),
    'tie_embeddings': st.booleans(), 'window': st.sampled_from([0, 1, 3, 7, 100]),
    'window_pattern': st.sampled_from(['S', 'SL', 'LS', 'SSL']), 'logit_softcap': st.sampled_from([0.0, 3.0]),
    'zero_init': st.booleans(), 'residual_lambdas': st.booleans(), 'value_embeddings': st.booleans(),
    'head_gates': st.booleans(), 'value_gates': st.booleans(),
    'head_dim': st.sampled_from([None, 2, 10]), 'n_inner': st.sampled_from([None, 24]),
    'norm_eps': st.sampled_from([1e-5, 1e-2]), 'qk_norm_weight': st.booleans(),
    'qkv_bias': st.sampled_from([None, True, False]),
    'rope_scaling': st.sampled_from([None, {'rope_type': 'linear', 'factor': 2.0}, {
        'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8}, {
        'rope_type': 'yarn', 'factor': 4.0, 'beta_fast': 4.0, 'beta_slow': 1.0, 'attention_factor': 1.2,
        'original_max_position_embeddings': 8}])}
OPTIONS = st.fixed_dictionaries(CHOICES).map(possible)
