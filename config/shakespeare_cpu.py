"""
A character-level GPT on Shakespeare in a minute of two CPU cores: 0.8M parameters, the size of nanoGPT's small command.

    $ python train.py config/shakespeare_cpu.py
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
dropout = 0.0

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 2000
lr_decay_iters = 2000
