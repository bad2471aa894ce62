"""
Read and write Hugging Face's tokenizer.json.

tokenizers and transformers give the same ids. Truncation, padding and post-processors are not
kept, except one token before a text.
"""

import math
import os

import regex

from configurator import UserError
from tokenizer.added import RULES
from tokenizer.base import ENDOFTEXT, find_overlap, write_file
from tokenizer.basic import WORD_SPECIALS
from tokenizer.bpe import final_parts
from tokenizer.patterns import (
    BYTE_TO_CHAR,
    PATTERNS,
    SPECIAL,
    compile_pattern,
    from_printable,
    printable,
)
from tokenizer.sentencepiece import BLANK, BYTE_PIECES, SentencePieceTokenizer
from tokenizer.vocabulary import (
    check_lengths,
    from_alphabet,
    is_vocab,
    rank_in,
    read_json,
    short,
    to_json,
    tokens_of,
)

DOCUMENT_ENDS = (ENDOFTEXT, '<|end_of_text|>', '</s>')  # GPT-2's, Llama 3's, Llama 2's
# a byte tokenizer, as the description of a BPE tokenizer without merges
BYTES = {'kind': 'bpe', 'pattern': None, 'special_tokens': {}, 'merges': [], 'byte_ids': None,
         'merge_ids': None, 'ignore_merges': False}
LLAMA_3 = PATTERNS['qwen2'].replace(r'|\p{N}|', r'|\p{N}{1,3}|')  # cuts as PATTERNS['gpt4'] does
# The pattern of a word tokenizer, with \w as a class of characters: Oniguruma's \w is another.
WORD = (r'\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}'
        '\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189')
WORDS = rf' ?[{WORD}]+|[^{WORD}\s]|\s'

# The regular expressions that the package regex and Hugging Face's Oniguruma read alike. Left out,
# for example: $, which Oniguruma also matches before line ends; {1,3}+, there a repetition of a
# repetition; \w and \h, there other characters; case-insensitive ss, there also ß.
PORTABLE = regex.compile(r'''(?x: (?:
      \(\?i: (?: (?!(?i:ss|st|ff|fi|fl)) [A-Za-z'|] | \[[A-Za-z]+\] )+ \)   # no groups inside
    | \( (?: \?[:=!>] | (?!\?) )  |  \)  |  \|                      # groups, look-ahead, or
    | (?: (?<escape> \\[sSdDrntf] | \\[pP]\{[CLMNPSZ][a-z]?\} | \\[!-/:-@\[-`{-~] )
        | \[ \^? (?: (?&escape) | (?!&&|--|\|\||~~)[^\\\[\]] )+ \]  # [...]
        | [^\\\[\](){}*+?|^$]                                       # any other character
      )
    | (?: [*+?][+?]? | \{\d+(?:,\d*)?\} ) (?![*+?{])                # how often
    )+ )''')
INSIDE = r'(?<inside>(?:\\.|\[(?:\\.|[^\]])*\]|\((?&inside)\)|[^()\\\[])*)'  # a group's content
LOOK_AHEAD = regex.compile(rf'\(\?[=!]{INSIDE}\)', regex.DOTALL)
REPEATED = regex.compile(rf'(?<!\\)(?<group>\({INSIDE}\))[*+{{]', regex.DOTALL)


def unsupported(path, key, value, expected) -> UserError:
    """Make the error for a part of a file that would give other ids here."""
    return UserError(f'{path}: {key} is {short(value)}, which this program cannot do; '
                     f'expected {expected}')


