"""
Train a character-level GPT on a small text: a book, or a person's own writing.

    $ python data/text/prepare.py --input=book.txt --name=book --tokenizer=char
    $ python train.py config/small_data.py --dataset=book

The model has 0.8M parameters. Every text gets the same 3.3M characters of training, so a smaller
text is read more often, and dropout='auto' grows with these passes: 0.12 at 12, for 300 kB. The run
ends after max_iters, or when the val loss has not fallen for 4 evaluations; best.pt is its result.

After 1,582 such steps with dropout 0.1 the first 300 kB of tiny Shakespeare have a val loss of
1.392, n = 1. nanoGPT's settings reach 1.503 at their best. A step takes 0.5 to 0.9 s on one core of
a first-generation EPYC beside other programs, without compilation, so the run takes 13 to 24
minutes (bench/results/2026-12-01-learning.md).
"""

out_dir = 'out-small-data'
dataset = 'shakespeare_char'
eval_interval = 100
eval_iters = 5
eval_first = False
log_interval = 100
sample_tokens = 500
patience = 4  # a fourth of the run at most is lost where val has turned

preset = 'modern'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
dropout = 'auto'

batch_size = 32  # 2,048 characters per step
gradient_accumulation_steps = 1
max_iters = 1600
