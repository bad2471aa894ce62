import math

import torch
from torch.nn.utils.rnn import pad_sequence

from flatgpt.generate import Sampling, generate
from posttrain import losses
from posttrain.pairs import ending_of
from tokenizer import chat


def to_rows(conversations, device):
    """[(ids, mask), ...] -> ids (B, T) and the masks (B, T), of bool, padded behind with 0."""
    idx, mask = (pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
                 for rows in zip(*conversations, strict=True))
    return idx.to(device), mask.bool().to(device)


def pair_rows(pairs, device):
    """n pairs -> ids (2n, T) and masks (2n, T): the chosen answers, then the rejected ones in the same order."""
    return to_rows([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], device)


def lengths_of(mask):
    """Masks (N, T) -> the lengths of rows up to the last token that counts, (N,)."""
    return mask.size(1) - mask.flip(1).int().argmax(dim=1)


def draw_answers(model, prompts, max_new_tokens, stop_ids, n_ids, temperature, u):
    """
    One answer to each of the prompts, lists of ids, all as one batch; a prompt can be there several times. n_ids: of
    the tokenizer, those beyond are never drawn. u: (n, max_new_tokens) of [0, 1), which decide, see
    generate.uniforms(). -> lists of ids, each up to and with one of stop_ids, or of max_new_tokens
    """
    answers, is_done = [[] for _ in prompts], [False] * len(prompts)
    sampling = Sampling(max_new_tokens, temperature, n_ids=n_ids, stop_ids=stop_ids)
    for ids, _, ended in generate(model, list(prompts), sampling, u):
        for answer, i, was_done in zip(answers, ids[:, 0].tolist(), is_done, strict=True):
            if not was_done:
                answer.append(i)
        is_done = ended
    return answers


def logprobs_of(model, idx, mask, n_ids, temperature=1.0):
    """
    What draw_answers() drew from: the log-probabilities of the ids (B, T) where the mask (B, T) is 1, and the entropies
    of their distributions, (B, T - 1) both, of all but the first id; 0 where the mask is. Padding is behind, where
    nothing that counts sees it.
    """
    mask = mask[:, 1:]
    logits = model.logits(model.hidden(idx[:, :-1])[mask])  # from which the tokens that count came, (n, V)
    logits = logits[:, :n_ids].float() / temperature
    zeros = torch.zeros(mask.shape, device=idx.device)
    return (zeros.masked_scatter(mask, losses.token_logprobs(logits, idx[:, 1:][mask])),
            zeros.masked_scatter(mask, losses.entropy(logits)))


@torch.no_grad()
def scores_of(critic, prompts, answers, stop_ids, ending):
    """
    What a reward model says to answers that draw_answers() gave, (n,). An answer that was cut off, or that another
    token ended, is scored as if `ending` did, since at other tokens the reward model has not learnt to.
    """
    rows = [prompt + [i for i in answer if i not in stop_ids] + [ending]
            for prompt, answer in zip(prompts, answers, strict=True)]
    idx, _ = to_rows([(ids, ids) for ids in rows], critic.value_head.weight.device)
    return critic.scores(idx, torch.tensor([len(ids) for ids in rows], device=idx.device))


@torch.no_grad()
def ratings_of(critic, messages, texts, template, tokenizer):
    """
    What a reward model says to texts with which a model answered a conversation, a list of numbers: -inf to an empty
    one, and to one that is too long for its context. Whatever a model may write, also calls that it did not finish, is
    scored.
    """
    prompt, scores = chat.render(messages, template, tokenizer), [-math.inf] * len(texts)
    rows = {i: tokenizer.encode(text, allowed_special='all') for i, text in enumerate(texts) if text.strip()}
    rows = {i: ids for i, ids in rows.items() if len(prompt) + len(ids) < critic.config.block_size}  # and the ending
    if rows:
        stop_ids, _ = chat.find_endings(template, tokenizer)
        found = scores_of(critic, [prompt] * len(rows), rows.values(), stop_ids, ending_of(template, tokenizer))
        for i, score in zip(rows, found.tolist(), strict=True):
            scores[i] = score
    return scores
