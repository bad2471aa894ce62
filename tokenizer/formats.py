"""BPE vocabularies from and to other people's files: tiktoken's, Hugging Face's, GPT-2's.

    read(path)                      any of them, told apart by what is in the file; or a folder that has one
    read_tiktoken(path, pattern)    *.tiktoken: a token in base64 and its rank, line by line (GPT-4, Llama 3)
    read_tokenizer_json(path)       Hugging Face's tokenizer.json
    read_gpt2_files(vocab, merges)  GPT-2's encoder.json and vocab.bpe, also called vocab.json and merges.txt
    write_tiktoken(values, path)
    write_tokenizer_json(values, path)
    write_hf_folder(values, folder) tokenizer.json and what transformers' AutoTokenizer wants beside it

`values` is the plain dict that a BPE tokenizer's to_dict() returns:

    kind            'bpe'
    pattern         regular expression that cuts text into pieces, or None: text is one piece
    special_tokens  {text: id}
    merges          'left right' in GPT-2's byte alphabet, in the order they are done
    byte_ids        ids of the 256 bytes; None: byte b has id b
    merge_ids       id of each merge's token; None: 256, 257, ...
    ignore_merges   True: a piece that is itself a token becomes that token at once

and, where a vocabulary has it:

    normalizer      'NFC': the form in which text is cut into pieces
    bos_token       the special token that Hugging Face's libraries put in front of every text
    visible_tokens  special tokens that they do not skip in decoded text, such as <think>

What is read or written gives the same ids for every text, or it is refused and the ValueError says what stands in the
way. Special tokens are the exception: Hugging Face's libraries turn their text into ids wherever it occurs, encode()
of this program and tiktoken only when allowed to.

Many files list more merges than byte pair encoding can use. One per token suffices: whatever surrounds a token, its
bytes are joined in the same order as when they stand alone, or a neighbour has taken some of them and this token does
not come about. So its last join alone (final_parts) tells which merge makes it; the others are never reached.
"""

import base64
import binascii
import hashlib
import json
import math
import os
import pickle
from collections import Counter

import regex

from configurator import UserError
from tokenizer.base import ENDOFTEXT, write_file
from tokenizer.basic import WORD_SPECIALS, CharTokenizer
from tokenizer.bpe import final_parts, recover_merges
from tokenizer.patterns import BYTE_TO_CHAR, PATTERNS, compile_pattern, find_pattern, from_printable, printable

DOCUMENT_ENDS = (ENDOFTEXT, '<|end_of_text|>')  # the second is Llama 3's
UNDERSTOOD = ("tiktoken's *.tiktoken, Hugging Face's tokenizer.json (byte-level BPE), GPT-2's vocab.json and "
              "merges.txt or encoder.json and vocab.bpe side by side, or a folder with one of these")

GPT2_FILES = [('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe')]

# OpenAI's published files: SHA-256 -> name, pattern, special tokens, none of which are in the file itself.
PUBLISHED = {
    '306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930': ('r50k_base', 'gpt2', {ENDOFTEXT: 50256}),
    '94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069': ('p50k_base', 'gpt2', {ENDOFTEXT: 50256}),
    '223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7': ('cl100k_base', 'gpt4', {
        ENDOFTEXT: 100257, '<|fim_prefix|>': 100258, '<|fim_middle|>': 100259, '<|fim_suffix|>': 100260,
        '<|endofprompt|>': 100276}),
    '446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d': ('o200k_base', 'o200k', {
        ENDOFTEXT: 199999, '<|endofprompt|>': 200018}),
}

# The pattern of a word tokenizer, with what \w is here as a class of characters: in Oniguruma it is another.
WORD = (r'\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}'
        '\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189')
WORDS = rf' ?[{WORD}]+|[^{WORD}\s]|\s'
BYTES = {'kind': 'bpe', 'pattern': None, 'special_tokens': {}, 'merges': [], 'byte_ids': None, 'merge_ids': None,
         'ignore_merges': False}  # a byte tokenizer, said as one of byte pairs

# What a special token looks like where a file does not say which tokens are special: <s>, <|im_end|>, [PAD].
SPECIAL = regex.compile(r'<.*\p{L}.*>|\[.*\p{L}.*\]', regex.DOTALL)

