"""
Evaluate OpenAI's GPT-2 (1558M) on OpenWebText.

    $ python train.py config/eval_gpt2_xl.py

nanoGPT reports a loss of 2.56 (train) and 2.54 (val).
"""

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500  # batches of the train split; the val split is evaluated whole
batch_size = 8
