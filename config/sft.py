"""
Supervised finetuning on conversations of your own, of a model of your own or anybody's. The rate and the batch are for
models of 100M parameters and more.

    $ python data/chat/prepare.py --input=talks.jsonl --tokenizer=FOLDER
    $ python train.py config/sft.py --init_from=FOLDER --dataset=talks
    $ python -m posttrain.chat --out_dir=out-sft
"""

out_dir = 'out-sft'
init_from = 'out-base'  # a run's out_dir, a Hugging Face folder or hub id
dataset = 'talks'
eval_interval = 50
eval_iters = 20
log_interval = 10
patience = 3  # stop once the val loss no longer falls, which it does after one to three passes over the conversations

# a step is 32 rows of conversations; batch_size: as many as fit in memory at once
preset = 'gpt2'  # nothing but what is given here; the model is what it is
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 1000

learning_rate = 2e-5  # for a model of 1M parameters 1e-3
min_lr = 0.0
warmup_iters = 20
lr_decay_iters = None
weight_decay = 0.0