# The part of regular expressions that this program (Python's regex) and Hugging Face's libraries (Oniguruma) read
# alike. Not in it, for example: $, which Oniguruma also finds before every line end; {1,3}+, which it takes for a
# repetition; \w and \h, which stand for other characters there; a case-insensitive ss, for which it finds ß.
PORTABLE = regex.compile(r'''(?x: (?:
      \(\?i: (?: (?!(?i:ss|st|ff|fi|fl)) [A-Za-z'|] | \[[A-Za-z]+\] )+ \)    # case-insensitive, without further groups
    | \( (?: \?[:=!>] | (?!\?) )  |  \)  |  \|                                 # groups, look-ahead, alternatives
    | (?: (?<escape> \\[sSdDrntf] | \\[pP]\{[CLMNPSZ][a-z]?\} | \\[!-/:-@\[-`{-~] )
        | \[ \^? (?: (?&escape) | (?!&&|--|\|\||~~)[^\\\[\]] )+ \]              # [...]
        | [^\\\[\](){}*+?|^$]                                                   # any other character, and the dot
      )
    | (?: [*+?][+?]? | \{\d+(?:,\d*)?\} ) (?![*+?{])                              # how often
    )+ )''')
LLAMA_3 = PATTERNS['qwen2'].replace(r'|\p{N}|', r'|\p{N}{1,3}|')  # how it spells gpt4, for the same pieces
INSIDE = r'(?<inside>(?:\\.|\[(?:\\.|[^\]])*\]|\((?&inside)\)|[^()\\\[])*)'  # of a group
LOOK_AHEAD = regex.compile(rf'\(\?[=!]{INSIDE}\)', regex.DOTALL)
REPEATED = regex.compile(rf'(?<!\\)(?<group>\({INSIDE}\))[*+{{]', regex.DOTALL)


# ----------------------------------------------------------------------------------------------------------------------
# from tokens and merges to a description, whatever file they came from

def rank_in(order: dict[tuple[bytes, bytes], int]):
    """The rank that final_parts() asks for, of merges {(left, right): place in their order}."""
    return lambda left, right: order.get((left, right), math.inf)


