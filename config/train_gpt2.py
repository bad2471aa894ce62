"""
GPT-2's size (124M) on OpenWebText or FineWeb-Edu, 10 billion tokens: 8.5e18 FLOPs, which at 45% of their peak are two
hours of 8 A100 or five and a half of one H100.

    $ python data/openwebtext/prepare.py
    $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    $ python train.py config/train_gpt2.py --dataset=fineweb_edu --wandb_log=True    # one GPU: the same mathematics

Not run yet: what is known is beside each number. nanoGPT's own settings, four days of 8 A100, are in
config/gpt2_classic.py; config/speedrun.py has a fifth of these tokens.
"""

out_dir = 'out'
dataset = 'openwebtext'
eval_interval = 1000
eval_iters = 20
log_interval = 10
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

preset = 'modern'
mlp = 'relu2'  # as is zero_init, better at this size in the speedruns and in nanochat, if not at 1M parameters
zero_init = True

# Half a million tokens a step, GPT-3's batch for this size ("Language Models are Few-Shot Learners", table 2.1): 16
# micro-batches of 32 sequences, shared out to 1, 2, 4, 8 or 16 GPUs
gradient_accumulation_steps = 16
batch_size = 32
block_size = 1024

# Tokens: "Training Compute-Optimal Large Language Models" (Hoffmann et al. 2022) spends 20 a parameter, 2.5 billion
# here; a model that is used and not only measured is worth more. 10 billion are about one epoch of OpenWebText: llm.c's
# GPT-2 (AdamW) reached a loss of 3.28 on FineWeb with as many, and recipes like this one with a quarter of them.
max_iters = 19000  # x 524,288 = 9.96 billion

# Rates: Muon's step has the same size for every shape of matrix, so its rate stays the preset's 0.02, where the GPT-2
# speedruns have it too. AdamW's, for the embeddings and the head, were found at a width of 128 and 384; to keep the
# steps of the output as small, the head's falls with the root of the width: 0.004 * sqrt(384 / 768) = 0.0028
learning_rate = 0.0028
warmup_iters = 100
weight_decay = 0.01  # Muon's author's; 19,000 steps are long enough for weights to grow
