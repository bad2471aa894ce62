"""
GPT-2 (124M) on OpenWebText to a loss of about 2.85, nanoGPT's settings: 8 A100 40GB, about 4 days.

    $ python data/openwebtext/prepare.py
    $ torchrun --standalone --nproc_per_node=8 train.py config/gpt2_classic.py
    $ python train.py config/gpt2_classic.py --wandb_log=True   # one GPU: the same mathematics, eight times as long

To compare with; our own recipe is config/train_gpt2.py.
"""

out_dir = 'out-gpt2-classic'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 200
log_interval = 10
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-classic'

# half a million tokens a step, GPT-3's batch for this size; 40 micro-batches are 5 on each of 8 GPUs
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 steps x 491,520 tokens = 295B tokens, 33 epochs of OpenWebText's 9B
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1
