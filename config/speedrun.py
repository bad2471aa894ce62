"""
A 124M model in few tokens, after GPT-2's speedruns: 2 billion, 1.6e18 FLOPs, an hour of one H100 at 45% of its peak.

    $ python data/fineweb_edu/prepare.py --shards=3
    $ python train.py config/speedrun.py
    $ torchrun --standalone --nproc_per_node=8 train.py config/speedrun.py

Not run yet. To a loss of 3.28 on FineWeb the speedruns (github.com/KellerJordan/modded-nanogpt) needed 10 billion
tokens with AdamW (llm.c's run), 3.3 with RoPE and Muon, 2.7 with QK-norm, squared ReLU and zero-initialised
projections, 2.4 with an untied head: this preset without its softcap; and 1.7 with what is added below and some more.
FineWeb-Edu is another text, so its losses compare among themselves alone.
"""

out_dir = 'out-speedrun'
dataset = 'fineweb_edu'
eval_interval = 250
eval_iters = 20
log_interval = 10
wandb_project = 'speedrun'
wandb_run_name = 'modern-124M'

preset = 'modern'
mlp = 'relu2'  # as is zero_init, better at this size in the speedruns and in nanochat, if not at 1M parameters
zero_init = True
value_embeddings = True  # 0.02 nats in the speedruns, for no FLOPs but 232 million parameters that are looked up
residual_lambdas = True  # 0.009 there
window = 256  # three layers of four see a quarter of the context
window_pattern = 'SSSL'

# Smaller than GPT-3's half a million: a run this short is better off with more updates
gradient_accumulation_steps = 8
batch_size = 32
block_size = 1024
max_iters = 7600  # x 262,144 = 2.0 billion tokens, 16 for each of the 124M parameters

learning_rate = 0.0028  # see config/train_gpt2.py
warmup_iters = 100
