"""
Evaluate OpenAI's GPT-2 (124M) on OpenWebText.

    $ python train.py config/eval_gpt2.py

nanoGPT reports a loss of 3.11 (train) and 3.12 (val).
"""

init_from = 'gpt2'
eval_only = True
eval_iters = 500  # batches of the train split; the val split is evaluated whole
batch_size = 8
