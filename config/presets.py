"""
Named choices of train.py's settings, --preset=NAME. A setting that is given wins over the preset.

llama: "LLaMA", Touvron et al. 2023. modern: what learns fastest here, after the GPT-2 speedruns
(github.com/KellerJordan/modded-nanogpt): Muon, small batches, a rate that falls in a line over most
of the run. The speedruns have mlp='relu2' and zero_init=True, which help at 124M parameters and not
at 1M (bench/results). beta1=0.8 instead of 0.9 brought 0.009 and 0.012 nats in two pairs of runs of
0.8M parameters over 800 steps; muon_lr=0.03, or twice the other rates, brought nothing.
"""

LLAMA = {'norm': 'rmsnorm', 'pos': 'rope', 'mlp': 'swiglu', 'bias': False, 'tie_embeddings': False}

PRESETS = {
    'gpt2': {},
    'llama': LLAMA,
    'modern': {**LLAMA, 'qk_norm': True, 'logit_softcap': 15.0, 'optimizer': 'muon', 'muon_lr': 0.02,
               'embedding_lr': 0.02, 'learning_rate': 0.004, 'min_lr': 0.0, 'beta1': 0.8, 'beta2': 0.95,
               'lr_schedule': 'wsd', 'decay_fraction': 0.6, 'warmup_iters': 20, 'lr_decay_iters': None,
               'weight_decay': 0.0},
}
