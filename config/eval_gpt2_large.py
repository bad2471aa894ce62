"""
The loss of OpenAI's GPT-2 (774M) on OpenWebText; nanoGPT reports 2.66 / 2.67 (train / val) for it.

    $ python train.py config/eval_gpt2_large.py
"""

init_from = 'gpt2-large'
eval_only = True
eval_iters = 500  # batches of the training split; the val split is evaluated whole
batch_size = 8
