"""
Train a vocabulary and a GPT on the source code of Python's standard library.

    $ python train.py config/quickstart.py

It needs no network: every machine has this text. The model has 1.9M parameters. 600 steps take two
minutes on two cores with bf16 units, and five without. The val loss falls to 1.25 nats per byte;
1,000 steps reach 1.18. The sample at the end has the form of Python, but not its sense.
"""

out_dir = 'out-quickstart'
dataset = 'python_bpe'
eval_interval = 350
eval_iters = 100
eval_first = False
log_interval = 100
sample_tokens = 200
sample_prompt = 'def '

preset = 'modern'
n_layer = 4
n_head = 4
n_embd = 192
block_size = 128

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 700
