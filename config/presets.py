"""
Name sets of train.py's settings, for --preset=NAME. A given setting wins.

gpt2 keeps train.py's defaults. llama is the architecture of "LLaMA" (Touvron et al. 2023). modern
learns fastest here. It follows the GPT-2 speedruns (github.com/KellerJordan/modded-nanogpt): Muon,
small batches, and a rate that falls linearly over most of the run. The speedruns also set
mlp='relu2' and zero_init=True, which help at 124M parameters and not at 1M
(bench/results/2026-11-21-recipes.md).

In two pairs of runs, with 0.8M parameters and 800 steps, beta1=0.8 gained 0.009 and 0.012 nats over
0.9. muon_lr=0.03 gained nothing, nor did doubling the other rates
(bench/results/2026-11-21-modern.md).
"""

LLAMA = {'norm': 'rmsnorm', 'pos': 'rope', 'mlp': 'swiglu', 'bias': False, 'tie_embeddings': False}

PRESETS = {
    'gpt2': {},
    'llama': LLAMA,
    'modern': {
        **LLAMA, 'qk_norm': True, 'logit_softcap': 15.0,
        'optimizer': 'muon', 'muon_lr': 0.02, 'embedding_lr': 0.02, 'learning_rate': 0.004,
        'min_lr': 0.0, 'beta1': 0.8, 'beta2': 0.95, 'weight_decay': 0.0,
        'lr_schedule': 'wsd', 'decay_fraction': 0.6, 'warmup_iters': 20, 'lr_decay_iters': None,
    },
}


def fill(config):
    """Set what the preset sets and nobody has given; -> these settings."""
    settings = {key: value for key, value in PRESETS[config['preset']].items()
                if key not in config.given}
    config.update(settings)
    return settings
