"""
The first run: a byte-level GPT on the source code of Python's own standard library, which every machine has.

    $ python train.py config/quickstart.py
"""

out_dir = 'out-quickstart'
dataset = 'python_stdlib'
eval_interval = 500
eval_iters = 20
log_interval = 50
sample_tokens = 500

n_layer = 4
n_head = 4
n_embd = 192
block_size = 256

batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 0.0
beta2 = 0.99
warmup_iters = 50
max_iters = 1000
lr_decay_iters = 1000