def describe(path, ids: dict[bytes, int], pairs, pattern, special_tokens: dict[str, int], ignore_merges: bool) -> dict:
    """The description of a tokenizer that knows these tokens {bytes: id} and does these merges in this order.

    ValueError when bytes are missing, an id stands for two tokens, or a token cannot be made.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        named = ', '.join(f'0x{byte:02x}' for byte in missing[:10])
        more = f' and {len(missing) - 10} more' if len(missing) > 10 else ''
        raise UserError(f'{path}: {len(missing)} of the 256 bytes are no tokens ({named}{more}); expected all, '
                         f'so that every text can be encoded. The file is damaged, or was trained without them '
                         f'(in tokenizers, train with initial_alphabet=ByteLevel.alphabet())')
    owner = {}
    for name, i in [*((repr(token), i) for token, i in ids.items()), *special_tokens.items()]:
        if type(i) is not int or not 0 <= i < 1 << 31:
            raise UserError(f'{path}: the token {name} has the id {i!r}; expected a whole number from 0 to 2^31 - 1')
        if i in owner:
            raise UserError(f'{path}: the tokens {owner[i]} and {name} have the same id {i}; '
                             f'the file is damaged, or the special tokens were given ids that are taken')
        owner[i] = name

    order = {pair: i for i, pair in enumerate(pairs)}  # of a pair listed twice, the last counts, as in tokenizers
    rank = rank_in(order)
    ways = Counter(left + right for left, right in order)
    made = {token for token in ids if len(token) == 1}
    merges = []
    for left, right in sorted(order, key=order.get):
        token = left + right
        if ignore_merges or ways[token] > 1 or left not in made or right not in made:
            if final_parts(token, rank) != [left, right]:
                continue  # another merge makes this token, or none does
            if left not in made or right not in made:
                raise UserError(f'{path}: the merge {printable(left)!r} {printable(right)!r} stands before one of '
                                 f'its parts is made; expected merges in the order they were learnt')
        merges.append((left, right))
        made.add(token)

    # The other tokens never come about by merges: they are unused ids, or with ignore_merges whole pieces. Each gets a
    # merge that is never reached: two tokens which its bytes never are.
    never_made = sorted(ids.keys() - made, key=lambda token: (len(token), ids[token]))
    for token in never_made:
        parts = final_parts(token, rank)
        splits = ([token[:i], token[i:]] for i in range(1, len(token)))
        pair = next((split for split in splits if split != parts and split[0] in made and split[1] in made), None)
        if pair is None or ways[token] == 0 and not ignore_merges:
            raise UserError(f'{path}: no merges lead to the token {printable(token)!r} (id {ids[token]}); '
                             f'expected a merge for every token of more than one byte. The list of merges is damaged, '
                             f'or this vocabulary does not come from byte pair encoding')
        merges.append(tuple(pair))
        made.add(token)

    byte_ids = [ids[bytes([byte])] for byte in range(256)]
    merge_ids = [ids[left + right] for left, right in merges]
    return {
        'kind': 'bpe', 'pattern': pattern,
        'special_tokens': dict(sorted(special_tokens.items(), key=lambda item: item[1])),
        'merges': [f'{printable(left)} {printable(right)}' for left, right in merges],
        'byte_ids': None if byte_ids == list(range(256)) else byte_ids,
        'merge_ids': None if merge_ids == list(range(256, 256 + len(merges))) else merge_ids,
        'ignore_merges': ignore_merges and bool(never_made),  # otherwise it changes nothing
    }


def tokens_of(values: dict) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """The tokens {bytes: id} and the merges of a description; ValueError when it is not of a BPE tokenizer."""
    if values.get('kind') != 'bpe':
        raise UserError(f'only BPE tokenizers can be written in this format, this one is of kind '
                         f'{values.get("kind")!r}; prepare the data and train with --tokenizer=bpe')
    pairs = [tuple(from_printable(part) for part in merge.split(' ')) for merge in values['merges']]
    ids = dict(zip((bytes([byte]) for byte in range(256)), values['byte_ids'] or range(256), strict=True))
    merge_ids = values['merge_ids'] or range(256, 256 + len(pairs))
    ids |= {left + right: i for (left, right), i in zip(pairs, merge_ids, strict=True)}
    return ids, pairs


# ----------------------------------------------------------------------------------------------------------------------
# tiktoken

def read_tiktoken(path, pattern: str | None = 'gpt4', special_tokens: dict[str, int] | None = None) -> dict:
    """The description of a file of lines 'base64 rank'.

    Such a file has neither the pattern nor the special tokens in it. OpenAI's published ones are known by their
    SHA-256. For others the caller has to know: pattern is a name in bpe.PATTERNS (default: GPT-4's, which is Llama 3's
    too), a regular expression, or None; special_tokens {text: id} (default: none). ValueError when the file is damaged.
    """
    content = read_bytes(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 in PUBLISHED:
        _, pattern, special_tokens = PUBLISHED[sha256]
    for expected, (name, _, _) in PUBLISHED.items():
        if os.path.basename(path) == f'{name}.tiktoken' and sha256 != expected:
            raise UserError(f'{path} is not the published {name}: its SHA-256 is {sha256}, expected {expected}. '
                             f'Fetch it again, or, if it is a vocabulary of your own, rename it')
    ids = {}
    for number, line in enumerate(content.splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
            if len(fields) != 2 or not token or not fields[1].isdigit():
                raise ValueError
        except (ValueError, IndexError, binascii.Error):
            raise UserError(f'{path}, line {number}: {line[:60]!r} is not a token in base64, a space, and its rank; '
                             f'the file is damaged or not one of tiktoken: fetch it again') from None
        if token in ids:
            raise UserError(f'{path}, line {number}: the token {token[:40]!r} has rank {rank}, but it already has '
                             f'rank {ids[token]}; the file is damaged: fetch it again')
        ids[token] = rank
    pattern = find_pattern(pattern)
    merges = recover_merges(ids)
    return describe(path, ids, merges, pattern, special_tokens or {}, ignore_merges=len(merges) < len(ids) - 256)


def write_tiktoken(values: dict, path):
    """Write a description as lines 'base64 rank', by rank. The pattern and the special tokens cannot be in such a file:
    whoever reads it has to be told them.

    ValueError when tiktoken would encode some text differently with these ranks.
    """
    ids, pairs = tokens_of(values)
    by_rank = recover_merges(ids)
    if by_rank != pairs and (why := tiktoken_differs(ids, pairs, by_rank, values['ignore_merges'])):
        raise UserError(f'{path} cannot be written: {why}. Write tokenizer.json instead, which keeps this')
    write_file(path, ''.join(f'{base64.b64encode(token).decode()} {ids[token]}\n'
                             for token in sorted(ids, key=ids.get)))


def tiktoken_differs(ids, pairs, by_rank, ignore_merges) -> str | None:
    """Why tiktoken, which does the merges by_rank, would encode some text to other ids than the merges pairs do."""
    rank = rank_in({pair: i for i, pair in enumerate(pairs)})
    reached = [(left, right) for left, right in pairs if final_parts(left + right, rank) == [left, right]]
    for (left, right), (next_left, next_right) in zip(reached, reached[1:], strict=False):
        if ids[left + right] > ids[next_left + next_right]:
            return (f'tiktoken merges by ascending id, but {printable(left + right)!r} (id {ids[left + right]}) is '
                    f'merged before {printable(next_left + next_right)!r} (id {ids[next_left + next_right]})')
    if different := set(reached) ^ set(by_rank):
        left, right = min(different, key=lambda pair: ids[pair[0] + pair[1]])
        return (f'tiktoken joins any two neighbours that together are a token, and so would make {left + right!r} '
                f'(id {ids[left + right]}) in other places')
    if len(reached) < len(pairs) and not ignore_merges:
        token = min({left + right for left, right in pairs} - {left + right for left, right in reached}, key=ids.get)
        return f'tiktoken takes a piece whole that is a token, and the merges never lead to {token!r} (id {ids[token]})'
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face

def read_tokenizer_json(path) -> dict:
    """The description of a Hugging Face tokenizer.json that holds a byte-level BPE, or characters or words as
    write_tokenizer_json() writes them.

    What concerns sequences rather than text stays behind: truncation, padding, and the tokens that a post-processor
    adds at the ends, but for one in front. ValueError, naming the part of the file, when ids could differ from those
    of tokenizers.
    """
    file = read_json(path)
    model = file.get('model') if isinstance(file, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path} is no tokenizer.json: expected an object with the key 'model', got {short(file)}")

    def refuse(key, value, expected):
        raise UserError(f'{path}: {key} is {short(value)}, which this program cannot do; expected {expected}')

    kind = model.get('type', 'BPE' if 'merges' in model else None)  # old files have no type
    if kind == 'WordLevel' and is_vocab(model.get('vocab')):
        tokens = sorted(model['vocab'], key=model['vocab'].get)
        for values in ({'kind': 'char', 'chars': ''.join(tokens)}, {'kind': 'word', 'words': tokens[2:]}):
            if hf_words(values) == file:
                return values
    if kind != 'BPE':
        refuse("model's type", kind, "'BPE' (words and pieces of other models do not come from merges)")
    # unk_token and fuse_unk may say anything: with all 256 bytes in the vocabulary nothing is unknown
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback'):
        if model.get(key):
            refuse(f"model's {key}", model[key], 'none')
    normalizer = file.get('normalizer')
    if normalizer not in (None, {'type': 'NFC'}):
        refuse('normalizer', normalizer, 'NFC or none. If your text is in that form already, set "normalizer": null '
               'in a copy of the file and read that')
    decoder = file.get('decoder')
    if decoder is not None and (not isinstance(decoder, dict) or decoder.get('type') != 'ByteLevel'):
        refuse('decoder', decoder, 'ByteLevel')

    vocab, merges = model.get('vocab'), model.get('merges')
    if not is_vocab(vocab):
        raise UserError(f"{path}: the model's vocab is {short(vocab)}; expected an object {{token: id}}")
    if not isinstance(merges, list):
        raise UserError(f"{path}: the model's merges are {short(merges)}; expected a list")
    added_tokens = file.get('added_tokens') or []
    special_tokens = read_added_tokens(path, added_tokens, vocab)
    pattern = read_pattern(path, file.get('pre_tokenizer'))
    pairs = [(f'merges[{i}]', merge.split(' ') if isinstance(merge, str) else merge) for i, merge in enumerate(merges)]
    values = describe_text(path, vocab, pairs, pattern, special_tokens, bool(model.get('ignore_merges')))
    if normalizer:
        values['normalizer'] = 'NFC'
        if late := [token['content'] for token in added_tokens if token.get('normalized')]:
            raise UserError(f'{path}: the added token {late[0]!r} is looked for in normalized text, in which a mark '
                             f'after it can hide it; expected "normalized": false, as this program looks for it '
                             f'before. Set that in a copy of the file and read it')
    if (bos_token := read_bos_token(file.get('post_processor'))) in special_tokens:
        values['bos_token'] = bos_token
    if visible := [token['content'] for token in added_tokens if not token.get('special')]:
        values['visible_tokens'] = visible
    return values


def read_bos_token(post_processor) -> str | None:
    """The token that a post_processor puts in front of a text, where that is all it does."""
    steps = post_processor.get('processors', [post_processor]) if isinstance(post_processor, dict) else []
    for step in steps if isinstance(steps, list) else []:
        match step:
            case {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': str() as token}}, {'Sequence': _}]}:
                return token
    return None


def read_added_tokens(path, added_tokens, vocab: dict) -> dict[str, int]:
    """{text: id} of a tokenizer.json's added_tokens."""
    if not isinstance(added_tokens, list):
        raise UserError(f'{path}: added_tokens is {short(added_tokens)}; expected a list')
    special_tokens, following = {}, len(vocab)
    for n, token in enumerate(added_tokens):
        where = f'{path}: added_tokens[{n}]'
        if not isinstance(token, dict) or not isinstance(token.get('content'), str) or not token['content']:
            raise UserError(f'{where} is {short(token)}; expected an object with content and id')
        text, i = token['content'], token.get('id')
        for key in ('single_word', 'lstrip', 'rstrip'):
            if token.get(key):
                raise UserError(f'{where} ({text!r}) has {key}, so it depends on the text around it, which this '
                                 f'program cannot do; expected false')
        if not token.get('special') and not SPECIAL.fullmatch(text):
            raise UserError(f'{where} ({text!r}) is not special: it is found in ordinary text before the merges, '
                             f'which this program cannot do; expected special tokens only')
        # tokenizers does not read the id: a token is numbered on from the last, unless it is in the vocab as well
        expected = vocab.get(text, following)
        if i != expected:
            raise UserError(f'{where} ({text!r}) has the id {i!r}, but tokenizers gives it {expected}; '
                             f'expected that id, or the token with its id in vocab as well')
        following = max(following, i + 1)
        special_tokens[text] = i
    return special_tokens


