"""Conversations in, rows of tokens out: what corpus.py is for documents, for data/chat and data/tiny_chat.

    messages = messages_of({'conversations': [{'from': 'human', 'value': 'Hello'}, ...]})
    ids, mask, was_cut = render(messages, template, tokenizer, row=257)
    write_dataset(out_dir, {'train': [(ids, mask), ...], 'val': [...]}, tokenizer, template, row=257)
"""

import bisect
import json
import os
import numpy as np
from tokenizer import chat
import tokenizer as tokenizers
from data import encode
from flatgpt.files import lock_folder, remove, sync_folder, unlock, write_synced
from configurator import UserError


SHAREGPT = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant', 'system': 'system',
            'tool': 'tool', 'function_response': 'tool'}


def messages_of(value):
    """
    The messages of a JSON object in OpenAI's shape, {"messages": [{"role", "content"}, ...]}, or ShareGPT's,
    {"conversations": [{"from", "value"}, ...]}, there with "system" beside them or not. A message may have a "weight",
    0 for an answer that carries no loss. ValueError for neither, for a role of ShareGPT's that isn't known, and for
    calls of tools beside the content, without which it would be another conversation.
    """
    if 'messages' in value:
        messages = value['messages']
        if not isinstance(messages, list):
            return messages
        for message in messages:
            if isinstance(message, dict) and (call := message.get('tool_calls') or message.get('function_call')):
                raise UserError(f'an answer calls a tool, {json.dumps(call)[:40]}, beside its content; write the call '
                                 f'into the content, in the words that the model is to learn')
        # in one order, and without what else there may be, such as names
        return [{key: message[key] for key in ('role', 'content', 'weight') if has(message, key)}
                if isinstance(message, dict) else message for message in messages]
    if not isinstance(value.get('conversations'), list):
        raise UserError(f'no conversation; expected "messages" or "conversations", a list, but it has '
                         f'{", ".join(map(repr, value)) or "nothing"}')
    messages = [{'role': 'system', 'content': value['system']}] if value.get('system') else []
    for turn in value['conversations']:
        who = turn.get('from') if isinstance(turn, dict) else None
        if not isinstance(who, str) or who not in SHAREGPT:
            raise UserError(f'{json.dumps(turn)[:60]} is no turn; expected from, one of {", ".join(SHAREGPT)}, and a '
                             f'value, such as {{"from": "human", "value": "Hello"}}')
        messages.append({'role': SHAREGPT[who], 'content': turn.get('value'),
                         **({'weight': turn['weight']} if has(turn, 'weight') else {})})
    return messages


def has(message, key):
    """Whether a message has a key that says something; a weight of 1 is what all have that have none."""
    return key in message and (key != 'weight' or message[key] not in (None, 1))


def check_tokenizer(tokenizer, name):
    """ValueError unless the tokenizer has the special tokens of chat.TEMPLATE."""
    missing = [token for token in chat.SPECIAL_TOKENS if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(f'{name} has no {", ".join(missing)}, which the format of chat.py needs; train a tokenizer '
                         f'that has them:\n  python -m tokenizer train --input=FILE '
                         f"--special_tokens='{','.join(chat.SPECIAL_TOKENS)}' --out=chat.json\n"
                         f'or write a format that does without: --template=FILE')


def render(messages, template, tokenizer, row):
    """
    chat.render_conversation(), cut to a row: -> (ids, mask, whether it was cut). ValueError also if no token that
    carries loss is left; nothing precedes the first of a row, so that can't.
    """
    ids, mask = chat.render_conversation(messages, template, tokenizer)
    if not any(mask):
        raise UserError('no token of it carries loss; expected an answer whose "weight" is not 0, and inside of '
                         '{% generation %} if the chat template has that')
    if not any(mask[1:row]):
        raise UserError(f'cut to {row} of its {len(ids)} tokens, it ends before the first answer that carries loss; '
                         f'make longer rows, --block_size={len(ids) - 1}, if the context of the model has room')
    return ids[:row], mask[:row], len(ids) > row


def pack(lengths, row):
    """
    Lengths of conversations, none above `row` -> lists of their indices, one for each row: best fit, the longest first
    ("Fewer Truncations Improve Language Modeling", Ding et al. 2024), which takes at most 11/9 of the fewest rows and 4
    (Johnson 1973).
    """
    rows, free = [], []  # free: (tokens left, number of the row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[i], -1))  # the fullest row with room
        left, number = free.pop(at) if at < len(free) else (row, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(i)
        bisect.insort(free, (left - lengths[i], number))
    return rows


def fill(conversations, row, padding):
    """
    [(ids, mask), ...] -> the ids and masks of all rows, (rows, row). Attention and positions go on from a conversation
    to the next one of its row, as in pretraining. The first token of each has no loss even where its mask is 1: what
    precedes it is another conversation, or nothing.
    """
    rows = pack([len(ids) for ids, _ in conversations], row)
    all_ids, all_masks = np.full((len(rows), row), padding, np.int64), np.zeros((len(rows), row), np.uint8)
    for number, members in enumerate(rows):
        start = 0
        for i in sorted(members):
            ids, mask = conversations[i]
            all_ids[number, start : start + len(ids)] = ids
            all_masks[number, start + 1 : start + len(ids)] = mask[1:]
            start += len(ids)
    return all_ids, all_masks


def write_dataset(out_dir, conversations, tokenizer, template, row, **described):
    """
    Write {'train': [(ids, mask), ...], 'val': ...} as a dataset that dataloader.py reads as Rows, whole or not at all,
    and print what it is. described: what else meta.json says. Raises ValueError if a split is empty.
    """
    for split, found in conversations.items():
        if not found:
            raise UserError(f'of {sum(map(len, conversations.values())):,} conversations none is in {split}; give '
                             f'more of them, or another --val_fraction')
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    padding = tokenizer.eot if tokenizer.eot is not None else 0
    packed, files = {}, {}
    for split, found in conversations.items():
        ids, masks = fill(found, row, padding)
        files[f'{split}_mask.bin'], files[f'{split}.bin'] = masks.tobytes(), ids.astype(dtype).tobytes()
        packed[split] = {'conversations': len(found), 'tokens': ids.size, 'targets': int(masks.sum()),
                         'padding': ids.size - sum(len(ids) for ids, _ in found)}
    meta = {'version': 2, 'dtype': dtype.name, 'vocab_size': tokenizer.vocab_size, 'row': row,
            'tokens': {split: counts['tokens'] for split, counts in packed.items()}, 'packed': packed, **described,
            'chat_template': template, 'tokenizer': tokenizer.to_dict()}
    files['meta.json'] = (json.dumps(meta, indent=1) + '\n').encode()
    os.makedirs(out_dir, exist_ok=True)
    lock = lock_folder(out_dir)
    temporary = {name: encode.temporary(out_dir, name) for name in files}
    try:
        for name, content in files.items():
            write_synced(temporary[name], content)
        remove([os.path.join(out_dir, 'train.bin')])  # the sign that a dataset is complete: goes first, comes last
        for name in sorted(files, key=lambda name: name == 'train.bin'):
            os.replace(temporary[name], os.path.join(out_dir, name))
        sync_folder(out_dir)
    finally:
        remove(temporary.values())
        unlock(lock)
    for split, counts in packed.items():
        n = counts['tokens']
        print(f'{split:5}  {counts["conversations"]:,} conversations in {n // row:,} rows of {row} tokens: '
              f'{counts["targets"] / n:.0%} carry loss, {counts["padding"] / n:.1%} fill up')
