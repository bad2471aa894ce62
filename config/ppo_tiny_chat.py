"""
Train the assistant of config/sft_tiny_chat.py with PPO against a reward model.

    $ python -m posttrain.rl config/ppo_tiny_chat.py
    $ python eval.py --out_dir=out-ppo-tiny-chat --task=tiny_chat

The reward is the score of the model of config/reward_tiny_chat.py alone. The correct answers only
choose best.pt. Two cores of an AMD EPYC take 4 s per step, 3 minutes. Accuracies are in
bench/results/2026-11-21-posttraining.md.
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
max_new_tokens = 128  # the longest worked answers take 112
learning_rate = 2e-4
critic_lr = 1e-3
kl_coef = 0.3
final_share = 0.1
