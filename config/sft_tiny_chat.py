"""
Finetune the model of config/tiny_web.py on data/tiny_chat's conversations.

    $ python train.py config/sft_tiny_chat.py
    $ python eval.py --out_dir=out-sft-tiny-chat --task=tiny_chat
    $ python eval.py --out_dir=out-sft-tiny-chat --task=tiny_chat --tools=True \\
        --kinds=addition,subtraction
    $ python -m posttrain.chat --out_dir=out-sft-tiny-chat

Two cores of an AMD EPYC take 0.19 to 0.3 s per step, 2 to 4 minutes. The val loss, which counts the
assistant's tokens alone, ends at 0.025. 86% of the questions are answered correctly.
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