def read_pattern(path, pre_tokenizer) -> str | None:
    """The pattern of a pre_tokenizer: ByteLevel alone, after a Split with a regular expression, or after Digits."""
    expected = ('expected ByteLevel, or a Sequence of one Split (Regex, Isolated) and ByteLevel with use_regex false, '
                'or of Digits (individual_digits) and ByteLevel, with add_prefix_space false')
    steps = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get('type') == 'Sequence':
        steps = pre_tokenizer.get('pretokenizers')
    types = [step.get('type') if isinstance(step, dict) else step for step in steps] if isinstance(steps, list) else []
    if types not in (['ByteLevel'], ['Split', 'ByteLevel'], ['Digits', 'ByteLevel']):
        raise UserError(f'{path}: pre_tokenizer is {short(pre_tokenizer)}, which this program cannot do; {expected}')
    if steps[-1].get('add_prefix_space', True):
        raise UserError(f'{path}: the pre_tokenizer has add_prefix_space, so decoded text would begin with a space '
                         f'that the encoded text had not; {expected}')
    use_regex = steps[-1].get('use_regex', True)
    if len(steps) == 1:
        return PATTERNS['gpt2'] if use_regex else None
    split = steps[0]
    if types[0] == 'Digits' and split.get('individual_digits') and use_regex:
        return PATTERNS['smollm2']  # the same but for 13 numbers new in Unicode 17, which Digits alone knows
    pattern = split.get('pattern')
    pattern = pattern.get('Regex') if isinstance(pattern, dict) else None
    if use_regex or not isinstance(pattern, str) or split.get('behavior') != 'Isolated' or split.get('invert'):
        raise UserError(f'{path}: pre_tokenizer is {short(pre_tokenizer)}, which this program cannot do; {expected}')
    check_portable(path, pattern)
    return PATTERNS['gpt4'] if pattern == LLAMA_3 else pattern


