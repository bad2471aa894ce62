"""
Supervised finetuning of a model of your own, or anybody's, on conversations of your own: one GPU, or, for a small
model, a laptop. What a step takes is set here for a model of 100M parameters and more.

    $ python data/chat/prepare.py --input=talks.jsonl --tokenizer=FOLDER
    $ python train.py config/sft.py --init_from=FOLDER --dataset=talks
    $ python sample.py --out_dir=out-sft --chat
"""

out_dir = 'out-sft'
eval_interval = 50
eval_iters = 20
log_interval = 10
patience = 3  # stop once the val loss no longer falls, which it does after one to three passes over the conversations

# a step is 32 rows of conversations; batch_size: as many as fit in memory at once
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 1000

learning_rate = 2e-5  # of a model of 1M parameters 1e-3
min_lr = 0.0
warmup_iters = 20
lr_decay_iters = None
weight_decay = 0.0
