"""
Train a vocabulary and a GPT on the source code of Python's standard library.

    $ python train.py config/quickstart.py

It needs no network: every machine has this text. First it trains a byte-pair vocabulary of 2,048
ids (data/python_bpe), then 700 steps of a model of 2.6M parameters. All in all it takes 165 s on
two cores of a Xeon with bf16 units, compilation included. The val loss falls to 1.49 bits a byte.
The sample at the end has the form of Python, but not its sense: 57% of its lines parse, 80% of
those of the val text (python -m bench.quickstart).
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
