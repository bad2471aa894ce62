"""
Evaluate OpenAI's GPT-2 (350M) on OpenWebText.

    $ python train.py config/eval_gpt2_medium.py

nanoGPT reports a loss of 2.85 (train) and 2.84 (val).
"""

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500  # batches of the train split; the val split is evaluated whole
batch_size = 8
