"""
Render conversations to ids: a prompt for an answer, or ids and loss mask.

    ids = render([{'role': 'user', 'content': 'Hello'}], template, tokenizer)
    ids, mask = render_conversation([{'role': 'user', 'content': 'Hello'},
                                     {'role': 'assistant', 'content': 'Hi!'}], template, tokenizer)
    stop_ids, stop_texts = find_endings(template, tokenizer)

A template is Jinja, as Hugging Face's; the ids are those of transformers' apply_chat_template().
TEMPLATE is the default for models trained here. Without a template a transcript is rendered; any
model of text can continue it:

    User: Hello
    Assistant:
"""

import functools
import json
import re

from configurator import UserError
from tokenizer.patterns import split_specials
from tokenizer.tokenizer_json import DOCUMENT_ENDS

NAMES = {'user': 'User', 'assistant': 'Assistant'}  # in a transcript
ROLES = ('system', 'user', 'assistant', 'tool')
# Names of special tokens that begin a text or end an answer; few tokenizers mark them.
BEGINNINGS = ('<|begin_of_text|>', '<s>', '<|endoftext|>')  # Llama 3, Mistral, GPT-2
ENDINGS = ('<|im_end|>', '<|eot_id|>', '</s>', *DOCUMENT_ENDS)  # Qwen and SmolLM2, Llama 3, Mistral
THOUGHTS = ('<think>', '</think>')  # some templates drop the text between them
# An assistant writes Python between the first two; between the others it gets the result.
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = TOOL_TOKENS = (
    '<|python|>', '<|python_end|>', '<|output|>', '<|output_end|>')
# TEMPLATE's tokens. Every turn begins and ends with one, so that an answer has the same ids
# whatever stands around it.
SPECIAL_TOKENS = ('<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|tool|>',
                  '<|im_end|>', *TOOL_TOKENS)
