"""
Reinforcement learning from a reward model: the assistant of config/sft_tiny_chat.py learns what the model of
config/reward_tiny_chat.py thinks of its answers, and nothing of what is right, which only chooses best.pt. Two cores of
an AMD EPYC: 4 s a step, 3 minutes. See bench/results/2026-11-21-posttraining.md for how much better it gets.

    $ python -m posttrain.rl config/ppo_tiny_chat.py
    $ python eval.py --out_dir=out-ppo-tiny-chat --task=tiny_chat
"""

out_dir = 'out-ppo-tiny-chat'
init_from = 'out-sft-tiny-chat'
task = 'tiny_chat'
algorithm = 'ppo'
reward_model = 'out-reward-tiny-chat'
eval_interval = 10
eval_examples = 350

max_iters = 30
prompts_per_step = 128
group_size = 1
max_new_tokens = 128  # the longest steps to an answer take 112
learning_rate = 2e-4
critic_lr = 1e-3
kl_coef = 0.3
final_share = 0.1