def check_portable(path, pattern: str):
    """ValueError unless Hugging Face's libraries and this program cut every text alike with this pattern."""
    compile_pattern(pattern)
    known = PORTABLE.match(pattern)
    end = known.end() if known else 0
    # After an empty match the two go on differently, also within a repetition. Without look-ahead it shows on no text.
    bare = LOOK_AHEAD.sub('(?:)', pattern)
    repeated = [match['group'] for match in REPEATED.finditer(bare, overlapped=True)]
    matches_nothing = any(compile_pattern(part).match('') for part in (bare, *repeated))
    if end < len(pattern) or matches_nothing:
        why = (f'from {pattern[end:end + 20]!r} on' if end < len(pattern) else
               'as it, or a part that it repeats, can match without any character')
        raise UserError(f'{path}: the split pattern {pattern!r} may mean something else to Hugging Face\'s libraries '
                         f'than to this program, {why}. Expected \\p{{..}}, \\s, \\d, classes without sets, groups, '
                         f"look-ahead, and * + ? {{m,n}}; see PORTABLE in interchange.py")


def write_tokenizer_json(values: dict, path):
    """Write a description as a tokenizer.json, which tokenizers (0.19 or newer) and transformers read.

    ValueError when the pattern may mean something else to them, or a special token reads like one of the others.
    """
    write_file(path, to_json(hf_tokenizer(values, path)))


