"""
A character-level GPT on Shakespeare in minutes of two CPU cores: 0.8M parameters, the size of nanoGPT's small command.

    $ python train.py config/shakespeare_cpu.py

As many steps of as many characters as there, 2000 of 12 x 64, end at a val loss of 1.56 instead of 1.90. To see what
the preset brings: --preset=gpt2 --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 --warmup_iters=100.
"""

out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'
eval_interval = 500
eval_iters = 20
eval_first = False
log_interval = 100
sample_tokens = 500

preset = 'modern'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
lr_decay_iters = 2000
