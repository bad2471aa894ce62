"""
A GPT that gives numbers in place of words: as reward model the score of an answer, at the token that ends it; as PPO's
value function, at every token, the reward to be expected.

    critic = Critic.from_gpt(model)                   # its trunk, and a head that says 0 to everything
    values = critic(idx)                              # (B, T)
    scores = critic.scores(idx, lengths)              # (B,)
    critic, line = open_reward_model('out-reward', tokenizer, template)   # what reward.py trained
"""

import os

import torch
from torch import nn

from configurator import UserError
from flatgpt import checkpoint, huggingface
from flatgpt.pretrained import tokenizer_of
from model import GPT, GPTConfig


class Critic(GPT):
    """The trunk of a GPT, under the same names, and value_head where the head was."""

    def __init__(self, config):
        super().__init__(config)
        del self.lm_head  # one tied to the embedding leaves its weight there
        self.value_head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.value_head.weight)  # expects nothing before it has learnt: a first loss of ln 2
        nn.init.zeros_(self.value_head.bias)

    @classmethod
    def from_gpt(cls, model, dropout=0.0):
        """-> a Critic with a copy of the GPT's trunk."""
        critic = cls(GPTConfig(**{**vars(model.config), 'dropout': dropout}))
        weights = {name: weight for name, weight in model.state_dict().items() if name != 'lm_head.weight'}
        critic.load_state_dict({**critic.state_dict(), **weights})
        return critic.to(next(model.parameters()).device)

    def head(self, hidden):
        """(..., C) -> (...), in fp32 also under autocast: in the 8 bits of bf16 scores of 5 are 0.03 apart."""
        return (hidden.float() * self.value_head.weight[0]).sum(dim=-1) + self.value_head.bias

    def forward(self, idx):
        """ids (B, T) -> values (B, T) in fp32, each of the text up to that token."""
        return self.head(self.hidden(idx))

    def scores(self, idx, lengths):
        """ids (B, T), padded behind, of which lengths (B,) are a conversation -> the score (B,) at its last token."""
        last = self.hidden(idx)[torch.arange(len(idx), device=idx.device), lengths - 1]  # (B, C)
        return self.head(last)


def critic_of(state, path, dropout=0.0):
    """
    The reward model inside a checkpoint, of checkpoint.load(path), on the CPU. Raises ValueError for that of a language
    model, or one that another version wrote.
    """
    if not state.get('reward_model'):
        raise UserError(f'{path} is a language model; expected a reward model, which reward.py trains:\n'
                         f'  python -m posttrain.reward --init_from={os.path.dirname(path)} --data=PAIRS.jsonl')
    try:
        critic = Critic(GPTConfig(**{**state['model_args'], 'dropout': dropout}))
        critic.load_state_dict(state['model'])
    except (TypeError, RuntimeError) as error:
        raise UserError(f'{path} holds a reward model of another version of this repository: {error}') from error
    return critic


def open_reward_model(out_dir, tokenizer, template):
    """
    The reward model in out_dir, to judge what a model with this tokenizer and chat template says: -> (Critic, on the
    CPU and in eval mode, a line that says which it is). Raises ValueError for what is none, or reads other ids.
    """
    path = checkpoint.path_in(out_dir)
    if not os.path.exists(path):
        raise UserError(f'there is no reward model in {out_dir}; train one: python -m posttrain.reward --init_from=FOLDER '
                         f'--data=PAIRS.jsonl --out_dir={out_dir}')
    state = checkpoint.load(path)
    critic = critic_of(state, path)
    is_same = {'tokenizer': huggingface.same_tokenizer(tokenizer_of(state).to_dict(), tokenizer.to_dict()),
               'chat template': state['chat_template'] == template}
    for what, same in is_same.items():
        if not same:
            raise UserError(f'the reward model in {out_dir} has another {what} than the model that it is to judge; '
                             f'train one that begins with that: python -m posttrain.reward --init_from=FOLDER --data=PAIRS.jsonl')
    line = f'{path}: step {state["iter_num"]}, lowest val loss so far {float(state["best_val_loss"]):.4f}'
    return critic.eval(), line
