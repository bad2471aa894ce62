"""
Finetune GPT-2 XL on Shakespeare: a few minutes on one GPU with 40 GB; for less take --init_from=gpt2-medium or gpt2.

    $ python data/shakespeare/prepare.py
    $ python train.py config/finetune_shakespeare.py
    $ python sample.py --out_dir=out-shakespeare
"""

import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
always_save_checkpoint = False  # save only when val improves

dataset = 'shakespeare'
init_from = 'gpt2-xl'

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens a step; the 301,966 of Shakespeare are 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# a constant, small rate: the weights are good already
learning_rate = 3e-5
decay_lr = False
