"""
Train a vocabulary and a GPT on the source code of Python's standard library.

    $ python train.py config/quickstart.py

It needs no network: every machine has this text. First it trains a byte-pair vocabulary of 2,048
ids (data/python_bpe), then 400 steps of a model of 3.3M parameters. The val loss falls to 1.29 bits
a byte. In one run, with nothing compiled before, all of it took 10 minutes on two cores of a
first-generation EPYC, which multiply 77 GFLOP a second at most.
`python -m bench.quickstart` measures time, loss and how many of the sampled lines are Python.
"""

out_dir = 'out-quickstart'
dataset = 'python_bpe'
eval_interval = 200  # an evaluation takes as long as 13 steps
eval_iters = 10
eval_first = False
log_interval = 100
sample_tokens = 200
sample_prompt = 'def '

preset = 'modern'
n_layer = 4
n_head = 4
n_embd = 192
block_size = 128
value_embeddings = True  # parameters that are looked up and cost no products

batch_size = 32  # 1.4 times the tokens a second of 16: Muon's part of a step is fixed
gradient_accumulation_steps = 1
max_iters = 400