def read_tokenizer_json(path) -> dict:
    """Read a tokenizer.json: byte-level or SentencePiece's BPE, or hf_words()'s.

    Returns the description. Raises UserError, naming the part of the file, where ids could differ.
    """
    file = read_json(path)
    model = file.get('model') if isinstance(file, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{path} is no tokenizer.json: expected an object with the key 'model', "
                        f'got {short(file)}')
    kind = model.get('type', 'BPE' if 'merges' in model else None)  # old files have no type
    if kind == 'WordLevel' and is_vocab(model.get('vocab')):
        tokens = sorted(model['vocab'], key=model['vocab'].get)
        for values in ({'kind': 'char', 'chars': ''.join(tokens)},
                       {'kind': 'word', 'words': tokens[2:]}):
            if hf_words(values) == file:
                return values
    if kind == 'BPE' and model.get('byte_fallback'):
        return read_pieces(path, file, model)
    check_model(path, kind, model, file)
    added_tokens = file.get('added_tokens') or []
    special_tokens, ordinary = read_added_tokens(path, added_tokens, model['vocab'])
    pattern = read_pattern(path, file.get('pre_tokenizer'))
    pairs = [(f'merges[{i}]', merge.split(' ') if isinstance(merge, str) else merge)
             for i, merge in enumerate(model['merges'])]
    shared = tokens_in_both(path, ordinary, model['vocab'], pairs)
    alone = {token: i for token, i in ordinary.items() if token not in shared}
    vocabulary = from_alphabet(path, model['vocab'], pairs, {**special_tokens, **alone})
    values = vocabulary.describe(pattern, bool(model.get('ignore_merges')))
    values['special_tokens'] = {token: i for token, i in values['special_tokens'].items()
                                if token in special_tokens}
    if ordinary:
        values['added_tokens'] = dict(sorted(ordinary.items(), key=lambda item: item[1]))
    if file.get('normalizer'):
        values['normalizer'] = 'NFC'
    if rules := read_rules(file):
        values['token_rules'] = rules
    if (bos_token := read_bos_token(file.get('post_processor'))) in special_tokens:
        values['bos_token'] = bos_token
    if visible := [token['content'] for token in added_tokens
                   if not token.get('special') and token['content'] in special_tokens]:
        values['visible_tokens'] = visible
    return values


def check_model(path, kind, model: dict, file: dict):
    """Raise UserError for a model, normalizer or decoder that is not byte-level BPE."""
    if kind != 'BPE':
        raise unsupported(path, "model's type", kind, "'BPE' (other models have no merges)")
    check_merges(path, model)
    normalizer, decoder = file.get('normalizer'), file.get('decoder')
    if normalizer not in (None, {'type': 'NFC'}):
        raise unsupported(path, 'normalizer', normalizer, 'NFC or none. If your text is in that '
                          'form already, set "normalizer": null in a copy of the file')
    if decoder and (not isinstance(decoder, dict) or decoder.get('type') != 'ByteLevel'):
        raise unsupported(path, 'decoder', decoder, 'ByteLevel')


def check_merges(path, model: dict):
    """Raise UserError for a BPE model with unusual options, or without vocab or merges."""
    # unk_token and fuse_unk do not matter: with all 256 bytes as tokens nothing is unknown
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model.get(key):
            raise unsupported(path, f"model's {key}", model[key], 'none')
    vocab, merges = model.get('vocab'), model.get('merges')
    if not is_vocab(vocab):
        raise UserError(f"{path}: the model's vocab is {short(vocab)}; expected an object "
                        f'{{token: id}}')
    if not isinstance(merges, list):
        raise UserError(f"{path}: the model's merges are {short(merges)}; expected a list")


def read_bos_token(post_processor) -> str | None:
    """Return the token that a post_processor adds before a text, or None."""
    steps = (post_processor.get('processors', [post_processor])
             if isinstance(post_processor, dict) else [])
    for step in steps if isinstance(steps, list) else []:
        match step:
            case {'type': 'TemplateProcessing',
                  'single': [{'SpecialToken': {'id': str() as token}}, {'Sequence': _}]}:
                return token
    return None


def read_rules(file: dict) -> dict[str, list[str]]:
    """Return {text: rules} of added tokens, see added.py.

    'normalized' is left out where it changes nothing: without a normalizer, other rules, and
    tokens that overlap.
    """
    added_tokens = file.get('added_tokens') or []
    names = [token['content'] for token in added_tokens]
    has_rules = any(token.get(rule) for token in added_tokens for rule in RULES[1:])
    late_matters = file.get('normalizer') or has_rules or find_overlap(set(names))
    relevant = RULES if late_matters else RULES[1:]
    rules = {token['content']: [rule for rule in relevant if token.get(rule)]
             for token in added_tokens}
    return {token: rules_of for token, rules_of in rules.items() if rules_of}


def tokens_in_both(path, ordinary: dict[str, int], vocab: dict, pairs) -> set[str]:
    """Return the added tokens that merges make too. Raises UserError for other bytes."""
    made = {''.join(pair) for _, pair in pairs
            if isinstance(pair, list) and all(isinstance(part, str) for part in pair)}
    made |= set(BYTE_TO_CHAR.values())
    both = {token for token in ordinary if token in made and token in vocab}
    if odd := [token for token in both if from_printable(token) != token.encode('utf-8')]:
        raise UserError(f'{path}: the added token {odd[0]!r} has the id of the bytes '
                        f'{from_printable(odd[0])!r}; expected an id of its own')
    return both


