"""
Evaluate OpenAI's GPT-2 (774M) on OpenWebText.

    $ python train.py config/eval_gpt2_large.py

nanoGPT reports a loss of 2.66 (train) and 2.67 (val).
"""

init_from = 'gpt2-large'
eval_only = True
eval_iters = 500  # batches of the train split; the val split is evaluated whole
batch_size = 8