def document_ends(values: dict) -> list[str]:
    """The special tokens of a description that end a document, the usual first."""
    special_tokens = WORD_SPECIALS if values['kind'] == 'word' else values.get('special_tokens', {})
    return [token for token in DOCUMENT_ENDS if token in special_tokens]


def write_hf_folder(values: dict, folder, more: dict | None = None):
    """Write tokenizer.json and tokenizer_config.json into folder, for AutoTokenizer.from_pretrained(folder). more: what
    else tokenizer_config.json should say, such as the chat_template."""
    tokenizer = hf_tokenizer(values, os.path.join(folder, 'tokenizer.json'))
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if ends := document_ends(values):
        config |= {'bos_token': ends[0], 'eos_token': ends[0], 'unk_token': ends[0]}
    if 'bos_token' in values:
        config['bos_token'] = values['bos_token']
    if values['kind'] == 'word':
        config['unk_token'] = '<|unk|>'
    config |= more or {}
    os.makedirs(folder, exist_ok=True)
    write_file(os.path.join(folder, 'tokenizer.json'), to_json(tokenizer))
    write_file(os.path.join(folder, 'tokenizer_config.json'), to_json(config))


def hf_tokenizer(values: dict, path) -> dict:
    """The content of the tokenizer.json for a description."""
    if values['kind'] in ('char', 'word'):
        return hf_words(values)
    if values['kind'] == 'byte':
        values = BYTES
    ids, _ = tokens_of(values)
    vocab = {printable(token): i for token, i in ids.items()}
    steps = []
    if values['pattern'] is not None:
        check_portable(path, values['pattern'])
        steps = [split_by(values['pattern'])]
    for text, i in values['special_tokens'].items():
        if text in vocab:
            raise UserError(f'{path} cannot be written: the special token {text!r} (id {i}) has the name of the token '
                             f'{from_printable(text)!r} (id {vocab[text]}) there; give it another name, as <|name|>')
        # In the vocabulary as well: tokenizers numbers other added tokens itself, without the gaps that ids can have.
        vocab[text] = i
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
             'ignore_merges': values['ignore_merges'], 'vocab': dict(sorted(vocab.items(), key=lambda item: item[1])),
             'merges': values['merges']}
    file = hf_file(model, values['special_tokens'], {'type': 'Sequence', 'pretokenizers': [*steps, byte_level]},
                   byte_level, values.get('visible_tokens', ()))
    if 'normalizer' in values:
        file['normalizer'] = {'type': values['normalizer']}
    if bos_token := values.get('bos_token'):
        first, text = [{'SpecialToken': {'id': bos_token, 'type_id': 0}}], [{'Sequence': {'id': 'A', 'type_id': 0}}]
        second = [{'SpecialToken': {'id': bos_token, 'type_id': 1}}, {'Sequence': {'id': 'B', 'type_id': 1}}]
        token = {'id': bos_token, 'ids': [values['special_tokens'][bos_token]], 'tokens': [bos_token]}
        file['post_processor'] = {'type': 'TemplateProcessing', 'single': first + text, 'pair': first + text + second,
                                  'special_tokens': {bos_token: token}}
    return file


def hf_words(values: dict) -> dict:
    """The content of the tokenizer.json of a char or word tokenizer. A character that a char tokenizer does not have is
    an error there, too: of its vocabulary, the unknown token is none."""
    if values['kind'] == 'char':
        special_tokens, tokens, pattern, unknown = {}, values['chars'], r'[\s\S]', ''
    else:
        special_tokens, tokens, pattern, unknown = WORD_SPECIALS, [*WORD_SPECIALS, *values['words']], WORDS, '<|unk|>'
    model = {'type': 'WordLevel', 'vocab': {token: i for i, token in enumerate(tokens)}, 'unk_token': unknown}
    return hf_file(model, special_tokens, split_by(pattern), {'type': 'Fuse'})


def hf_file(model: dict, special_tokens: dict[str, int], pre_tokenizer, decoder, visible_tokens=()) -> dict:
    """What is around the model in a tokenizer.json."""
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [{'id': i, 'content': text, 'single_word': False, 'lstrip': False, 'rstrip': False,
                          'normalized': False, 'special': text not in visible_tokens}
                         for text, i in special_tokens.items()],
        'normalizer': None, 'pre_tokenizer': pre_tokenizer, 'post_processor': None, 'decoder': decoder, 'model': model,
    }


