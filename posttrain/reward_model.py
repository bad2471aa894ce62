"""Give a GPT a scalar head: a reward model, or PPO's value function.

As reward model it scores an answer at the token that ends it. As value function it predicts, at
every token, the reward to come.

    critic = Critic.from_gpt(model)                   # a copy of its trunk, and a head of zeros
    values = critic(idx)                              # (B, T)
    scores = critic.scores(idx, lengths)              # (B,)
    critic, line = open_reward_model('out-reward', tokenizer, template)
"""

import math
import os

import torch

from configurator import UserError
from flatgpt import checkpoint, entries, huggingface, lora
from flatgpt.classify import Head, logits_of
from flatgpt.pretrained import base_of, build, kind_of, path_in, tokenizer_of
from model import GPT, GPTConfig
from posttrain.preferences import ending_of
from posttrain.rollouts import to_rows
from tokenizer import chat

TRAIN_ONE = 'train one: python -m posttrain.reward --init_from=FOLDER --data=PAIRS.jsonl'


class Critic(GPT):
    """Put value_head in place of lm_head on a GPT's trunk, under the same names."""

    def __init__(self, config):
        super().__init__(config)
        del self.lm_head  # a tied one leaves its weight in the embedding
        self.value_head = Head(config.n_embd)  # of zeros, so the first loss is ln 2

    @classmethod
    def from_gpt(cls, model, dropout=0.0):
        """Make a Critic with a copy of a GPT's trunk, on the same device."""
        critic = cls(GPTConfig(**{**vars(model.config), 'dropout': dropout}))
        trunk = {name: w for name, w in model.state_dict().items() if name != 'lm_head.weight'}
        critic.load_state_dict({**critic.state_dict(), **trunk})
        return critic.to(next(model.parameters()).device)

    def forward(self, idx):
        """Return the value of the text up to each token, in fp32: ids (B, T) -> (B, T)."""
        return self.value_head(self.hidden(idx))[..., 0]

    def scores(self, idx, lengths):
        """Return the score (B,) at each row's last token. idx: (B, T), padded at the end."""
        return logits_of(self, idx, lengths)[:, 0]


@torch.no_grad()
def scores_of(critic, prompts, answers, stop_ids, ending):
    """Score drawn answers, lists of ids; -> (n,).

    Each is scored at the id `ending`, the only place that the reward model learned. It replaces any
    other of stop_ids and completes an answer that was cut off.
    """
    rows = [prompt + [i for i in answer if i not in stop_ids] + [ending]
            for prompt, answer in zip(prompts, answers, strict=True)]
    idx, _ = to_rows([(ids, ids) for ids in rows], critic.value_head.weight.device)
    return critic.scores(idx, torch.tensor([len(ids) for ids in rows], device=idx.device))


def ratings_of(critic, messages, texts, template, tokenizer):
    """Score answers given as texts to one conversation; -> list of floats.

    An empty answer, or one longer than the critic's context, gets -inf. Any other text is scored,
    unfinished calls of a tool included.
    """
    prompt, ratings = chat.render(messages, template, tokenizer), [-math.inf] * len(texts)
    room = critic.config.block_size - len(prompt) - 1  # one for the ending
    answers = {i: ids for i, text in enumerate(texts) if text.strip()
               and len(ids := tokenizer.encode(text, allowed_special='all')) <= room}
    if answers:
        stop_ids, _ = chat.find_endings(template, tokenizer)
        scores = scores_of(critic, [prompt] * len(answers), answers.values(), stop_ids,
                           ending_of(template, tokenizer))
        for i, score in zip(answers, scores.tolist(), strict=True):
            ratings[i] = score
    return ratings


def critic_of(state, path, dropout=0.0, needed=entries.Speaker):
    """Build a checkpoint's reward model, on the CPU, with its adapters if it has any.

    needed: the rule of its other entries. Raises UserError if it lacks one, or is no reward model.
    """
    if not state.get('reward_model'):
        raise UserError(f'{path} is {kind_of(state)}; expected a reward model, {TRAIN_ONE}')
    entries.check_content(state, needed, path)
    if 'lora' not in state:
        return build(Critic, state, path, dropout)
    critic = Critic.from_gpt(base_of(state, path, dropout), dropout)
    lora.restore(critic, state['lora'], state['model'])
    return critic


def open_reward_model(out_dir, tokenizer, template):
    """Open a reward model to score a chat model's answers; -> (Critic, line to print).

    The Critic is on the CPU, in eval mode. Raises UserError if out_dir has none, or if its
    tokenizer or chat template differs from the chat model's.
    """
    path = path_in(out_dir)
    if not os.path.exists(path):
        raise UserError(f'there is no reward model in {out_dir}; {TRAIN_ONE} --out_dir={out_dir}')
    state = checkpoint.load(path)
    critic, saved = critic_of(state, path), tokenizer_of(state).to_dict()
    is_same = {'tokenizer': huggingface.same_tokenizer(saved, tokenizer.to_dict()),
               'chat template': state['chat_template'] == template}
    for name, same in is_same.items():
        if not same:
            raise UserError(f'the reward model in {out_dir} has another {name} than the chat '
                            f'model; from that model {TRAIN_ONE}')
    return critic.eval(), (f'{path}: step {state["iter_num"]}, lowest val loss so far '
                           f'{float(state["best_val_loss"]):.4f}')
