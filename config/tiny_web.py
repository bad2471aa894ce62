"""
The base model of data/tiny_chat: 2.0M parameters over bytes, pretrained on texts about sums, words and small tables.

    $ python data/tiny_chat/prepare.py
    $ python data/text/prepare.py --input=data/tiny_chat/corpus.jsonl --name=tiny_web \\
        --tokenizer=data/tiny_chat/chat.json
    $ python train.py config/tiny_web.py
    $ python eval.py --out_dir=out-tiny-web --task=tiny_chat --shots=4 --max_new_tokens=40

It knows these things, and no conversation: val loss 0.43, a third of questions right after four examples. Two cores of
an AMD EPYC: 0.18 to 0.3 s a step, 3 to 6 minutes. What comes next: config/sft_tiny_chat.py.
"""

out_dir = 'out-tiny-web'
dataset = 'tiny_web'
eval_interval = 500
eval_iters = 20
eval_first = False
log_interval = 50

preset = 'modern'
n_layer = 4
n_head = 4
n_embd = 192
block_size = 256  # four solved examples, a question and its answer
value_embeddings = True  # 400 steps on tables alone teach to look up a row with them, and nothing of it without

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 1000
