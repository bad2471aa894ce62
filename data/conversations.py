"""Turn conversations into rows of tokens with a loss mask.

    messages = messages_of({'conversations': [{'from': 'human', 'value': 'Hello'}, ...]})
    packing = Packing(tokenizer, template, row=257)
    ids, mask, is_cut = render(messages, packing)
    write_dataset(out_dir, {'train': [(ids, mask, is_cut), ...], 'val': [...]}, packing)
"""

import bisect
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

import tokenizer as tokenizers
from configurator import UserError
from data import encode
from flatgpt.files import lock_folder, unlock
from tokenizer import chat

SHAREGPT = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'assistant': 'assistant',
            'system': 'system', 'tool': 'tool', 'function_response': 'tool'}


@dataclass
class Packing:
    """Hold the tokenizer, template and row length for packing conversations."""

    tokenizer: Any
    template: str  # the chat template, in Jinja
    row: int       # tokens of a row: the context and one


def messages_of(value):
    """Return the messages of a JSON object in the shape of OpenAI or ShareGPT.

    OpenAI: {"messages": [{"role", "content"}, ...]}. ShareGPT: {"conversations": [{"from",
    "value"}, ...]}, perhaps with "system". "weight": 0 marks an answer without loss. Raises
    UserError for another shape, an unknown role, and calls of tools outside the content.
    """
    if 'messages' in value:
        messages = value['messages']  # chat.check_conversation() refuses what is no list
        return list(map(read_message, messages)) if isinstance(messages, list) else messages
    if not isinstance(value.get('conversations'), list):
        raise UserError(f'no conversation; expected "messages" or "conversations", a list, but '
                        f'the object has {", ".join(map(repr, value)) or "no keys"}')
    messages = [{'role': 'system', 'content': value['system']}] if value.get('system') else []
    for turn in value['conversations']:
        role = turn.get('from') if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in SHAREGPT:
            raise UserError(f'{json.dumps(turn)[:60]} is not a turn; expected from, one of '
                            f'{", ".join(SHAREGPT)}, and a value, such as '
                            f'{{"from": "human", "value": "Hello"}}')
        messages.append({'role': SHAREGPT[role], 'content': turn.get('value'), **weight_of(turn)})
    return messages


def read_message(message):
    """Return an OpenAI message with its keys in one order, without names."""
    if not isinstance(message, dict):
        return message  # chat.check_conversation() refuses it
    if call := message.get('tool_calls') or message.get('function_call'):
        raise UserError(f'an answer calls a tool, {json.dumps(call)[:40]}, beside its content; '
                        f'write the call into the content, in the words that the model is to learn')
    return ({key: message[key] for key in ('role', 'content') if key in message}
            | weight_of(message))


def weight_of(message):
    """Return {'weight': w}, or {} for a weight of 1, which is the default."""
    weight = message.get('weight')
    return {} if weight in (None, 1) else {'weight': weight}


