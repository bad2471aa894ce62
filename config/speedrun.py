"""
Train a 124M model on 2 billion tokens of FineWeb-Edu, after GPT-2's speedruns.

    $ python data/fineweb_edu/prepare.py --shards=3
    $ python train.py config/speedrun.py
    $ torchrun --standalone --nproc_per_node=8 train.py config/speedrun.py

This recipe has not been run yet. It costs 1.6e18 FLOPs, an hour of one H100 at 45% of its peak. The
speedruns (github.com/KellerJordan/modded-nanogpt) reached a loss of 3.28 on FineWeb after these
tokens:

    10 billion   AdamW (llm.c's run)
    3.3 billion  RoPE and Muon
    2.7 billion  also QK-norm, squared ReLU, zero-initialised projections
    2.4 billion  also an untied head: preset modern with mlp, zero_init below, without its softcap
    1.7 billion  also the other options of the model below, and more

FineWeb-Edu is a different text, so its losses do not compare with these.
"""

out_dir = 'out-speedrun'
dataset = 'fineweb_edu'
eval_interval = 250
eval_iters = 20
log_interval = 10
wandb_project = 'speedrun'
wandb_run_name = 'modern-124M'

preset = 'modern'
# both help at this size in the speedruns and in nanochat, but not at 1M parameters
mlp = 'relu2'
zero_init = True
# 0.02 nats in the speedruns: 232 million more parameters, which are looked up and cost no FLOPs
value_embeddings = True
value_gates = True  # 1% of the time in the speedruns
residual_lambdas = True  # 0.009 nats in the speedruns
head_gates = True  # 0.019 nats in slowrun, which sees 100 million tokens many times
window = 256  # three layers of four see a quarter of the context
window_pattern = 'SSSL'

# smaller than GPT-3's half a million tokens: a run this short gains from more updates. A third of
# the steps has 131,072, the next 262,144, the last 393,216: 65 of 2,185 steps in the speedruns
batch_stages = 3
gradient_accumulation_steps = 24
batch_size = 16
block_size = 1024
max_iters = 7600  # x 262,144 on average = 2.0 billion tokens, 16 per parameter

# these are the rates of the last batch. The middle one has 0.0028, which config/train_gpt2.py
# derives, and 0.02: by sqrt(2 / 3)
learning_rate = 0.0034
muon_lr = 0.0245
embedding_lr = 0.0245
warmup_iters = 100
# AdamW's rate falls later than that of the matrices: 50 of 3,225 steps in the speedruns
decay_fraction = 0.4
muon_decay_fraction = 0.8
# 1% of the time in the speedruns; nanochat takes 0.28 with twice the batch
cautious_decay = True
weight_decay = 0.1
