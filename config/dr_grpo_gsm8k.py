r"""
Train a published instruct model on GSM8K with Dr. GRPO, on LoRA adapters.

    $ python -m posttrain.rl config/dr_grpo_gsm8k.py --input=train.jsonl
    $ python -m posttrain.rl config/dr_grpo_gsm8k.py --input=train.jsonl --wandb_log=True

train.jsonl has lines such as {"question": "...", "answer": "... #### 18"}. An answer in \boxed{}
gets a tenth, a right one gets 1. The loss divides by a constant and advantages by no deviation, as
in "Understanding R1-Zero-Like Training" (Liu et al. 2025). It needs a GPU. It is not measured yet.
"""

out_dir = 'out-dr-grpo-gsm8k'
init_from = 'Qwen/Qwen2.5-0.5B-Instruct'
task = 'gsm8k'
wandb_run_name = 'dr-grpo-gsm8k'
answer_form = 'boxed'
form_reward = 0.1

algorithm = 'grpo'
reduction = 'constant'
divide_by_std = False
kl_coef = 0.0
max_iters = 200
prompts_per_step = 32
group_size = 8
minibatch_size = 256
micro_batch_size = 16
max_new_tokens = 400

lora_rank = 32
lora_alpha = 64.0
lora_bits = 8
learning_rate = 1e-4
