"""
The loss of OpenAI's GPT-2 (124M) on OpenWebText; nanoGPT reports 3.11 / 3.12 (train / val) for it.

    $ python train.py config/eval_gpt2.py
"""

init_from = 'gpt2'
eval_only = True
eval_iters = 500  # batches of the training split; the val split is evaluated whole
batch_size = 8