def read_added_tokens(path, added_tokens, vocab: dict) -> tuple[dict[str, int], dict[str, int]]:
    """Return {text: id} of the special tokens and of the others.

    Others with a name like <think> count as special, so that text does not have them by chance.
    """
    if not isinstance(added_tokens, list):
        raise UserError(f'{path}: added_tokens is {short(added_tokens)}; expected a list')
    special_tokens, ordinary, following = {}, {}, len(vocab)
    for n, token in enumerate(added_tokens):
        place = f'{path}: added_tokens[{n}]'
        text = token.get('content') if isinstance(token, dict) else None
        if not isinstance(text, str) or not text:
            raise UserError(f'{place} is {short(token)}; expected an object with content and id')
        # tokenizers ignores the id: a token outside the vocab gets the id after the last one
        expected = vocab.get(text, following)
        if token.get('id') != expected:
            raise UserError(f'{place} ({text!r}) has the id {token.get("id")!r}, but tokenizers '
                            f'gives it {expected}; expected that id, or the token in vocab')
        following = max(following, expected + 1)
        is_special = token.get('special') or SPECIAL.fullmatch(text)
        (special_tokens if is_special else ordinary)[text] = expected
    return special_tokens, ordinary


def read_pattern(path, pre_tokenizer) -> str | None:
    """Return the pattern of a pre_tokenizer: ByteLevel, maybe after Split or Digits."""
    refused = unsupported(
        path, 'pre_tokenizer', pre_tokenizer,
        'ByteLevel, or a Sequence of one Split (Regex, Isolated) and ByteLevel with use_regex '
        'false, or of Digits (individual_digits) and ByteLevel, with add_prefix_space false (with '
        'it, decoded text begins with a space that the text had not)')
    steps = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get('type') == 'Sequence':
        steps = pre_tokenizer.get('pretokenizers')
    types = ([step.get('type') if isinstance(step, dict) else step for step in steps]
             if isinstance(steps, list) else [])
    if (types not in (['ByteLevel'], ['Split', 'ByteLevel'], ['Digits', 'ByteLevel'])
            or steps[-1].get('add_prefix_space', True)):
        raise refused
    use_regex = steps[-1].get('use_regex', True)
    if len(steps) == 1:
        return PATTERNS['gpt2'] if use_regex else None
    first = steps[0]
    if types[0] == 'Digits' and first.get('individual_digits') and use_regex:
        return PATTERNS['smollm2']  # but for 13 numbers new in Unicode 17, which only Digits has
    pattern = first.get('pattern')
    pattern = pattern.get('Regex') if isinstance(pattern, dict) else None
    isolated = first.get('behavior') == 'Isolated' and not first.get('invert')
    if use_regex or not isinstance(pattern, str) or not isolated:
        raise refused
    check_portable(path, pattern)
    return PATTERNS['gpt4'] if pattern == LLAMA_3 else pattern


def check_portable(path, pattern: str):
    """Raise UserError unless tokenizers cuts every text alike with this pattern."""
    compile_pattern(pattern)
    match = PORTABLE.match(pattern)
    end = match.end() if match else 0
    # After an empty match the two go on differently, also within a repetition. Look-ahead matches
    # nothing itself, and is left out.
    bare = LOOK_AHEAD.sub('(?:)', pattern)
    repeated = [match['group'] for match in REPEATED.finditer(bare, overlapped=True)]
    matches_nothing = any(compile_pattern(part).match('') for part in (bare, *repeated))
    if end < len(pattern) or matches_nothing:
        reason = (f'from {pattern[end:end + 20]!r} on' if end < len(pattern) else
                  'as it, or a part that it repeats, can match without any character')
        raise UserError(f'{path}: the split pattern {pattern!r} may cut differently in tokenizers, '
                        f'{reason}; see PORTABLE in tokenizer/tokenizer_json.py')


# SentencePiece in a tokenizer.json: normalizer, pre_tokenizer and decoder, as Llama 2's has them.
TO_BLANK = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': BLANK}
PREPEND = {'type': 'Prepend', 'prepend': BLANK}
REMOVE_EXTRA = {'type': 'Replace', 'pattern': {'Regex': rf'\A +|[ {BLANK}]+\z| +(?= )'},
                'content': ''}
# Gemma's, which never applies: the normalizer has left no space
SPLIT_AT_SPACE = {'type': 'Split', 'pattern': {'String': ' '}, 'behavior': 'MergedWithPrevious',
                  'invert': False}
