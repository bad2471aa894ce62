"""Draw answers from a model, as rows of ids, and compute their log-probabilities.

    answers = draw_answers(model, prompts, Sampling(64, n_ids=n_ids, stop_ids=stop_ids), u)
    idx, mask = to_rows([(ids, mask), ...], device)
    logprobs, entropies = logprobs_of(model, idx, mask, n_ids)
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from flatgpt.generate import generate
from posttrain import losses


def draw_answers(model, prompts, sampling, u):
    """Draw one answer to each prompt, all as one batch. A prompt may occur repeatedly.

    u: (n, max_new_tokens) in [0, 1), fixes the draws, see generate.uniforms(). -> lists of ids,
    each up to and including one of stop_ids, or of max_new_tokens ids.
    """
    answers, is_done = [[] for _ in prompts], [False] * len(prompts)
    for ids, _, ended in generate(model, list(prompts), sampling, u):
        for answer, next_id, was_done in zip(answers, ids[:, 0].tolist(), is_done, strict=True):
            if not was_done:
                answer.append(next_id)
        is_done = ended
    return answers


def to_rows(sequences, device):
    """Stack [(ids, mask), ...] into ids and bool masks (B, T), padded at the end."""
    idx, mask = (pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
                 for rows in zip(*sequences, strict=True))
    return idx.to(device), mask.bool().to(device)


def lengths_of(mask):
    """Return each row's length up to its last masked-in token: (B, T) -> (B,)."""
    return mask.size(1) - mask.flip(1).int().argmax(dim=1)


def micro_batches(rows, lengths, size, world=None):
    """Split rows into parts of at most `size` and of similar lengths: little padding.

    rows: row numbers (n,); lengths: of all rows. world: None for all rows, else this process gets
    its share, of about the lengths of the others'. -> [(row numbers, longest length), ...]
    """
    if world and world.size > 1:  # a stable sort has one result, whatever the machine
        rows = rows[lengths[rows].argsort(stable=True)][world.rank :: world.size]
    parts = rows[lengths[rows].argsort()].split(size)
    return [(part, int(lengths[part].max())) for part in parts if len(part)]


def logprobs_of(model, idx, mask, n_ids, temperature=1.0):
    """Return log-probabilities of masked-in ids, and their distributions' entropies.

    Both are (B, T - 1), for all ids but the first, and 0 outside the mask. The distributions are
    those that draw_answers() draws from. idx, mask: (B, T), padded at the end.
    """
    mask = mask[:, 1:]
    logits = model.logits(model.hidden(idx[:, :-1])[mask])  # (n, V), n masked-in tokens
    logits = logits[:, :n_ids].float() / temperature
    zeros = torch.zeros(mask.shape, device=idx.device)
    return (zeros.masked_scatter(mask, losses.token_logprobs(logits, idx[:, 1:][mask])),
            zeros.masked_scatter(mask, losses.entropy(logits)))
