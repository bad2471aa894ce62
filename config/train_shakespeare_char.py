"""
Train a character-level GPT on Shakespeare, of nanoGPT's size and context.

    $ python train.py config/train_shakespeare_char.py

The model has 10.7M parameters. 560 steps take 21 minutes on one core of an AMD EPYC without AMX,
about 12 on two, to a val loss of 1.438. nanoGPT documents 1.4697 for its settings, at 11
s per step (config/shakespeare_char_classic.py). The model reads the text 2.3 times. More steps
with --dropout=0.1 gave the same loss (bench/results/2026-11-21-recipes.md).
"""

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 140
eval_iters = 5
eval_first = False
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

preset = 'modern'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256

# small batches and many updates: 4,096 characters per step
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 560
