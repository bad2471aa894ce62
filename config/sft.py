"""
Finetune a model on your own conversations (SFT).

    $ python data/chat/prepare.py --input=talks.jsonl --tokenizer=FOLDER
    $ python train.py config/sft.py --init_from=FOLDER --dataset=talks
    $ python -m posttrain.chat --out_dir=out-sft

FOLDER is a run's out_dir or a Hugging Face folder. The learning rate and the batch suit models of
100M parameters and more.
"""

out_dir = 'out-sft'
init_from = 'out-base'  # a run's out_dir, a Hugging Face folder or hub id
dataset = 'talks'
eval_interval = 50
eval_iters = 20
log_interval = 10
patience = 3  # the val loss stops falling after one to three epochs of conversations

# a step takes 32 rows of conversations; batch_size: as many as fit in memory
preset = 'gpt2'  # sets nothing: the model keeps its architecture
batch_size = 4
gradient_accumulation_steps = 8
max_iters = 1000

learning_rate = 2e-5  # for a model of 1M parameters 1e-3
min_lr = 0.0
warmup_iters = 20
lr_decay_iters = None
weight_decay = 0.0