METASPACE = {'type': 'Metaspace', 'replacement': BLANK, 'split': False}  # and prepend_scheme
TO_TEXT = [{'type': 'Replace', 'pattern': {'String': BLANK}, 'content': ' '},
           {'type': 'ByteFallback'}, {'type': 'Fuse'}]
STRIP_FIRST = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
STRIP_ALL = {'type': 'Strip', 'content': ' ', 'start': 1_000_000, 'stop': 0}


def sequence_of(key: str, steps: list) -> dict:
    """Return several steps of a tokenizer.json as one."""
    return {'type': 'Sequence', key: steps}


def read_pieces(path, file: dict, model: dict) -> dict:
    """Read SentencePiece's BPE from a tokenizer.json; return the description.

    tokenizers joins the pairs that it lists, SentencePiece any neighbours that are a piece. Raises
    UserError for parts of a file that this program cannot do.
    """
    check_merges(path, model)
    forms = {(prepend, extra): [REMOVE_EXTRA] * extra + [PREPEND] * prepend + [TO_BLANK]
             for prepend in (False, True) for extra in (False, True)}
    normalizer, pre_tokenizer = file.get('normalizer'), file.get('pre_tokenizer')
    steps, metaspace = [normalizer], None
    if isinstance(normalizer, dict) and normalizer.get('type') == 'Sequence':
        steps = normalizer.get('normalizers')
    form = next((form for form, expected in forms.items() if steps == expected), None)
    if not normalizer and isinstance(pre_tokenizer, dict):
        metaspace = next((scheme for scheme in ('always', 'first', 'never')
                          if pre_tokenizer == {**METASPACE, 'prepend_scheme': scheme}), None)
        form = metaspace and (metaspace != 'never', False)
    elif form and pre_tokenizer not in (None, SPLIT_AT_SPACE):
        raise unsupported(path, 'pre_tokenizer', pre_tokenizer, 'none, as the normalizer writes ▁ '
                          'for spaces')
    if not form:
        raise unsupported(path, 'normalizer', normalizer, 'Prepend of ▁ and Replace of the space '
                          'by ▁, Replace alone, or the pre_tokenizer Metaspace with split false, '
                          'because byte_fallback is true')
    decoders = [sequence_of('decoders', [*TO_TEXT, *strip])
                for strip in ([], [STRIP_FIRST], [STRIP_ALL])]
    if file.get('decoder') not in decoders:
        raise unsupported(path, 'decoder', file.get('decoder'), 'Replace, ByteFallback, Fuse, and '
                          "Strip where the normalizer prepends, as in Llama 2's file")
    added_tokens = file.get('added_tokens') or []
    special_tokens, ordinary = read_added_tokens(path, added_tokens, model['vocab'])
    if late := [token['content'] for token in added_tokens if token.get('normalized')]:
        raise UserError(f'{path}: the added token {late[0]!r} is looked for in normalized text, '
                        f'with ▁ before it; expected "normalized": false. Set that in a copy of '
                        f'the file')
    ids = model['vocab'] | special_tokens | ordinary
    if sorted(ids.values()) != list(range(len(ids))):
        raise UserError(f'{path}: the ids are not 0 to {len(ids) - 1}; expected one piece for '
                        f'each id')
    pieces = sorted(ids, key=ids.get)
    values = {'pieces': pieces, 'special_tokens': special_tokens, 'add_dummy_prefix': form[0],
              'remove_extra_whitespaces': form[1], 'added_tokens': ordinary,
              'token_rules': read_rules(file),
              'metaspace': metaspace if metaspace != 'never' else None,
              'ranks': ranks_of_pieces(path, pieces, model, {*special_tokens, *BYTE_PIECES})}
    if (bos_token := read_bos_token(file.get('post_processor'))) in special_tokens:
        values['bos_token'] = bos_token
    try:
        return SentencePieceTokenizer.from_values(values).to_dict()
    except UserError as error:
        raise UserError(f'{path}: {error}') from None


