"""Read preference pairs: two answers to a conversation, as rows of ids and masks.

    {"messages": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5"}

TRL's shapes are read too: "prompt", a text or messages, in place of "messages", and "chosen" and
"rejected" as messages, with the conversation before them or without.

    pairs = read_pairs('pairs.jsonl', template, tokenizer, 256, val_fraction=0.1)
    idx, mask = pair_rows([pairs['train'][i] for i in (3, 1, 4)], device)
"""

import json

from configurator import UserError
from data import download
from data.conversations import messages_of, one_of, read_message
from data.documents import read_records, text_hash
from posttrain.rollouts import to_rows
from tokenizer import chat

EXAMPLE = '{"messages": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5"}'


def read_pairs(path, template, tokenizer, block_size, val_fraction):
    """Read pairs and print their number; -> {'train': pairs, 'val': pairs}.

    A pair is (chosen, rejected), each (ids, mask) of render_answer(); one longer than block_size is
    left out. A hash of the conversation picks the split, so all pairs of a conversation are on one
    side. "group", if given, replaces the conversation. Raises UserError naming the line of a bad
    pair, or if a split is empty.
    """
    pairs, n_too_long = {'train': [], 'val': []}, 0
    for where, record in read_records(path):
        try:
            record = to_pair(record)
            pair = render_pair(record, template, tokenizer)
        except ValueError as error:
            raise UserError(f'{where}: {error}') from None
        if max(len(ids) for ids, _ in pair) > block_size:
            n_too_long += 1
            continue
        turns = [(message['role'], message['content']) for message in record['messages']]
        group = json.dumps(turns if record.get('group') is None else record['group'],
                           default=str)
        pairs['val' if text_hash(group) < val_fraction else 'train'].append(pair)
    n_pairs = n_too_long + sum(map(len, pairs.values()))
    for split in pairs:
        if not pairs[split]:
            raise UserError(f'{path}: of {n_pairs:,} pairs {n_too_long:,} are longer than the '
                            f'context of {block_size} tokens, and none of the others is in '
                            f'{split}; add pairs, or set another --val_fraction')
    print(f'{len(pairs["train"]):,} pairs to learn from, {len(pairs["val"]):,} held out'
          + f'; {n_too_long:,} are longer than {block_size} tokens, left out' * (n_too_long > 0))
    return pairs


def check_pairs(path, val_fraction, state, ckpt_path):
    """Return {'sha256', 'val_fraction'} of the pairs, for the checkpoint.

    state: the checkpoint that a run resumes, or {}. Raises UserError if that run learned from other
    pairs or held out another share: it may have learned from pairs that are now held out.
    """
    pairs = {'sha256': download.file_sha256(path), 'val_fraction': val_fraction}
    before = state.get('pairs', pairs)
    if before['val_fraction'] != val_fraction:
        raise UserError(f'val_fraction={val_fraction}, but {ckpt_path} held out '
                        f'{before["val_fraction"]}; resume with --val_fraction='
                        f'{before["val_fraction"]}, or start a new run in another --out_dir')
    if before['sha256'] != pairs['sha256']:
        raise UserError(f'{path} is not the file of pairs that {ckpt_path} learned from; resume '
                        f'with that file, or start a new run in another --out_dir')
    return pairs


