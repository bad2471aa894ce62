"""
The first run: a byte-level GPT on the source code of Python's own standard library, which every machine has.

    $ python train.py config/quickstart.py

1.9M parameters; 1,000 steps take two and a half minutes on two cores of an AMD EPYC, to a val loss of 1.18 nats a byte:
the sample at the end has the look of Python, not its sense. Twice the steps, for twice the time: --max_iters=2000.
"""

out_dir = 'out-quickstart'
dataset = 'python_stdlib'
eval_interval = 500
eval_iters = 100
eval_first = False
log_interval = 100
sample_tokens = 500
sample_prompt = 'def '

preset = 'modern'
n_layer = 4
n_head = 4
n_embd = 192
block_size = 128

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 1000
