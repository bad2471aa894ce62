"""
Reinforcement learning from a program that checks answers: the assistant of config/sft_tiny_chat.py gets better at what
data/tiny_chat asks. Two cores of an AMD EPYC: 5 to 7 s a step, 5 minutes. See bench/results/2026-11-21-posttraining.md
for how much better.

    $ python -m posttrain.rl config/grpo_tiny_chat.py
    $ python eval.py --out_dir=out-grpo-tiny-chat --task=tiny_chat
"""

out_dir = 'out-grpo-tiny-chat'
init_from = 'out-sft-tiny-chat'
task = 'tiny_chat'
algorithm = 'grpo'
eval_interval = 10
eval_examples = 350

max_iters = 40
prompts_per_step = 48
group_size = 8
minibatch_size = 384
skip_equal = True  # most of the answers are right, and of most groups all
max_new_tokens = 128  # the longest steps to an answer take 112
temperature = 1.3  # its first choice is mostly what it says; others have to be tried
learning_rate = 4e-4
kl_coef = 0.01
final_share = 0.1
