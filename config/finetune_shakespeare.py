"""
Finetune GPT-2 XL on Shakespeare.

    $ python data/shakespeare/prepare.py
    $ python train.py config/finetune_shakespeare.py
    $ python sample.py --out_dir=out-shakespeare

It takes a few minutes on one GPU with 40 GB. On a smaller one add --init_from=gpt2-medium or
--init_from=gpt2.
"""

import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
always_save_checkpoint = False  # save only when the val loss improves

dataset = 'shakespeare'
init_from = 'gpt2-xl'

# 32 sequences of 1,024 tokens per step, one at a time so that XL fits; two epochs in all
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# constant and small: the weights are good already and there are few steps
learning_rate = 3e-5
decay_lr = False
