"""
Supervised finetuning: the base model of config/tiny_web.py becomes an assistant, on the conversations of
data/tiny_chat. The loss is that of what the assistant says: 0.025 on val, and 86% of questions right. Two cores of
an AMD EPYC: 0.19 to 0.3 s a step, 2 to 4 minutes.

    $ python train.py config/sft_tiny_chat.py
    $ python eval.py --out_dir=out-sft-tiny-chat --task=tiny_chat
    $ python eval.py --out_dir=out-sft-tiny-chat --task=tiny_chat --kinds=addition,subtraction --tools=True
    $ python -m posttrain.chat --out_dir=out-sft-tiny-chat
"""

out_dir = 'out-sft-tiny-chat'
init_from = 'out-tiny-web'
dataset = 'tiny_chat'
eval_interval = 350
eval_iters = 20
log_interval = 50

preset = 'modern'
batch_size = 16
gradient_accumulation_steps = 1
max_iters = 700

# half of the rates of pretraining
muon_lr = 0.01
embedding_lr = 0.01
learning_rate = 0.002
