"""
Pretrain data/tiny_chat's base model on texts about sums, words and tables.

    $ python data/tiny_chat/prepare.py
    $ python data/text/prepare.py --input=data/tiny_chat/corpus.jsonl --name=tiny_web \\
        --tokenizer=data/tiny_chat/chat.json
    $ python train.py config/tiny_web.py
    $ python eval.py --out_dir=out-tiny-web --task=tiny_chat --shots=4 --max_new_tokens=40

The model has 2.0M parameters and reads bytes. Two cores of an AMD EPYC take 0.18 to 0.3 s per step,
3 to 6 minutes, to a val loss of 0.43. With four examples in the prompt it answers a third of the
questions correctly. It was trained on no conversation; config/sft_tiny_chat.py comes next.
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
# with them 400 steps on tables teach the model to look up a row, without them they do not
value_embeddings = True

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 1000
