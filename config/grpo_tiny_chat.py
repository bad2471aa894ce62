"""
Train the assistant of config/sft_tiny_chat.py with GRPO, by checked answers.

    $ python -m posttrain.rl config/grpo_tiny_chat.py
    $ python eval.py --out_dir=out-grpo-tiny-chat --task=tiny_chat

Two cores of an AMD EPYC take 5 to 7 s per step, 5 minutes. Accuracies are in
bench/results/2026-11-21-posttraining.md.
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
skip_equal = True  # in most groups all answers are correct
max_new_tokens = 128  # the longest worked answers take 112
temperature = 1.3  # at 1 it mostly repeats its likeliest answer; it has to try others
learning_rate = 4e-4
kl_coef = 0.01
final_share = 0.1
