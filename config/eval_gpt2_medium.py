"""
The loss of OpenAI's GPT-2 (350M) on OpenWebText; nanoGPT reports 2.85 / 2.84 (train / val) for it.

    $ python train.py config/eval_gpt2_medium.py
"""

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500  # batches of the training split; the val split is evaluated whole
batch_size = 8
