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
            'system': 'system', 'developer': 'system', 'tool': 'tool', 'function_response': 'tool',
            'observation': 'tool'}
OPENAI = {'developer': 'system', 'function': 'tool'}  # other roles stay
WEIGHTS = ('weight', 'loss', 'train', 'training')  # a message with one of them, 0 or false: no loss
BESIDE = ('tool_calls', 'function_call', 'reasoning_content', 'reasoning', 'thinking', 'refusal',
          'images', 'image', 'audio')  # what else a message may say
READ = ('messages', 'conversations', 'system')
READ_IN_MESSAGES = ('role', 'from', 'content', 'value', *WEIGHTS, *BESIDE)


@dataclass
class Packing:
    """Hold the tokenizer, template and row length for packing conversations."""

    tokenizer: Any
    template: str  # the chat template, in Jinja
    row: int       # tokens of a row: the context and one


def messages_of(value):
    """Return the messages of a JSON object in the shape of OpenAI or ShareGPT.

    OpenAI: {"messages": [{"role", "content"}, ...]}. ShareGPT: {"conversations": [{"from",
    "value"}, ...]}. "system" beside either is the first message. An answer with a "weight" of 0, or
    "loss" or "train" false, has a weight of 0. Raises UserError for another shape, an unknown role,
    and for calls of tools, images and others beside the text.
    """
    turns = one_of(READ[:2], value, 'a conversation')
    if not isinstance(turns, list):
        raise UserError(f'no conversation; expected "messages" or "conversations", a list, but '
                        f'the object has {", ".join(map(repr, value)) or "no keys"}')
    messages = [{'role': 'system', 'content': value['system']}] if value.get('system') else []
    return messages + list(map(read_message, turns))


def one_of(keys, value, name):
    """Return the entry of a dict under the only one of `keys` that it has, or None.

    Raises UserError, with the `name` of the dict, if it has several.
    """
    present = [key for key in keys if value.get(key) is not None]
    if len(present) > 1:
        raise UserError(f'{name} has {" and ".join(present)}; expected one of them')
    return value[present[0]] if present else None


def read_message(message):
    """Return a message as {'role', 'content'}, and a weight that is not 1.

    message: of OpenAI or ShareGPT.
    """
    # a table has null in place of what is missing
    turn = ({key: value for key, value in message.items() if value is not None}
            if isinstance(message, dict) else {})
    role = turn.get('role', turn.get('from'))
    if not isinstance(role, str) or 'role' not in turn and role not in SHAREGPT:
        raise UserError(f'{json.dumps(message, default=str)[:60]} is not a turn; expected from, '
                        f'one of {", ".join(SHAREGPT)}, and a value, such as '
                        f'{{"from": "human", "value": "Hello"}}, or role and content')
    for keys in (('role', 'from'), ('content', 'value')):
        if all(turn.get(key) for key in keys):
            raise UserError(f'a message has {" and ".join(keys)}; expected one of them')
    for key in BESIDE:
        if turn.get(key):
            raise UserError(f'a message has {key}, {json.dumps(turn[key], default=str)[:40]}, '
                            f'beside its content; write that into the content, in the words that '
                            f'the model is to learn, or remove it')
    weights = [turn[key] for key in WEIGHTS if turn.get(key, 1) != 1]
    return {'role': (OPENAI if 'role' in turn else SHAREGPT).get(role, role),
            'content': text_of(turn.get('content', turn.get('value')))} | (
            {'weight': weights[0] or 0} if weights else {})


def text_of(content):
    """Join OpenAI's list of parts into one text. Raises UserError."""
    if isinstance(content, str | None):
        return content  # chat.check_conversation() refuses None
    if not isinstance(content, list):
        raise UserError(f'a content is no text: {json.dumps(content, default=str)[:60]}; expected '
                        f'a text, or a list of parts')
    parts = [part if isinstance(part, dict) else {'text': part} for part in content]
    texts = [part.get('text') for part in parts]
    for part, text in zip(parts, texts, strict=True):
        is_text = str(part.get('type') or 'text').endswith('text')  # input_text, output_text
        others = [key for key in part if key not in ('type', 'text') and part[key]]
        others += [key for key in WEIGHTS if part.get(key, 1) != 1]
        if not isinstance(text, str) or not is_text or others:
            raise UserError(f'a part of a content is no text: '
                            f'{json.dumps(part, default=str)[:60]}; expected '
                            f'{{"type": "text", "text": "Hello"}}')
    return ''.join(texts)


def unread_keys(value) -> set[str]:
    """Return the keys of a conversation that messages_of() does not read."""
    return ({key for key in value if key not in READ and value[key] is not None}
            | {key for turns in map(value.get, READ[:2]) if isinstance(turns, list)
               for turn in turns if isinstance(turn, dict)
               for key in turn if key not in READ_IN_MESSAGES and turn[key] is not None})


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
        encode.note_replaced(out_dir, meta)
        encode.publish(out_dir, [], files)
    finally:
        encode.remove_unfinished(out_dir)
        unlock(lock)
    for split, counts in packed.items():
        n = counts['tokens']
        print(f'{split:5}  {counts["conversations"]:,} conversations in {n // row:,} rows of '
              f'{row} tokens: {counts["targets"] / n:.0%} carry loss, '
              f'{counts["padding"] / n:.1%} fill up')
