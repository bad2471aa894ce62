"""
The reward model of data/tiny_chat: which of two answers is the better, learnt from pairs. Two cores of an AMD EPYC:
0.6 s a step, 3 minutes; 86.5% of held-out pairs.

    $ python reward.py config/reward_tiny_chat.py
    $ python evaluate.py --out_dir=out-sft-tiny-chat --task=tiny_chat --num_samples=8 --temperature=1 \\
        --reward_model=out-reward-tiny-chat
"""

out_dir = 'out-reward-tiny-chat'
init_from = 'out-sft-tiny-chat'
data = 'data/tiny_chat/pairs.jsonl'
eval_interval = 100
log_interval = 50

max_iters = 300
batch_size = 32
micro_batch_size = 8
learning_rate = 1e-3
min_lr = 0.0
