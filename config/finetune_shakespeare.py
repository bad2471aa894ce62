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

# a step is 32 sequences of 1024 tokens, one at a time so that XL fits; two passes over the text in all
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# constant and small: the weights are good already and few steps are taken
learning_rate = 3e-5
decay_lr = False
