"""
Train the assistant of config/sft_tiny_chat.py with REINFORCE, on LoRA adapters alone.

    $ python -m posttrain.rl config/reinforce_tiny_chat.py
    $ python eval.py --out_dir=out-reinforce-tiny-chat --task=tiny_chat

The baseline of an answer is the mean reward of the others in its group (RLOO). The frozen base is
the reference. Its accuracy is not measured yet.
"""

out_dir = 'out-reinforce-tiny-chat'
init_from = 'out-sft-tiny-chat'
task = 'tiny_chat'
algorithm = 'reinforce'
eval_interval = 10
eval_examples = 350

max_iters = 40
prompts_per_step = 48
group_size = 8
minibatch_size = 384  # one update per step: reinforce has no clip
max_new_tokens = 128  # the longest worked answers take 112
temperature = 1.3  # at 1 it mostly repeats its likeliest answer; it has to try others
learning_rate = 2e-3  # adapters take a higher one than whole weights
kl_coef = 0.01
final_share = 0.1

lora_rank = 8
