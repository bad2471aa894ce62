"""
Train a GPT of 124M on 10 billion tokens of OpenWebText or FineWeb-Edu.

    $ python data/openwebtext/prepare.py
    $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    $ python train.py config/train_gpt2.py --dataset=fineweb_edu --wandb_log=True

This recipe has not been run yet. It costs 8.5e18 FLOPs. At 45% of their peak that takes two hours
on 8 A100, or five and a half on one H100. The last command computes the same steps on one GPU.
config/gpt2_classic.py has nanoGPT's settings; config/speedrun.py takes a fifth of these tokens.
"""

out_dir = 'out'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 20
log_interval = 10
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

preset = 'modern'
# both help at this size in the GPT-2 speedruns and in nanochat, but not at 1M parameters
mlp = 'relu2'
zero_init = True

# half a million tokens per step, GPT-3's batch for this size (Brown et al. 2020, table 2.1):
# 16 micro-batches of 32 sequences, divided among 1, 2, 4, 8 or 16 GPUs
gradient_accumulation_steps = 16
batch_size = 32
block_size = 1024

# Hoffmann et al. 2022 spend 20 tokens per parameter, 2.5 billion here. A model that is also used
# deserves more: 10 billion are about one epoch of OpenWebText. With 10 billion llm.c's GPT-2
# (AdamW) reached a loss of 3.28 on FineWeb, and recipes like this one with a quarter of them.
max_iters = 19000  # x 524,288 = 9.96 billion

# Muon's step has the same size for every shape of matrix, so muon_lr stays 0.02, as in the
# speedruns. AdamW's rates were found at widths of 128 and 384. The rate of the head falls with the
# root of the width, which keeps the steps of the logits as small: 0.004 * sqrt(384 / 768) = 0.0028.
learning_rate = 0.0028
warmup_iters = 100
weight_decay = 0.01  # the value of Muon's author; in 19,000 steps weights have time to grow
