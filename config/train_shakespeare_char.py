"""
A character-level GPT on Shakespeare: 10.7M parameters, nanoGPT's size and context.

    $ python train.py config/train_shakespeare_char.py

nanoGPT's own settings are in config/shakespeare_char_classic.py.
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

# small batches and many updates: 4,096 characters a step
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 560
