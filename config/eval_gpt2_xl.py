"""
The loss of OpenAI's GPT-2 (1558M) on OpenWebText; nanoGPT reports 2.56 / 2.54 (train / val) for it.

    $ python train.py config/eval_gpt2_xl.py
"""

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500  # batches of the training split; the val split is evaluated whole
batch_size = 8
