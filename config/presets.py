

# Architectures by name, as GPTConfig's fields. llama: Touvron et al. 2023. modern: what learns fastest here, after the
# GPT-2 speedruns (github.com/KellerJordan/modded-nanogpt). They have mlp='relu2' and zero_init=True, which at their
# 124M parameters learn faster; at 1M they do not (README)
PRESETS = {
    'gpt2': {},
    'llama': {'norm': 'rmsnorm', 'pos': 'rope', 'mlp': 'swiglu', 'bias': False, 'tie_embeddings': False},
    'modern': {'norm': 'rmsnorm', 'pos': 'rope', 'mlp': 'swiglu', 'bias': False, 'tie_embeddings': False,
               'qk_norm': True, 'logit_softcap': 15.0},
}