TEMPLATE = """\
{{- '<|endoftext|>' }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.role == 'assistant' %}
        {%- for part in message.content.split('<|output|>') %}
            {%- set told = 0 if loop.first else (part.split('<|output_end|>')[0] + '<|output_end|>') | length %}
            {%- if not loop.first %}{{ '<|output|>' + part[:told] }}{% endif %}
            {%- generation %}{{ part[told:] }}{% endgeneration %}
        {%- endfor %}
        {%- generation %}{{ '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""  # noqa: E501 (checkpoints hold it as it is)


def bos_ids(tokenizer):
    """Return [the id before every text], as Llama 3 has one, or []."""
    bos = tokenizer.special_tokens.get(tokenizer.bos_token)
    return [] if bos is None else [bos]


def encode_prompt(prompt, tokenizer, block_size, crop_prompt=False):
    """Encode a prompt -> ids. A special token in a text is one token; ids stay.

    Raises UserError for no ids, and for more than block_size unless crop_prompt keeps the last.
    """
    is_text = isinstance(prompt, str)
    ids = tokenizer.encode(prompt, allowed_special='all') if is_text else list(prompt)
    if not ids:
        raise UserError('the prompt is empty: expected at least one token, such as --start="The"')
    if is_text and ids[:1] != bos_ids(tokenizer):
        ids = bos_ids(tokenizer) + ids
    if len(ids) > block_size and not crop_prompt:
        raise UserError(f'the prompt has {len(ids):,} tokens: expected at most {block_size:,}, the '
                        f'context of the model; --crop_prompt=True keeps its end')
    return ids[-block_size:]


def render(messages, template, tokenizer):
    """Render messages to the ids that the assistant's answer continues.

    messages: [{'role', 'content'}]; the last one is not the assistant's. template: Jinja, or None
    for a transcript. Special tokens in a content become ordinary text, so that nobody can end a
    turn and speak as another role. Raises UserError for other messages, and with the
    template's own message for one that it refuses.
    """
    check_messages(messages)
    if messages[-1]['role'] == 'assistant':
        raise UserError("the last message is the assistant's own; expected one that it can answer")
    if template is None:
        return bos_ids(tokenizer) + tokenizer.encode(transcript(messages), allowed_special='none')
    hidden, shown, _ = hide_specials(messages, tokenizer)
    return encode_rendered(apply_template(template, tokenizer, hidden, True), shown, tokenizer)


def render_conversation(messages, template, tokenizer):
    """Render a whole conversation to (ids, mask), two lists of one length.

    mask is 1 for the assistant's text and the token that ends it, which carry loss; 0 for all
    others, and for the output of tools. A message with a "weight" of 0 carries no loss. Raises
    UserError for other messages, and where the answers cannot be found in the text.
    """
    check_conversation(messages)
    hidden, shown, marks = hide_specials(messages, tokenizer)
    text = apply_template(template, tokenizer, hidden, False, marks)
    # the template marks the answers, or else they are searched
    if compiled(template, *marks).environment.has_marks:
        parts = re.split(f'[{"".join(marks)}]', text)
    else:
        parts = find_answers(text, hidden, template, tokenizer)
    unweighted = []  # ranges of the text
    for i, message in enumerate(messages):
        if message['role'] == 'assistant' and message.get('weight') == 0:
            before, after = (apply_template(template, tokenizer, hidden[:n], False)
                             for n in (i, i + 1))
            if not (after.startswith(before) and ''.join(parts).startswith(after)):
                raise UserError(f'message {i + 1} has a weight of 0, and the chat template writes '
                                f'it differently once the conversation goes on, so its place '
                                f'cannot be found')
            unweighted.append(range(len(before), len(after)))
    ids, mask, position = [], [], 0
    for i, part in enumerate(parts):
        part_ids = encode_rendered(part, shown, tokenizer)
        ids += part_ids
        is_learnt = i % 2 and not any(position in span for span in unweighted)
        mask += not_output(part_ids, tokenizer) if is_learnt else [0] * len(part_ids)
        position += len(part)
    return ids, mask


def find_answers(text, messages, template, tokenizer):
    """Cut the text of a conversation into parts, of which the odd ones are answers.

    An answer is the text that its message adds, up to the token that ends it.
    """
    parts, done = [], 0
    ending_ids, _ = find_endings(template, tokenizer)
    endings = [token for token, i in tokenizer.special_tokens.items() if i in ending_ids]
    for i, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        before = apply_template(template, tokenizer, messages[:i], True)
        after = apply_template(template, tokenizer, messages[: i + 1], False)
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            raise UserError('the chat template writes an answer differently once the conversation '
                            'goes on, so it cannot be found in the text; put {% generation %} and '
                            '{% endgeneration %} around it in the template')
        answer = text[len(before) : len(after)]
        length = max((answer.rindex(token) + len(token) for token in endings if token in answer),
                     default=len(answer))
        parts += [text[done : len(before)], answer[:length]]
        done = len(before) + length
    return [*parts, text[done:]]


def not_output(ids, tokenizer):
    """Return the mask of an answer: 0 from each OUTPUT to the next OUTPUT_END, else 1."""
    mask, inside = [], False
    for i in ids:
        inside = inside or i == tokenizer.special_tokens.get(OUTPUT)
        mask.append(0 if inside else 1)
        inside = inside and i != tokenizer.special_tokens.get(OUTPUT_END)
    return mask


def hide_specials(messages, tokenizer):
    """Replace each special token in a content by a private character.

    The template still finds the rest of the content as it is: it may strip it or look into it. An
    assistant keeps its thoughts and calls of tools. Returns (messages, {character: token} for
    str.translate(), two more characters that no content has).
    """
    contents = ''.join(message['content'] for message in messages)
    free = (char for char in map(chr, range(0xF0000, 0x10FFFE)) if char not in contents)
    marks = next(free), next(free)
    stand_ins = dict(zip(tokenizer.special_tokens, free, strict=False))

    def hide(message):
        kept = (*THOUGHTS, *TOOL_TOKENS) if message['role'] == 'assistant' else ()
        parts = split_specials(message['content'],
                               [token for token in stand_ins if token not in kept])
        content = ''.join(stand_ins[part] if i % 2 else part for i, part in enumerate(parts))
        return {'role': message['role'], 'content': content}

    shown = {ord(char): token for token, char in stand_ins.items()}
    return [hide(message) for message in messages], shown, marks


def encode_rendered(text, shown, tokenizer):
    """Encode a template's text; `shown`: the characters of hide_specials()."""
    ids = []
    for i, part in enumerate(split_specials(text, list(tokenizer.special_tokens))):
        if i % 2:
            ids.append(tokenizer.special_tokens[part])
        else:
            ids += tokenizer.encode(part.translate(shown), allowed_special='none')
    return ids


def check_messages(messages):
    """Raise UserError unless these are messages."""
    if not isinstance(messages, list) or not messages:
        raise UserError('messages are a list of at least one, such as '
                        '[{"role": "user", "content": "Hello"}]')
    for message in messages:
        role, content = ((message.get('role'), message.get('content'))
                         if isinstance(message, dict) else (None, None))
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f'{json.dumps(message)[:60]} is no message, role={role!r}; expected a '
                            f'role, one of {", ".join(ROLES)}, and a text, such as '
                            f'{{"role": "user", "content": "Hello"}}')


