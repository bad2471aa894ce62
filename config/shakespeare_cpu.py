"""
A character-level GPT on Shakespeare in minutes of two CPU cores: 0.8M parameters, the size of nanoGPT's small command.

    $ python train.py config/shakespeare_cpu.py

TODO
"""

out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'
eval_interval = 325
eval_iters = 5
eval_first = False
log_interval = 100
sample_tokens = 500

preset = 'modern'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 64  # 4,096 characters a step; Muon's share of its time falls with the batch
gradient_accumulation_steps = 1
max_iters = 650