def ranks_of_pieces(path, pieces: list[str], model: dict, reserved: set[str]) -> list[int] | None:
    """Return the order in which SentencePiece joins as tokenizers does, by id.

    None: the order of the ids. A piece that no merges make has the rank -1, as in tokenizers.
    """
    order = {}
    for i, merge in enumerate(model['merges']):
        pair = merge.split(' ') if isinstance(merge, str) else merge
        if (not isinstance(pair, list) or len(pair) != 2
                or not all(isinstance(part, str) and part for part in pair)
                or not {*pair, ''.join(pair)} <= model['vocab'].keys()):
            raise UserError(f'{path}, merges[{i}]: {short(pair)} is no merge; expected two tokens '
                            f'of the vocabulary that make a third')
        order[tuple(pair)] = i
    joined = [piece for piece in pieces if len(piece) > 1 and piece not in reserved]
    check_lengths(path, joined)
    # only the last join of a piece alone is ever done (see vocabulary.py)
    parts = {piece: final_parts(piece, rank_in(order)) for piece in joined}
    place = {piece: order[left, right] for piece, (left, right, *more) in parts.items()
             if not more and (left, right) in order}
    ranks = {piece: i for i, piece in enumerate(sorted(place, key=place.get))}
    others = {piece: len(ranks) for piece in model['vocab'] if len(piece) == 1}
    if [ranks.get(piece) for piece in joined] == list(range(len(joined))) and all(
            piece in model['vocab'] or piece in reserved for piece in pieces):
        return None
    return [ranks.get(piece, others.get(piece, -1)) for piece in pieces]


def hf_pieces(values: dict, path) -> dict:
    """Return the tokenizer.json of SentencePiece's BPE. path: for messages."""
    tok = SentencePieceTokenizer.from_values(values)
    ranks, obstacle = tok.rank_of, ''
    if tok.precompiled_charsmap:
        obstacle = 'normalization rules (nfkc), which tokenizers applies to other parts of a text'
    elif tok.user_defined_symbols:
        obstacle = 'user_defined_symbols, which tokenizers looks for elsewhere'
    joined = sorted((piece for piece in ranks if len(piece) > 1), key=ranks.get)
    check_lengths(path, joined)
    merges = []
    for piece in joined:
        parts = final_parts(piece, lambda left, right: ranks.get(left + right, math.inf))
        if len(parts) == 2:  # otherwise neither program ever makes the piece
            merges.append(parts)
            if not obstacle and not all(part in ranks for part in parts):
                obstacle = f'the piece {piece!r} without a piece for each of its parts {parts}'
    if not obstacle and len({ranks[left + right] for left, right in merges}) < len(merges):
        obstacle = 'several pieces of the same rank'
    if odd := [token for token in [*tok.special_tokens, *tok.pieces]
               if len(token) == 1 and token not in ranks]:
        obstacle = f'the piece {odd[0]!r}, which tokenizers would find in ordinary text'
    if obstacle:
        raise UserError(f'{path} cannot be written: the tokenizer has {obstacle}; expected '
                        f'--out=tokenizer.model')
    model = {'type': 'BPE', 'dropout': None, 'unk_token': '<unk>' if '<unk>' in tok.special_tokens
             else None, 'continuing_subword_prefix': None, 'end_of_word_suffix': None,
             'fuse_unk': True, 'byte_fallback': True, 'ignore_merges': False,
             'vocab': {piece: i for i, piece in enumerate(tok.pieces)}, 'merges': merges}
    strip = ([STRIP_ALL] if tok.remove_extra_whitespaces else
             [STRIP_FIRST] if tok.add_dummy_prefix else [])
    decoder = sequence_of('decoders', [*TO_TEXT, *strip])
    file = hf_file(model, {**tok.special_tokens, **tok.added_tokens}, None, decoder)
    for token in file['added_tokens']:
        token['special'] = token['content'] in tok.special_tokens
        token |= dict.fromkeys(tok.token_rules.get(token['content'], ()), True)
    file['post_processor'] = put_bos_first(values)
    if tok.metaspace:
        file['pre_tokenizer'] = {**METASPACE, 'prepend_scheme': tok.metaspace}
        return file
    file['normalizer'] = sequence_of('normalizers', (
        [REMOVE_EXTRA] * tok.remove_extra_whitespaces + [PREPEND] * tok.add_dummy_prefix
        + [TO_BLANK]))
    return file


def write_tokenizer_json(values: dict, path):
    """Write a description as a tokenizer.json, for tokenizers 0.19 or newer."""
    write_file(path, to_json(hf_tokenizer(values, path)))


def document_ends(values: dict) -> list[str]:
    """Return the special tokens that end a document, the usual one first."""
    specials = WORD_SPECIALS if values['kind'] == 'word' else values.get('special_tokens', {})
    return [token for token in DOCUMENT_ENDS if token in specials]


