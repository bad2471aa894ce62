"""
Train the reward model of data/tiny_chat on pairs of answers.

    $ python -m posttrain.reward config/reward_tiny_chat.py
    $ python eval.py --out_dir=out-sft-tiny-chat --task=tiny_chat --num_samples=8 --temperature=1 \\
        --reward_model=out-reward-tiny-chat

Two cores of an AMD EPYC take 0.4 to 0.7 s per step, 4 to 7 minutes. It ranks 9 of 10 held-out pairs
correctly. The second command chooses the best of 8 answers with it.
"""

out_dir = 'out-reward-tiny-chat'
init_from = 'out-sft-tiny-chat'
data = 'data/tiny_chat/pairs.jsonl'
eval_interval = 600
val_fraction = 0.05
log_interval = 50

max_iters = 600
batch_size = 32
micro_batch_size = 8
optimizer = 'muon'
learning_rate = 1e-3
muon_lr = 5e-3
embedding_lr = 5e-3
min_lr = 0.0
weight_decay = 0.0
beta1 = 0.8
