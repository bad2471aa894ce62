"""
Classify texts by a GPT that has a head of K outputs at the last token.

    classifier = load('out-classify')                # made by posttrain.classify
    classifier.probabilities(['Lovely.', 'Awful.'])  # [{'bad': 0.1, 'good': 0.9}, ...]

An extract token ends each text: <|endoftext|> or the tokenizer's own such token, else a line break.
The head reads the hidden state there. Of a text longer than the context the end is kept: a causal
model reads the label off at the end, and on IMDb a text's end says more than its beginning ("How to
Fine-Tune BERT for Text Classification?", Sun et al. 2019). Source: "Improving Language
Understanding by Generative Pre-Training" (GPT-1), Radford et al. 2018.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import ops
from configurator import UserError
from flatgpt import checkpoint, entries
from flatgpt.pretrained import check_finite, kind_of, model_of, path_in, tokenizer_of
from model import GPT
from tokenizer.chat import bos_ids, ends_of_text

TRAIN_ONE = 'train one: python -m posttrain.classify --init_from=FOLDER --data=LABELLED.jsonl'


class Head(nn.Linear):
    """Map hidden states to K outputs in fp32: bf16 scores near 5 are 0.03 apart."""

    def __init__(self, n_embd, n_outputs=1):
        super().__init__(n_embd, n_outputs)
        nn.init.zeros_(self.weight)  # the first loss is ln K
        nn.init.zeros_(self.bias)

    def forward(self, hidden):
        """Apply the head: (..., C) -> (..., K)."""
        return (hidden.float()[..., None, :] * self.weight).sum(dim=-1) + self.bias


def at_ends(hidden, lengths):
    """Return each row's hidden state at its last token: (B, T, C), (B,) -> (B, C)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def add_head(model, n_outputs):
    """Give a GPT a value_head beside its own head, in place; -> the GPT."""
    model.value_head = Head(model.config.n_embd, n_outputs).to(next(model.parameters()).device)
    return model


# Texts --------------------------------------------------------------------------------------------

def extract_id(tokenizer):
    """Return the id of the extract token. Raises UserError without a line break."""
    _, end = ends_of_text(tokenizer)
    if end in tokenizer.special_tokens:
        return tokenizer.special_tokens[end]
    return tokenizer.encode('\n')[-1]


def encode_text(text, tokenizer, block_size):
    """Encode a text and the extract token; -> (ids, whether its start was cut).

    Special tokens in it are ordinary text. Raises UserError for characters without an id.
    """
    *_, (ids, start) = windows_of(text, tokenizer, block_size, is_whole=False)
    return ids, start > 0


