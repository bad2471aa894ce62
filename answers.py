"""
Answers to conversations: read from preference pairs or drawn from a model, as rows of ids with a mask; how likely a
model finds them, and how good a reward model.

    {"messages": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5"}

    model, tokenizer, template, line = open_chat_model('out-sft')
    pairs, n_too_long = read_pairs('pairs.jsonl', template, tokenizer, block_size=256, val_fraction=0.1)
    idx, mask = to_rows([pairs['train'][i] for i in (3, 1, 4)], device)

    answers = draw_answers(model, prompts, max_new_tokens, stop_ids, n_ids, temperature=1.0, u=u)
    logprobs, entropies = logprobs_of(model, idx, mask, n_ids)
"""

import json
import math
import os

import torch
from torch.nn.utils.rnn import pad_sequence

import chat
import checkpoint
import conversations
import corpus
import download
import jsonl
import losses
from generate import generate


def open_chat_model(init_from):
    """
    The model that is to learn from answers, of a run or of Hugging Face's: what checkpoint.open_model() gives, with
    chat.TEMPLATE where the model has no format of its own. ValueError if its tokenizer can't write that.
    """
    is_run = os.path.exists(checkpoint.path_in(init_from))
    model, tokenizer, template, line = checkpoint.open_model('resume' if is_run else init_from, init_from)
    if template is None:
        template = chat.TEMPLATE
        conversations.check_tokenizer(tokenizer, f'the tokenizer of {init_from}')
    return model, tokenizer, template, line


# Pairs ---------------------------------------------------------------------------------------------------------------


def read_pairs(path, template, tokenizer, block_size, val_fraction):
    """
    -> ({'train': pairs, 'val': pairs}, how many were left out because they do not fit into block_size). A pair is
    (chosen, rejected), each of them (ids, mask) of render_answer(). All pairs of a conversation are in the same split,
    chosen by its content; or all with the same "group", where they have one. Raises ValueError naming the line that is
    no pair, and if a split is empty.
    """
    corpus.check_fraction(val_fraction)
    pairs, n_too_long = {'train': [], 'val': []}, 0
    for number, value in jsonl.read_objects(path).items():
        try:
            pair = render_pair(value, template, tokenizer)
        except ValueError as error:
            raise ValueError(f'{path}, line {number}: {error}') from None
        if max(len(ids) for ids, _ in pair) > block_size:
            n_too_long += 1
            continue
        asked = [(message['role'], message['content']) for message in value['messages']]
        group = json.dumps(asked if value.get('group') is None else value['group'])
        split = 'val' if corpus.text_hash(group) < val_fraction else 'train'
        pairs[split].append(pair)
    for split, found in pairs.items():
        if not found:
            n = sum(map(len, pairs.values()))
            raise ValueError(f'of {n + n_too_long:,} pairs in {path} {n_too_long:,} are longer than the context of '
                             f'{block_size} tokens, and of the others none is in {split}; give more of them, a model '
                             f'with a longer context, or another --val_fraction')
    return pairs, n_too_long


def check_pairs(path, val_fraction, state, ckpt_path):
    """
    What a checkpoint says of the pairs, {'sha256', 'val_fraction'}. state: of a run that goes on, or None. Raises
    ValueError if that had others, or held out others: it has learnt from what would be held out now.
    """
    pairs = {'sha256': download.file_sha256(path), 'val_fraction': val_fraction}
    before = state.get('pairs', pairs) if state else pairs
    if before['val_fraction'] != val_fraction:
        raise ValueError(f'val_fraction={val_fraction}, but {ckpt_path} held out {before["val_fraction"]}, so that it '
                         f'has learnt from pairs that would be held out now, or the other way round; resume with '
                         f'--val_fraction={before["val_fraction"]}, or begin anew in another --out_dir')
    if before['sha256'] != pairs['sha256']:
        raise ValueError(f'{path} is not the file of pairs that {ckpt_path} has learnt from, some of which may be held '
                         f'out now; resume with that file as it was, or begin anew in another --out_dir')
    return pairs


def render_pair(value, template, tokenizer):
    """A pair as JSON has it -> (chosen, rejected), see read_pairs(). Raises ValueError for what is none."""
    for key, kind in (('messages', list), ('chosen', str), ('rejected', str)):
        if not isinstance(value.get(key), kind):
            raise ValueError(f'{key} is {json.dumps(value.get(key))[:40]}; expected {{"messages": [{{"role": "user", '
                             f'"content": "2+2?"}}], "chosen": "4", "rejected": "5"}}')
    for key in ('chosen', 'rejected'):
        if not value[key].strip():
            raise ValueError(f'{key} is empty; expected an answer')
    pair = tuple(render_answer(value['messages'], value[key], template, tokenizer) for key in ('chosen', 'rejected'))
    if pair[0] == pair[1]:  # or does so in the template, which may strip them
        raise ValueError(f'chosen equals rejected, {json.dumps(value["chosen"])[:40]}; there is nothing to prefer')
    return pair


def render_answer(messages, answer, template, tokenizer):
    """
    A conversation, its last message not the assistant's, and an answer -> (ids, mask): all up to the token that ends
    the answer, and 1 for the answer's own tokens, that one included. Raises ValueError where there is none of either.
    """
    prompt = chat.render(messages, template, tokenizer)
    ids, mask = chat.render_conversation([*messages, {'role': 'assistant', 'content': answer}], template, tokenizer)
    if ids[: len(prompt)] != prompt:
        raise ValueError('the chat template writes the conversation in another way once it is answered, or the '
                         'tokenizer joins an earlier answer with what stands around it, so that where this answer '
                         'begins can not be told; put special tokens around answers in the template')
    counted = [i for i, counts in enumerate(mask, 1) if counts and i > len(prompt)]
    if not counted:
        raise ValueError(f'of the answer {json.dumps(answer)[:40]} the chat template leaves no token to learn from; '
                         f'expected {{% generation %}} around what the assistant says, or none in the template')
    # the last special token that is none of the content's own: behind it a template may have a line break
    own = (*chat.TOOL_TOKENS, *chat.THOUGHTS)
    specials = {i for token, i in tokenizer.special_tokens.items() if token not in own}
    end = max((i for i in counted if ids[i - 1] in specials), default=counted[-1])
    return ids[:end], [0] * len(prompt) + mask[len(prompt) : end]


# Rows ----------------------------------------------------------------------------------------------------------------


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


# Of a model ----------------------------------------------------------------------------------------------------------


def draw_answers(model, prompts, max_new_tokens, stop_ids, n_ids, temperature, u):
    """
    One answer to each of the prompts, lists of ids, all as one batch; a prompt can be there several times. n_ids: of
    the tokenizer, those beyond are never drawn. u: (n, max_new_tokens) of [0, 1), which decide, see
    generate.uniforms(). -> lists of ids, each up to and with one of stop_ids, or of max_new_tokens
    """
    answers, is_done = [[] for _ in prompts], [False] * len(prompts)
    for ids, _, ended in generate(model, list(prompts), max_new_tokens, temperature, vocab_size=n_ids, u=u,
                                  stop_ids=stop_ids):
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


def ending_of(template, tokenizer):
    """The id that ends an answer in this chat template. ValueError if that is no special token."""
    ids, _ = render_answer([{'role': 'user', 'content': '?'}], '!', template, tokenizer)
    if ids[-1] not in tokenizer.special_tokens.values():
        raise ValueError('the chat template ends an answer with no special token that is learnt with it, so that there '
                         'is none at which an answer could be judged; expected one, and inside of {% generation %} if '
                         'the template has that')
    return ids[-1]


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