def check_tokenizer(tokenizer, name):
    """Raise UserError unless the tokenizer has the special tokens of chat.TEMPLATE."""
    missing = [token for token in chat.SPECIAL_TOKENS if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(f'{name} has no {", ".join(missing)}, which the default chat template '
                        f'needs; train a tokenizer that has them:\n'
                        f'  python -m tokenizer train --input=FILE '
                        f"--special_tokens='{','.join(chat.SPECIAL_TOKENS)}' --out=chat.json\n"
                        f'or use a template without them: --template=FILE')


def render(messages, packing):
    """Render a conversation, cut to a row; -> (ids, loss mask, whether it was cut).

    Raises UserError if no token with loss is left. The first token never has loss, because
    nothing precedes it.
    """
    ids, mask = chat.render_conversation(messages, packing.template, packing.tokenizer)
    row = packing.row
    if not any(mask):
        raise UserError('no token carries loss; expected an answer whose "weight" is not 0, '
                        'inside {% generation %} if the chat template has that')
    if not any(mask[1:row]):
        raise UserError(f'cut to {row} of its {len(ids)} tokens, it ends before the first answer '
                        f'that carries loss; make longer rows, --block_size={len(ids) - 1}, if '
                        f'the context of the model has room')
    return ids[:row], mask[:row], len(ids) > row


def pack(lengths, row):
    """Pack lengths, none above `row`, into rows; -> a list of indices for each row.

    Best fit, the longest first ("Fewer Truncations Improve Language Modeling", Ding et al. 2024).
    It takes at most 11/9 of the fewest rows, and 4 (Johnson 1973).
    """
    rows, free = [], []  # free: (tokens left, number of the row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(free, (lengths[i], -1))  # the fullest row with room
        left, number = free.pop(place) if place < len(free) else (row, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(i)
        bisect.insort(free, (left - lengths[i], number))
    return rows


def fill(conversations, row, padding):
    """Pack [(ids, mask), ...] into rows; -> (ids, loss masks), each (rows, row).

    Attention and positions run on from a conversation to the next one of its row, as in
    pretraining. The first token of each has no loss: another conversation precedes it, or nothing.
    """
    rows = pack([len(ids) for ids, _ in conversations], row)
    all_ids = np.full((len(rows), row), padding, np.int64)
    all_masks = np.zeros((len(rows), row), np.uint8)
    for number, members in enumerate(rows):
        start = 0
        for i in sorted(members):
            ids, mask = conversations[i]
            all_ids[number, start : start + len(ids)] = ids
            all_masks[number, start + 1 : start + len(ids)] = mask[1:]
            start += len(ids)
    return all_ids, all_masks


def write_dataset(out_dir, conversations, packing, **described):
    """Write {'train': [render()'s, ...], 'val': ...} as a dataset, and print it.

    data/tokens.py reads it as Rows. described: further entries of meta.json. Raises UserError if a
    split is empty.
    """
    tokenizer, row = packing.tokenizer, packing.row
    dtype = tokenizers.id_dtype(tokenizer.vocab_size)
    padding = tokenizer.eot if tokenizer.eot is not None else 0
    if n_cut := sum(is_cut for rendered in conversations.values() for *_, is_cut in rendered):
        print(f'{n_cut:,} conversations are cut at the end of their row; longer rows: --block_size',
              file=sys.stderr)
    packed, files = {}, {}
    for split, rendered in conversations.items():
        if not rendered:
            raise UserError(f'none of {sum(map(len, conversations.values())):,} conversations is '
                            f'in {split}; give more of them, or another --val_fraction')
        ids, masks = fill([(ids, mask) for ids, mask, _ in rendered], row, padding)
        files[f'{split}_mask.bin'] = masks.tobytes()
        files[f'{split}.bin'] = ids.astype(dtype).tobytes()
        packed[split] = {'conversations': len(rendered), 'tokens': ids.size,
                         'targets': int(masks.sum()),
                         'padding': ids.size - sum(len(ids) for ids, *_ in rendered)}
    meta = {'version': 2, 'dtype': dtype.name, 'vocab_size': tokenizer.vocab_size, 'row': row,
            'tokens': {split: counts['tokens'] for split, counts in packed.items()},
            'packed': packed, **described, 'chat_template': packing.template,
            'tokenizer': tokenizer.to_dict()}
    files['meta.json'] = (json.dumps(meta, indent=1) + '\n').encode()
    os.makedirs(out_dir, exist_ok=True)
    lock = lock_folder(out_dir)
    try:
        encode.publish(out_dir, [], files)
    finally:
        encode.remove_unfinished(out_dir)
        unlock(lock)
    for split, counts in packed.items():
        n = counts['tokens']
        print(f'{split:5}  {counts["conversations"]:,} conversations in {n // row:,} rows of '
              f'{row} tokens: {counts["targets"] / n:.0%} carry loss, '
              f'{counts["padding"] / n:.1%} fill up')