def write_hf_folder(values: dict, folder, more: dict | None = None):
    """Write the files for transformers.AutoTokenizer.from_pretrained(folder).

    more: further entries of tokenizer_config.json, such as the chat_template.
    """
    tokenizer = hf_tokenizer(values, os.path.join(folder, 'tokenizer.json'))
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if ends := document_ends(values):
        config |= {'bos_token': ends[0], 'eos_token': ends[0], 'unk_token': ends[0]}
    if 'bos_token' in values:
        config['bos_token'] = values['bos_token']
    if values['kind'] in ('word', 'sentencepiece'):
        config['unk_token'] = '<|unk|>' if values['kind'] == 'word' else '<unk>'
    os.makedirs(folder, exist_ok=True)
    write_file(os.path.join(folder, 'tokenizer.json'), to_json(tokenizer))
    write_file(os.path.join(folder, 'tokenizer_config.json'), to_json(config | (more or {})))


def hf_tokenizer(values: dict, path) -> dict:
    """Return the content of a tokenizer.json. path: for error messages."""
    if values['kind'] in ('char', 'word'):
        return hf_words(values)
    if values['kind'] == 'sentencepiece':
        return hf_pieces(values, path)
    values = BYTES if values['kind'] == 'byte' else values
    ids, _ = tokens_of(values)
    vocab = {printable(token): i for token, i in ids.items()}
    added = {**values['special_tokens'], **values.get('added_tokens', {})}
    for text, i in added.items():
        if vocab.get(text, i) != i:
            raise UserError(f'{path}: the added token {text!r} (id {i}) has the name of the '
                            f'token {from_printable(text)!r} (id {vocab[text]}) there; rename it, '
                            f'as <|name|>')
        # added tokens stand in the vocabulary too: otherwise tokenizers would number them itself
        vocab[text] = i
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                  'use_regex': False}
    steps = [byte_level]
    if values['pattern'] is not None:
        check_portable(path, values['pattern'])
        steps = [split_by(values['pattern']), byte_level]
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False,
             'ignore_merges': values['ignore_merges'],
             'vocab': dict(sorted(vocab.items(), key=lambda item: item[1])),
             'merges': values['merges']}
    file = hf_file(model, added, {'type': 'Sequence', 'pretokenizers': steps}, byte_level)
    ordinary = {*values.get('visible_tokens', ()), *values.get('added_tokens', ())}
    for token in file['added_tokens']:
        token['special'] = token['content'] not in ordinary
        token |= dict.fromkeys(values.get('token_rules', {}).get(token['content'], ()), True)
    if 'normalizer' in values:
        file['normalizer'] = {'type': values['normalizer']}
    file['post_processor'] = put_bos_first(values)
    return file


def put_bos_first(values: dict) -> dict | None:
    """Return the post_processor that puts the description's bos_token before a text."""
    if not (bos_token := values.get('bos_token')):
        return None
    first, second = ([{'SpecialToken': {'id': bos_token, 'type_id': i}},
                      {'Sequence': {'id': name, 'type_id': i}}] for i, name in enumerate('AB'))
    ids = [values['special_tokens'][bos_token]]
    return {'type': 'TemplateProcessing', 'single': first, 'pair': first + second,
            'special_tokens': {bos_token: {'id': bos_token, 'ids': ids, 'tokens': [bos_token]}}}


def hf_words(values: dict) -> dict:
    """Return the content of the tokenizer.json of a char or word tokenizer.

    A char vocabulary has no unknown token, so that unknown characters are an error there too.
    """
    if values['kind'] == 'char':
        specials, tokens, pattern, unknown = {}, values['chars'], r'[\s\S]', ''
    else:
        specials, tokens = WORD_SPECIALS, [*WORD_SPECIALS, *values['words']]
        pattern, unknown = WORDS, '<|unk|>'
    model = {'type': 'WordLevel', 'vocab': {token: i for i, token in enumerate(tokens)},
             'unk_token': unknown}
    return hf_file(model, specials, split_by(pattern), {'type': 'Fuse'})


def hf_file(model: dict, special_tokens: dict[str, int], pre_tokenizer, decoder) -> dict:
    """Return the content of a tokenizer.json around its model."""
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [{'id': i, 'content': text, 'single_word': False, 'lstrip': False,
                          'rstrip': False, 'normalized': False, 'special': True}
                         for text, i in special_tokens.items()],
        'normalizer': None, 'pre_tokenizer': pre_tokenizer, 'post_processor': None,
        'decoder': decoder, 'model': model}


def split_by(pattern: str) -> dict:
    """Return the pre_tokenizer that cuts text by a pattern."""
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
