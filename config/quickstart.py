"""
The first run: a byte-level GPT on the source code of Python's own standard library, which every machine has.

    $ python train.py config/quickstart.py

1.8M parameters, about 3 minutes on two CPU cores, val loss about 1.4 nats a byte: the sample at the end has the look of
Python, not its sense. Twice the steps, for twice the time: --max_iters=5000 --lr_decay_iters=5000.
"""

out_dir = 'out-quickstart'
dataset = 'python_stdlib'
eval_interval = 1250
eval_iters = 100
eval_first = False
log_interval = 100
sample_tokens = 500
sample_prompt = 'def '

n_layer = 4
n_head = 4
n_embd = 192
block_size = 128

# small batches and many updates: at this size each update teaches more than a smoother gradient would
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 0.0
beta2 = 0.99
warmup_iters = 100
max_iters = 2500
lr_decay_iters = 2500
