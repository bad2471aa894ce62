"""
Reinforcement learning from a program that checks answers: the assistant of config/sft_tiny_chat.py gets better at what
data/tiny_chat asks: from 81.9 to 90.3% of 700 questions. One core of an AMD EPYC: 5 s a step.

    $ python rl.py config/grpo_tiny_chat.py
    $ python evaluate.py --out_dir=out-grpo-tiny-chat --task=tiny_chat
"""

out_dir = 'out-grpo-tiny-chat'
init_from = 'out-sft-tiny-chat'
task = 'tiny_chat'
algorithm = 'grpo'
eval_interval = 20
eval_examples = 350

max_iters = 80
prompts_per_step = 16
group_size = 8
max_new_tokens = 128  # the longest steps to an answer take 112
learning_rate = 3e-4
kl_coef = 0.01
final_share = 0.1
