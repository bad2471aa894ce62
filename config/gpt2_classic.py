"""
Train GPT-2 (124M) on OpenWebText with nanoGPT's settings.

    $ python data/openwebtext/prepare.py
    $ torchrun --standalone --nproc_per_node=8 train.py config/gpt2_classic.py
    $ python train.py config/gpt2_classic.py --wandb_log=True

nanoGPT reports a loss of about 2.85 after 4 days on 8 A100 with 40 GB. The second command computes
the same steps on one GPU, in eight times the time. config/train_gpt2.py is our own recipe.
"""

out_dir = 'out-gpt2-classic'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 200
log_interval = 10
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-classic'

# half a million tokens per step, GPT-3's batch for this size; 8 GPUs take 5 micro-batches each
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 steps x 491,520 tokens = 295B tokens, 33 epochs of OpenWebText's 9B
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1
