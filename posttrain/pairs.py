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
import os

from configurator import UserError
from data import conversations, download
from data.documents import check_fraction, text_hash
from flatgpt import checkpoint, jsonl
from flatgpt.pretrained import open_model
from tokenizer import chat


def open_chat_model(init_from):
    """
    The model that is to learn from answers, of a run or of Hugging Face's: what checkpoint.open_model() gives, with
    chat.TEMPLATE where the model has no format of its own. ValueError if its tokenizer can't write that.
    """
    is_run = os.path.exists(checkpoint.path_in(init_from))
    model, tokenizer, template, line = open_model('resume' if is_run else init_from, init_from)
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
    check_fraction(val_fraction)
    pairs, n_too_long = {'train': [], 'val': []}, 0
    for number, value in jsonl.read_objects(path).items():
        try:
            pair = render_pair(value, template, tokenizer)
        except ValueError as error:
            raise UserError(f'{path}, line {number}: {error}') from None
        if max(len(ids) for ids, _ in pair) > block_size:
            n_too_long += 1
            continue
        asked = [(message['role'], message['content']) for message in value['messages']]
        group = json.dumps(asked if value.get('group') is None else value['group'])
        split = 'val' if text_hash(group) < val_fraction else 'train'
        pairs[split].append(pair)
    for split, found in pairs.items():
        if not found:
            n = sum(map(len, pairs.values()))
            raise UserError(f'of {n + n_too_long:,} pairs in {path} {n_too_long:,} are longer than the context of '
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
        raise UserError(f'val_fraction={val_fraction}, but {ckpt_path} held out {before["val_fraction"]}, so that it '
                         f'has learnt from pairs that would be held out now, or the other way round; resume with '
                         f'--val_fraction={before["val_fraction"]}, or begin anew in another --out_dir')
    if before['sha256'] != pairs['sha256']:
        raise UserError(f'{path} is not the file of pairs that {ckpt_path} has learnt from, some of which may be held '
                         f'out now; resume with that file as it was, or begin anew in another --out_dir')
    return pairs


def render_pair(value, template, tokenizer):
    """A pair as JSON has it -> (chosen, rejected), see read_pairs(). Raises ValueError for what is none."""
    for key, kind in (('messages', list), ('chosen', str), ('rejected', str)):
        if not isinstance(value.get(key), kind):
            raise UserError(f'{key} is {json.dumps(value.get(key))[:40]}; expected {{"messages": [{{"role": "user", '
                             f'"content": "2+2?"}}], "chosen": "4", "rejected": "5"}}')
    for key in ('chosen', 'rejected'):
        if not value[key].strip():
            raise UserError(f'{key} is empty; expected an answer')
    pair = tuple(render_answer(value['messages'], value[key], template, tokenizer) for key in ('chosen', 'rejected'))
    if pair[0] == pair[1]:  # or does so in the template, which may strip them
        raise UserError(f'chosen equals rejected, {json.dumps(value["chosen"])[:40]}; there is nothing to prefer')
    return pair


def render_answer(messages, answer, template, tokenizer):
    """
    A conversation, its last message not the assistant's, and an answer -> (ids, mask): all up to the token that ends
    the answer, and 1 for the answer's own tokens, that one included. Raises ValueError where there is none of either.
    """
    prompt = chat.render(messages, template, tokenizer)
    ids, mask = chat.render_conversation([*messages, {'role': 'assistant', 'content': answer}], template, tokenizer)
    if ids[: len(prompt)] != prompt:
        raise UserError('the chat template writes the conversation in another way once it is answered, or the '
                         'tokenizer joins an earlier answer with what stands around it, so that where this answer '
                         'begins can not be told; put special tokens around answers in the template')
    counted = [i for i, counts in enumerate(mask, 1) if counts and i > len(prompt)]
    if not counted:
        raise UserError(f'of the answer {json.dumps(answer)[:40]} the chat template leaves no token to learn from; '
                         f'expected {{% generation %}} around what the assistant says, or none in the template')
    # the last special token that is none of the content's own: behind it a template may have a line break
    own = (*chat.TOOL_TOKENS, *chat.THOUGHTS)
    specials = {i for token, i in tokenizer.special_tokens.items() if token not in own}
    end = max((i for i in counted if ids[i - 1] in specials), default=counted[-1])
    return ids[:end], [0] * len(prompt) + mask[len(prompt) : end]


# Rows ----------------------------------------------------------------------------------------------------------------


# Of a model ----------------------------------------------------------------------------------------------------------


def ending_of(template, tokenizer):
    """The id that ends an answer in this chat template. ValueError if that is no special token."""
    ids, _ = render_answer([{'role': 'user', 'content': '?'}], '!', template, tokenizer)
    if ids[-1] not in tokenizer.special_tokens.values():
        raise UserError('the chat template ends an answer with no special token that is learnt with it, so that there '
                         'is none at which an answer could be judged; expected one, and inside of {% generation %} if '
                         'the template has that')
    return ids[-1]