def split_by(pattern: str) -> dict:
    """The pre_tokenizer that cuts text into pieces by a pattern."""
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def describe_text(path, vocab: dict[str, int], pairs, pattern, special_tokens: dict[str, int],
                  ignore_merges: bool) -> dict:
    """describe() for a vocabulary and merges in GPT-2's byte alphabet. pairs: (where in the file, [left, right])."""
    tokens = {}
    for text, i in vocab.items():
        if text not in special_tokens:
            try:
                tokens[text] = from_printable(text)
            except KeyError:
                raise UserError(f"{path}: the token {text!r} (id {i}) is neither special nor written in GPT-2's byte "
                                 f'alphabet; expected a byte-level vocabulary') from None
    merges = []
    for where, pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise UserError(f'{path}, {where}: {short(pair)} is no merge; expected two tokens and a space between '
                             f'them. The file is damaged: fetch it again')
        joined = ''.join(pair)
        if joined in special_tokens and joined.isascii():  # where the byte alphabet is the text itself
            continue  # a trainer that met special tokens in its text learns this, but theirs is cut out before merging
        for text in (*pair, joined):
            if text not in tokens:
                raise UserError(f'{path}, {where}: the merge {" ".join(pair)!r} needs the token {text!r}; expected it '
                                 f'in the vocabulary. The file is damaged, or belongs to another one: fetch it again')
        merges.append((tokens[pair[0]], tokens[pair[1]]))
    return describe(path, {token: vocab[text] for text, token in tokens.items()}, merges, pattern, special_tokens,
                    ignore_merges)


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2

def read_gpt2_files(vocab_json, merges_txt) -> dict:
    """The description of GPT-2's two files: encoder.json or vocab.json {token: id}, and vocab.bpe or merges.txt, one
    merge per line. Tokens like <|endoftext|> that no merge makes are special. ValueError when the two do not fit."""
    vocab = read_json(vocab_json)
    if not is_vocab(vocab):
        raise UserError(f'{vocab_json} is no vocabulary: expected an object {{token: id}}, got {short(vocab)}')
    pairs = []
    for number, line in enumerate(read_utf8(merges_txt).split('\n'), start=1):
        line = line.removesuffix('\r')
        if line and not (number == 1 and line.startswith('#version')):
            pairs.append((f'line {number}', line.split(' ')))
    made = {''.join(pair) for _, pair in pairs} | set(BYTE_TO_CHAR.values())
    special_tokens = {text: i for text, i in vocab.items() if text not in made and SPECIAL.fullmatch(text)}
    return describe_text(merges_txt, vocab, pairs, PATTERNS['gpt2'], special_tokens, ignore_merges=False)


# ----------------------------------------------------------------------------------------------------------------------
# any of them

def read(path, pattern: str | None = 'gpt4', special_tokens: dict[str, int] | None = None) -> dict:
    """The description of the vocabulary in a file or folder. pattern and special_tokens: see read_tiktoken().

    ValueError when there is none, or none that this program can use exactly.
    """
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        tiktokens = [name for name in names if name.endswith('.tiktoken')]
        if 'tokenizer.json' in names:
            return read_tokenizer_json(os.path.join(path, 'tokenizer.json'))
        for vocab, merges in GPT2_FILES:
            if vocab in names and merges in names:
                return read_gpt2_files(os.path.join(path, vocab), os.path.join(path, merges))
        if len(tiktokens) != 1:
            raise UserError(f'the folder {path} holds no vocabulary ({", ".join(names[:8]) or "it is empty"}); '
                             f'understood are {UNDERSTOOD}')
        path = os.path.join(path, tiktokens[0])
    content = read_bytes(path)
    first_line = content.split(b'\n', 1)[0].split()
    if content.lstrip()[:1] == b'{':
        file = read_json(path)
        if is_vocab(file):
            return read_gpt2_files(path, beside(path, dict(GPT2_FILES)))
        if 'model' in file:
            return read_tokenizer_json(path)
        if 'kind' in file:
            raise UserError(f"{path} is in this program's own format, of kind {short(file['kind'])}: "
                             f'tokenizer.load() reads it')
    elif first_line[:1] == [b'#version:']:
        return read_gpt2_files(beside(path, {merges: vocab for vocab, merges in GPT2_FILES}), path)
    elif len(first_line) == 2 and len(first_line[0]) % 4 == 0 and first_line[1].isdigit():
        return read_tiktoken(path, pattern, special_tokens)
    found = 'unknown content'
    if content[:1] == b'\x80':
        found = 'a pickle, which could run code when read; have the program that wrote it export one of the others'
    elif b'<unk>' in content[:100] and b'\0' in content[:100]:
        found = 'a SentencePiece model, whose tokens do not come from bytes'
    raise UserError(f'{path}: {found}. Understood are {UNDERSTOOD}')