def to_pair(record):
    """Return a pair, in one of TRL's shapes too, as EXAMPLE. Raises UserError."""
    answers = [record.get(key) for key in ('chosen', 'rejected')]
    for key, answer in zip(('chosen', 'rejected'), answers, strict=True):
        if not answer and answer != '' or not isinstance(answer, str | list | dict):
            raise UserError(f'{key} is {json.dumps(answer, default=str)[:40]}; expected {EXAMPLE}')
    # a dataset with the whole conversations in chosen and rejected may have one in "messages" too
    is_whole = isinstance(answers[0], list) and read_message(answers[0][0])['role'] != 'assistant'
    keys = ('prompt', 'conversations') if is_whole else ('messages', 'conversations', 'prompt')
    before = conversation_before(record, keys, 'a pair')
    if before is None and not is_whole:
        raise UserError(f'there is no conversation before chosen and rejected, only '
                        f'{", ".join(record)}; expected {EXAMPLE}, or "prompt"')
    before = before or messages_of({'messages': [], 'system': record.get('system')})
    whole = []
    for answer in answers:
        turns = messages_of({'messages': [{'role': 'assistant', 'content': answer}]
                             if isinstance(answer, str) else
                             [answer] if isinstance(answer, dict) else answer})
        if turns[0]['role'] == 'assistant':
            turns = before + turns
        elif not any(turns[i : i + len(before)] == before for i in range(len(turns))):
            raise UserError('chosen or rejected has messages before its answer that are not those '
                            'of "prompt"; expected the answer alone, or all of "prompt" and the '
                            'answer')
        if 'weight' in turns[-1]:
            raise UserError('chosen or rejected has a weight; pairs have none: leave out the pair')
        whole.append(turns)
    if whole[0][:-1] != whole[1][:-1]:
        raise UserError('chosen and rejected differ before their last message; expected two '
                        'answers to one conversation')
    if any(turns[-1]['role'] != 'assistant' for turns in whole):
        raise UserError('the last message of chosen or rejected is not of the assistant; expected '
                        'two answers')
    return record | {'messages': whole[0][:-1], 'chosen': whole[0][-1]['content'],
                     'rejected': whole[1][-1]['content']}


def conversation_before(record, keys, name):
    """Return the messages under the only one of `keys` that a record has, or None.

    A text is the message of a user. "system" is the first message. Raises UserError for several of
    the keys, with the `name` of the record.
    """
    turns = one_of(keys, record, name)
    if turns is None:
        return None
    turns = [{'role': 'user', 'content': turns}] if isinstance(turns, str) else turns
    return messages_of({'messages': turns, 'system': record.get('system')})


def render_pair(record, template, tokenizer):
    """Render a pair of the shape of EXAMPLE. Raises UserError for a bad one."""
    for key in ('chosen', 'rejected'):
        if not record[key].strip():
            raise UserError(f'{key} is empty; expected an answer')
    chosen, rejected = (render_answer(record['messages'], record[key], template, tokenizer)
                        for key in ('chosen', 'rejected'))
    if chosen == rejected:  # in the template, which may strip white space
        raise UserError(f'chosen equals rejected, {json.dumps(record["chosen"])[:40]}; expected '
                        f'two different answers')
    return chosen, rejected


def render_answer(messages, answer, template, tokenizer):
    """Render a conversation that awaits an answer, and the answer; -> (ids, mask).

    ids end with the token that ends the answer; the mask is 1 for the answer's own tokens and that
    one. Raises UserError where the template does not show where the answer begins or ends.
    """
    prompt = chat.render(messages, template, tokenizer)
    answered = [*messages, {'role': 'assistant', 'content': answer}]
    ids, mask = chat.render_conversation(answered, template, tokenizer)
    if ids[: len(prompt)] != prompt:
        raise UserError('the chat template renders the conversation differently once it is '
                        'answered, or the tokenizer joins an answer with the text around it, so '
                        'the start of the answer is unknown; put special tokens around answers')
    ends = [i for i, is_learned in enumerate(mask, 1) if is_learned and i > len(prompt)]
    if not ends:
        raise UserError(f'the chat template masks out every token of the answer '
                        f'{json.dumps(answer)[:40]}; expected {{% generation %}} around all '
                        f'answers, or around none')
    # the last special token of the template: a line break may follow it
    in_contents = (*chat.TOOL_TOKENS, *chat.THOUGHTS)
    specials = {i for token, i in tokenizer.special_tokens.items() if token not in in_contents}
    end = max((i for i in ends if ids[i - 1] in specials), default=ends[-1])
    return ids[:end], [0] * len(prompt) + mask[len(prompt) : end]


def ending_of(template, tokenizer):
    """Return the id that ends an answer. Raises UserError if it is no special token."""
    ids, _ = render_answer([{'role': 'user', 'content': '?'}], '!', template, tokenizer)
    if ids[-1] not in tokenizer.special_tokens.values():
        raise UserError('the chat template ends an answer without a special token that carries '
                        'loss, so there is no token to score an answer at; expected one, inside '
                        '{% generation %} if the template has that')
    return ids[-1]


def pair_rows(pairs, device):
    """Stack n pairs into ids and masks (2n, T): the chosen, then the rejected answers."""
    return to_rows([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs], device)
