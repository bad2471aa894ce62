"""
Train a character-level GPT on Shakespeare with nanoGPT's settings.

    $ python train.py config/shakespeare_char_classic.py

The model has 10.65M parameters and takes 5,000 steps of 16,384 characters. That lasts a few minutes
on a GPU; on two CPU cores each step takes seconds. The model overfits. The lowest val loss, about
1.47, comes between steps 1,000 and 2,500 and is kept in best.pt. config/train_shakespeare_char.py
learns the same in a fraction of the time.
"""

out_dir = 'out-shakespeare-char-classic'
dataset = 'shakespeare_char'
eval_interval = 250  # 20 evaluations, enough to find the lowest val loss
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-classic'

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # average the second moment over 100 steps: 16,384 tokens give a noisy one
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