def beside(path, partners: dict[str, str]):
    """The path of the second of GPT-2's two files, beside the first."""
    name = os.path.basename(path)
    if name not in partners:
        raise UserError(f"{path} is one of GPT-2's two files, and its name does not say what the other is called: "
                         f'expected {" or ".join(partners)}; rename it, and the other to '
                         f'{" or ".join(partners.values())}')
    partner = os.path.join(os.path.dirname(path), partners[name])
    if not os.path.exists(partner):
        raise UserError(f"{path} is one of GPT-2's two files; the other, {partner}, is missing: copy it there")
    return partner


# ----------------------------------------------------------------------------------------------------------------------
# files

def read_bytes(path) -> bytes:
    try:
        with open(path, 'rb') as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f'{path} does not exist; expected {UNDERSTOOD}') from None


def read_utf8(path) -> str:
    try:
        return read_bytes(path).decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: byte {error.start} is not UTF-8 ({error.object[error.start]:#04x}); the file is '
                         f'damaged: fetch it again') from None


def unique(items):
    """A JSON object, for json's object_pairs_hook; ValueError when it has a key twice, of which only one would stay."""
    values = dict(items)
    if len(values) < len(items):
        twice = next(key for key, n in Counter(key for key, _ in items).items() if n > 1)
        raise UserError(f'the key {short(twice)} stands there twice')
    return values


def read_json(path):
    """The content of a JSON file; ValueError when it is damaged, or has a key twice."""
    text = read_utf8(path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is damaged or truncated ({error}): fetch it again') from None


def is_vocab(content) -> bool:
    """Whether content is {token: id}."""
    return isinstance(content, dict) and all(type(i) is int for i in content.values())


def to_json(values) -> str:
    return json.dumps(values, ensure_ascii=False, indent=2) + '\n'


def short(value) -> str:
    """value as it stands in an error message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + '...'



class PlainUnpickler(pickle.Unpickler):
    # A pickle can only run code through a class or function that it names, and every such name is looked up here.
    # Refusing all of them leaves dicts, lists, strings and numbers, which is all that nanoGPT's meta.pkl holds.
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def from_meta_pkl(path) -> CharTokenizer:
    """The tokenizer of nanoGPT's meta.pkl (vocab_size, stoi, itos). Runs no code from the file.

    ValueError when the file is damaged, holds anything but plain values, or contradicts itself.
    """
    remedy = f'Make it again with the prepare.py of the dataset: python {os.path.dirname(path) or "."}/prepare.py'
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f'{path} does not exist. {remedy}') from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f'{path} was refused: it is damaged, or not a plain meta.pkl ({error}). {remedy}') from None

    def refuse(why):
        raise UserError(f'{path} was refused: {why}. {remedy}')

    if not isinstance(meta, dict):
        refuse(f'expected a dict with vocab_size, stoi and itos, got {type(meta).__name__}')
    missing = [key for key in ('vocab_size', 'stoi', 'itos') if key not in meta]
    if missing:
        refuse(f'it lacks {", ".join(missing)}')
    size, stoi, itos = meta['vocab_size'], meta['stoi'], meta['itos']
    if type(size) is not int or not isinstance(stoi, dict) or not isinstance(itos, dict):
        refuse('vocab_size must be an int, stoi and itos dicts')
    for char, i in stoi.items():
        if type(char) is not str or type(i) is not int:
            refuse(f'stoi must map characters to ids, got {char!r}: {i!r}')
        if len(char) != 1:
            refuse(f'stoi must have single characters, got {char!r}')
    if sorted(stoi.values()) != list(range(size)):
        refuse(f'the ids of stoi are not 0 to {size - 1} (vocab_size {size}), each once')
    if itos != {i: char for char, i in stoi.items()}:
        refuse('itos is not the reverse of stoi')
    try:
        return CharTokenizer(sorted(stoi, key=stoi.get))
    except ValueError as error:
        refuse(error)