def windows_of(text, tokenizer, block_size, is_whole=True):
    """Yield (ids, number of tokens before them) of the windows that cover a text.

    They overlap by half, the extract token ends each, and the last has the text's end; without
    is_whole only that one. Raises UserError for characters without an id.
    """
    begin, end = bos_ids(tokenizer), [extract_id(tokenizer)]
    ids = tokenizer.encode(text, allowed_special='none')
    room = block_size - len(begin) - len(end)
    last = max(0, len(ids) - room)
    for start in (*range(0, last if is_whole else 0, max(1, room // 2)), last):
        yield begin + ids[start : start + room] + end, start


def to_rows(sequences, device):
    """Stack lists of ids; -> ids (B, T), padded at the end, and lengths (B,)."""
    rows = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    return rows.to(device), torch.tensor([len(ids) for ids in sequences], device=device)


def logits_of(model, idx, lengths):
    """Return the logits of the classes: ids (B, T), lengths (B,) -> (B, K)."""
    return model.value_head(at_ends(model.hidden(idx), lengths))


def losses_of(model, idx, lengths, labels, with_lm):
    """Return logits (B, K), and summed cross-entropies of labels and of tokens.

    labels: (B,). The last is in nats over all tokens but the first of each row, the extract token
    included; 0 unless with_lm.
    """
    hidden = model.hidden(idx)
    logits = model.value_head(at_ends(hidden, lengths))
    task_loss = F.cross_entropy(logits, labels, reduction='sum')
    lm_loss = torch.zeros_like(task_loss)
    if with_lm:
        is_target = torch.arange(1, idx.size(1) + 1, device=idx.device) < lengths[:, None]
        targets = idx.roll(-1, 1).masked_fill(~is_target, -1)  # (B, T)
        mean = ops.head_cross_entropy(hidden, model.lm_head, targets, model.config.logit_softcap)
        lm_loss = mean * is_target.sum()
    return logits, task_loss, lm_loss


# Trained classifiers ------------------------------------------------------------------------------

@dataclass
class Classifier:
    """Hold a GPT with a head, in eval mode, and the names of its outputs."""

    model: GPT
    tokenizer: Any
    classes: list[str]
    line: str = ''  # describes it
    autocast: AbstractContextManager = nullcontext()

    def encode(self, text):
        """Encode a text as encode_text(); -> ids."""
        return encode_text(text, self.tokenizer, self.model.config.block_size)[0]

    def probabilities(self, texts, batch_size=16):
        """Return {label: probability} of each text. Raises UserError as encode_text()."""
        rows = self.of_rows(list(map(self.encode, texts)), batch_size)
        return [dict(zip(self.classes, row, strict=True)) for row in rows]

    @torch.no_grad()
    def of_rows(self, rows, batch_size=16):
        """Return the probabilities of the classes for n lists of ids, as n lists of K."""
        device, results = next(self.model.parameters()).device, [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
        for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            with self.autocast:
                logits = logits_of(self.model, *to_rows([rows[i] for i in batch], device))
            for i, row in zip(batch, logits.softmax(-1).tolist(), strict=True):
                results[i] = row
        return results

    def greatest(self, text, label):
        """Return the greatest probability of a label over all windows of a text."""
        windows = windows_of(text, self.tokenizer, self.model.config.block_size)
        column = self.classes.index(label)
        return max(row[column] for row in self.of_rows([ids for ids, _ in windows]))


def model_with_head(state, path, dropout=0.0, needed=entries.Labels):
    """Build a checkpoint's GPT with its head, on the CPU, adapters included.

    needed: the rule of its other entries. Raises UserError if it lacks one, or is no classifier.
    """
    if 'classes' not in state:
        raise UserError(f'{path} is {kind_of(state)}; expected a classifier, {TRAIN_ONE}')
    entries.check_content(state, needed, path)
    names, weights = ('value_head.weight', 'value_head.bias'), dict(state['model'])
    head = [weights.pop(name, torch.empty(0)) for name in names]
    trunk = {key: value for key, value in state.items() if key != 'classes'}
    model = add_head(model_of({**trunk, 'model': weights}, path, dropout), len(state['classes']))
    for name, weight, saved in zip(names, model.value_head.parameters(), head, strict=True):
        if weight.shape != saved.shape:
            raise UserError(f'{path}: {name} has shape {tuple(saved.shape)}, expected '
                            f'{tuple(weight.shape)} for {len(state["classes"])} classes; restore '
                            f'a copy')
        weight.data.copy_(saved)
    return model


def load(out_dir, device='cpu'):
    """Open the best classifier of a run of posttrain.classify. Raises UserError."""
    path = path_in(out_dir)
    if not os.path.exists(path):
        raise UserError(f'there is no classifier in {out_dir}; {TRAIN_ONE} --out_dir={out_dir}')
    state = checkpoint.load(path, part='model')
    model = model_with_head(state, path)
    check_finite(model, path)
    line = (f'{path}: step {state["iter_num"]}, {len(state["classes"])} classes, lowest val loss '
            f'so far {float(state["best_val_loss"]):.4f}')
    return Classifier(model.eval().to(device), tokenizer_of(state), state['classes'], line)


def load_label(setting, device='cpu'):
    """Open the classifier of a setting FOLDER:LABEL; -> (Classifier, label).

    Raises UserError for a folder or label that is missing.
    """
    folder, _, label = setting.rpartition(':')
    if os.path.isdir(setting) or not folder:
        raise UserError(f'{setting}: expected FOLDER:LABEL, a folder of posttrain.classify and one '
                        f'of its labels')
    classifier = load(folder, device)
    if label not in classifier.classes:
        raise UserError(f'{setting}: {folder} has no label {label!r}; expected one of '
                        f'{", ".join(classifier.classes[:20])}')
    return classifier, label