def check_conversation(messages):
    """Raise UserError unless turns alternate and end with an answer to learn."""
    check_messages(messages)
    roles = [message['role'] for message in messages]
    n_system = roles[0] == 'system'
    turns = roles[n_system:]
    if 'system' in turns:
        raise UserError('a system message comes first or not at all')
    for i, (role, following) in enumerate(zip(turns, turns[1:], strict=False), 1 + n_system):
        if role == following:
            raise UserError(f'messages {i} and {i + 1} are both of role {role!r}; expected turns: '
                            f'join the two')
    if not turns or turns[0] == 'assistant':
        raise UserError('nobody has spoken before the assistant; expected a message of the user '
                        'first')
    if turns[-1] != 'assistant':
        raise UserError(f"the last message is of role {turns[-1]!r}; expected the assistant's "
                        f'answer to learn from')
    for i, message in enumerate(messages, 1):
        if message.get('weight') not in (None, 0, 1):
            raise UserError(f'message {i} has a weight of {json.dumps(message["weight"])[:20]}; '
                            f'expected 0, not to be learnt, or 1')
        if message['role'] != 'assistant':
            continue
        content = message['content']
        if not content.strip():
            raise UserError(f'message {i}, an answer of the assistant, is empty; there is nothing '
                            f'to learn from it')
        if content.rfind(OUTPUT) > content.rfind(OUTPUT_END):
            raise UserError(f'message {i}, an answer of the assistant, has an {OUTPUT} without an '
                            f"{OUTPUT_END}, so the end of the tool's output is unknown; close it")


def transcript(messages):
    """Write messages as the text that a model without a template continues."""
    lines = []
    for message in messages:
        content = message['content'].strip()
        name = NAMES.get(message['role'])
        lines.append(f'{name}: {content}\n' if name else f'{content}\n\n')
    return ''.join(lines) + 'Assistant:'


def ends_of_text(tokenizer):
    """Return a template's bos_token and eos_token, found by name, or ''."""
    def first_of(names):
        return next((name for name in names if name in tokenizer.special_tokens), '')

    return tokenizer.bos_token or first_of(BEGINNINGS), first_of(ENDINGS)


def apply_template(template, tokenizer, messages, add_generation_prompt, marks=('', '')):
    """Render messages to text, with {% generation %} parts between the marks."""
    bos_token, eos_token = ends_of_text(tokenizer)
    try:
        from tokenizer import sandbox

        return sandbox.render(
            compiled(template, *marks), messages, add_generation_prompt=add_generation_prompt,
            tools=None, documents=None, bos_token=bos_token, eos_token=eos_token)
    except Exception as error:  # Jinja's, the template's own, or from its operations on messages
        raise UserError(f"the model's chat template cannot render this conversation: "
                        f'{error}') from error


@functools.lru_cache(maxsize=4)
def compiled(template, begin='', end=''):
    """Compile a template with the functions that transformers gives it.

    It writes begin and end around {% generation %} parts. A template comes with a model, from
    anybody, so it runs in a sandbox.
    """
    from jinja2 import ext, nodes

    from tokenizer import sandbox

    class Generation(ext.Extension):
        """Parse {% generation %} ... {% endgeneration %}, the marks of answers."""

        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            self.environment.has_marks = True
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            call = self.call_method('enclose')
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def enclose(self, caller):
            return begin + caller() + end

    return sandbox.compile_template(template, [Generation])


def find_endings(template, tokenizer):
    """Find the ends of an answer: (ids, texts).

    The ids are the usual special tokens and those the template writes after an answer.
    """
    ids = {i for token, i in tokenizer.special_tokens.items() if token in ENDINGS}
    if template is None:
        return ids, ['\nUser:']
    question, answer = '\U000f0000', '\U000f0001'
    user = {'role': 'user', 'content': question}
    messages = [user, {'role': 'assistant', 'content': answer}, user]
    text = apply_template(template, tokenizer, messages, add_generation_prompt=False)
    after = text.rpartition(answer)[2].partition(question)[0]
    words, *special = split_specials(after, list(tokenizer.special_tokens))
    if special and not words.strip():
        ids.add(tokenizer.special_tokens[special[0]])
    return ids, [words.rstrip()] if words.strip() else []
