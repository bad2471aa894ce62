"""
Finetune the model of config/tiny_web.py with LoRA, on the data of tiny_chat.

    $ python train.py config/lora_tiny_chat.py
    $ python eval.py --out_dir=out-lora-tiny-chat --task=tiny_chat

The base weights stay frozen. Adapters beside attention and the head learn; they have 1.4% as many
parameters. Two cores of an AMD EPYC take 0.12 to 0.3 s per step, 2 to 4 minutes, to a val loss of
0.05; finetuning all weights reaches 0.025.
"""

out_dir = 'out-lora-tiny-chat'
init_from = 'out-tiny-web'
dataset = 'tiny_chat'
eval_interval = 350
eval_iters = 20
log_interval = 50

preset = 'modern'
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 700

lora_rank = 8
lora_targets = 'c_attn,lm_head'  # the head too: the base model has never seen the chat tokens
optimizer = 'adamw'  # Muon needs whole matrices
learning_rate = 0.01
beta1 = 0.9
