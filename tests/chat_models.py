"""Tiny chat models, pairs and a task, for the tests of posttrain/."""

import json
import random
from dataclasses import asdict, fields

import torch
from conftest import Folder

from config.presets import PRESETS
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, chat

TOKENIZER = BPETokenizer([], None, {token: 256 + i for i, token in enumerate(chat.SPECIAL_TOKENS)})  # one a byte
START, SYSTEM, USER, ASSISTANT, TOOL, END = range(256, 262)
PAIR = {'messages': [{'role': 'user', 'content': '2+2?'}], 'chosen': '4', 'rejected': '55'}
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
TASK = '''
def examples(split, n, seed=0, input='', kinds=()):
    return [{'messages': [{'role': 'user', 'content': f'{split[0]} {i}'}]} for i in range(n)]


def evaluate(example, text):
    """Return whether it is mostly vowels."""
    return reward(example, text) > 0.5


def reward(example, text):
    return sum(char in 'aeiou' for char in text) / max(1, len(text))
'''


def tiny(preset='gpt2', **changes):
    torch.manual_seed(0)
    sizes = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 32, 'vocab_size': 266}
    values = {**PRESETS[preset], **sizes, **changes}  # a preset also sets the optimizer
    names = [field.name for field in fields(GPTConfig) if field.name in values]
    return GPT(GPTConfig(**{name: values[name] for name in names})).eval()


def save_chat_model(path, name='chat', block_size=32, words=(), **changes):
    """
    Save a model as train.py does. It answers with letters and the end, all equally likely.

    words: special tokens that are likelier.
    """
    model = tiny(n_embd=32, tie_embeddings=False, block_size=block_size)
    with torch.no_grad():  # the first channel is 1 at the head, and lowers all other tokens
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
        model.lm_head.weight[:, 0] = -10.0
        model.lm_head.weight[[*LETTERS.encode(), END], 0] = 0.0
        model.lm_head.weight[[TOKENIZER.special_tokens[word] for word in words], 0] = 2.0
    (path / name).mkdir()
    torch.save({'version': 1, 'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': 7,
                'best_val_loss': 1.25, 'config': {'dataset': 'talks'}, 'tokenizer': TOKENIZER.to_dict(),
                'chat_template': chat.TEMPLATE, **changes}, path / name / 'ckpt.pt')


def write_pairs(path, pairs):
    path.write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
    return str(path)


def save_pairs(path, n=200):
    """Save pairs in which vowels are better than other letters."""
    rng, pairs = random.Random(0), []
    for i in range(n):
        chosen = ''.join(rng.choices('aeiou', k=rng.randint(1, 6)))
        rejected = ''.join(rng.choices([letter for letter in LETTERS if letter not in 'aeiou'], k=rng.randint(1, 6)))
        pairs.append({'messages': [{'role': 'user', 'content': str(i)}], 'chosen': chosen, 'rejected': rejected})
    write_pairs(path / 'pairs.jsonl', pairs)


def make_chats(path):
    """Make a folder with the model chat, pairs.jsonl and the task vowels."""
    save_chat_model(path)
    save_pairs(path)
    (path / 'tasks').mkdir()
    (path / 'tasks' / 'vowels.py').write_text(TASK)
    return Folder(path)
