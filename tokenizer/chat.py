"""
Conversations: from messages to the ids that an assistant's answer continues, or to those that a model learns from, and
the loop at the terminal.

    ids = render([{'role': 'user', 'content': 'Hello'}], template, tokenizer)
    ids, mask = render_conversation([{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Hi!'}],
                                    template, tokenizer)
    stop_ids, stop_texts = find_endings(template, tokenizer)

A template is one of Hugging Face's, in Jinja; render() gives the ids that transformers' apply_chat_template() does.
TEMPLATE is that of the models that are trained here. A model without one gets a transcript, which any model of text can
go on with:

    User: Hello
    Assistant:
"""

import functools
import json
import re
from datetime import datetime

from configurator import UserError
from tokenizer.formats import DOCUMENT_ENDS
from tokenizer.patterns import split_specials

NAMES = {'user': 'User', 'assistant': 'Assistant'}  # in a transcript
ROLES = ('system', 'user', 'assistant', 'tool')
# Most tokenizers do not say what their special tokens are for: by name, those that begin a text, or end an answer
BEGINNINGS = ('<|begin_of_text|>', '<s>', '<|endoftext|>')  # of Llama 3, Mistral, GPT-2
ENDINGS = ('<|im_end|>', '<|eot_id|>', '</s>', *DOCUMENT_ENDS)  # first Qwen's and SmolLM2's, Llama 3's, Mistral's
THOUGHTS = ('<think>', '</think>')  # templates look for these in an answer, to forget what is between them
# an assistant may compute: between the first two it writes what, between the others it is told the result
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = TOOL_TOKENS = ('<|python|>', '<|python_end|>', '<|output|>', '<|output_end|>')
# What a tokenizer needs for TEMPLATE, in which every turn begins and ends with a special token, so that an answer is
# the same tokens whatever stands around it
SPECIAL_TOKENS = ('<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|tool|>', '<|im_end|>', *TOOL_TOKENS)
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
"""

# From messages to ids ------------------------------------------------------------------------------------------------


def render(messages, template, tokenizer):
    """
    Messages, dicts with role and content, the last one not the assistant's, -> the ids after which the answer comes.
    template: Jinja's, or None for a transcript. What reads like a special token in a content is ordinary text, so that
    nobody can end his turn and speak as another one. Raises ValueError for what is no conversation, and with the
    template's own words for one that it refuses.
    """
    check_messages(messages)
    if messages[-1]['role'] == 'assistant':
        raise UserError("the last message is the assistant's own; expected one that it can answer")
    if template is None:
        return bos_ids(tokenizer) + tokenizer.encode(transcript(messages), allowed_special='none')
    hidden, shown, _ = hide_specials(messages, tokenizer)
    return encode_rendered(apply_template(template, tokenizer, hidden, add_generation_prompt=True), shown, tokenizer)


def render_conversation(messages, template, tokenizer):
    """
    A whole conversation -> (ids, mask), lists of one length: mask is 1 for what the assistant says and the token that
    ends it, which carry loss when a model learns to answer; 0 for all others, also for what a tool told it.

    What the assistant says is what the template has in {% generation %}, or else what it adds to the conversation
    before that answer. A message with a "weight" of 0 carries no loss. Raises ValueError for what is no conversation,
    or where that can't be told.
    """
    check_conversation(messages)
    hidden, shown, (begin, end) = hide_specials(messages, tokenizer)
    if re.search(r'\{%[-+]?\s*generation\b', re.sub(r'\{#.*?#\}', '', template, flags=re.DOTALL)):
        text = apply_template(template, tokenizer, hidden, add_generation_prompt=False, marks=(begin, end))
        parts = re.split(f'[{begin}{end}]', text)
    else:
        parts, text, done = [], apply_template(template, tokenizer, hidden, add_generation_prompt=False), 0
        ending_ids, _ = find_endings(template, tokenizer)
        for i in (i for i, message in enumerate(hidden) if message['role'] == 'assistant'):
            before = apply_template(template, tokenizer, hidden[:i], add_generation_prompt=True)
            after = apply_template(template, tokenizer, hidden[: i + 1], add_generation_prompt=False)
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise UserError('the chat template writes an answer in another way once the conversation goes on, so '
                                 'that what the assistant says can not be told; put {% generation %} and '
                                 '{% endgeneration %} around it in the template')
            answer = text[len(before) : len(after)]  # up to the token that ends it
            ends = [answer.rindex(token) + len(token) for token, i in tokenizer.special_tokens.items()
                    if i in ending_ids and token in answer]
            length = max(ends, default=len(answer))
            parts += [text[done : len(before)], answer[:length]]
            done = len(before) + length
        parts.append(text[done:])
    unweighted = []  # from where to where in the text
    for i, message in enumerate(messages):
        if message['role'] != 'assistant' or message.get('weight') != 0:
            continue
        before, after = (apply_template(template, tokenizer, hidden[:n], add_generation_prompt=False)
                         for n in (i, i + 1))
        if not (after.startswith(before) and ''.join(parts).startswith(after)):
            raise UserError(f'message {i + 1} has a weight of 0, and the chat template writes it in another way once '
                             f'the conversation goes on, so that where it is can not be told')
        unweighted.append(range(len(before), len(after)))
    ids, mask, at = [], [], 0
    for i, part in enumerate(parts):
        part_ids = encode_rendered(part, shown, tokenizer)
        ids += part_ids
        is_learnt = i % 2 and not any(at in span for span in unweighted)
        mask += not_told(part_ids, tokenizer) if is_learnt else [0] * len(part_ids)
        at += len(part)
    return ids, mask


def not_told(ids, tokenizer):
    """ids of an answer -> a list of 0 from each OUTPUT to the next OUTPUT_END, both included, and of 1 elsewhere."""
    mask, inside = [], False
    for i in ids:
        inside = inside or i == tokenizer.special_tokens.get(OUTPUT)
        mask.append(0 if inside else 1)
        inside = inside and i != tokenizer.special_tokens.get(OUTPUT_END)
    return mask


def hide_specials(messages, tokenizer):
    """
    Each special token in a content becomes a private character that stands for it until the template's own are ids;
    the content is otherwise what the template expects: it may strip it, or look into it. An assistant's thoughts and
    calls of tools stay what they are. -> (messages, {character: token} as str.translate() takes it, two more
    characters that no content has).
    """
    contents = ''.join(message['content'] for message in messages)
    free = (char for char in map(chr, range(0xF0000, 0x10FFFE)) if char not in contents)
    marks = next(free), next(free)
    stand_ins = dict(zip(tokenizer.special_tokens, free, strict=False))

    def hide(message):
        own = (*THOUGHTS, *TOOL_TOKENS) if message['role'] == 'assistant' else ()
        parts = split_specials(message['content'], [token for token in stand_ins if token not in own])
        content = ''.join(stand_ins[part] if i % 2 else part for i, part in enumerate(parts))
        return {'role': message['role'], 'content': content}

    return [hide(message) for message in messages], {ord(char): token for token, char in stand_ins.items()}, marks


def encode_rendered(text, shown, tokenizer):
    """What a template wrote -> ids. Those in `shown`, see hide_specials(), are ordinary text."""
    ids = []
    for i, part in enumerate(split_specials(text, list(tokenizer.special_tokens))):
        if i % 2:
            ids.append(tokenizer.special_tokens[part])
        else:
            ids += tokenizer.encode(part.translate(shown), allowed_special='none')
    return ids


def check_messages(messages):
    """ValueError unless these are messages."""
    if not isinstance(messages, list) or not messages:
        raise UserError('messages are a list of at least one, such as [{"role": "user", "content": "Hello"}]')
    for message in messages:
        role, content = (message.get('role'), message.get('content')) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f'{json.dumps(message)[:60]} is no message, role={role!r}; expected a role, one of '
                             f'{", ".join(ROLES)}, and a text, such as {{"role": "user", "content": "Hello"}}')


def check_conversation(messages):
    """ValueError unless a model can learn from these messages: somebody speaks, the assistant answers, and so on."""
    check_messages(messages)
    roles = [message['role'] for message in messages]
    spoken = roles[1:] if roles[0] == 'system' else roles
    if 'system' in spoken:
        raise UserError('a system message comes first or not at all')
    for i, (role, following) in enumerate(zip(spoken, spoken[1:], strict=False), start=1 + len(roles) - len(spoken)):
        if role == following:
            raise UserError(f'messages {i} and {i + 1} are both of role {role!r}; expected turns, join the two')
    if not spoken or spoken[0] == 'assistant':
        raise UserError('nobody has spoken before the assistant; expected a message of the user first')
    if spoken[-1] != 'assistant':
        raise UserError(f"the last message is of role {spoken[-1]!r}; expected the assistant's answer to learn from")
    for i, message in enumerate(messages, 1):
        if message['role'] == 'assistant' and not message['content'].strip():
            raise UserError(f'message {i}, an answer of the assistant, is empty; there is nothing to learn from it')
        if message.get('weight') not in (None, 0, 1):
            raise UserError(f'message {i} has a weight of {json.dumps(message["weight"])[:20]}; expected 0, not to be '
                             f'learnt, or 1')
        if message['role'] == 'assistant' and message['content'].rfind(OUTPUT) > message['content'].rfind(OUTPUT_END):
            raise UserError(f'message {i}, an answer of the assistant, has an {OUTPUT} without an {OUTPUT_END}, so '
                             f'that where a tool ends can not be told; close it')


def transcript(messages):
    """What a model without a template continues."""
    lines = [f'{NAMES[message["role"]]}: {message["content"].strip()}\n' if message['role'] in NAMES else
             f'{message["content"].strip()}\n\n' for message in messages]
    return ''.join(lines) + 'Assistant:'


def ends_of_text(tokenizer):
    """-> what a template knows as bos_token and eos_token, by name, '' where there is none."""
    def named(names):
        return next((name for name in names if name in tokenizer.special_tokens), '')

    return tokenizer.bos_token or named(BEGINNINGS), named(ENDINGS)


def apply_template(template, tokenizer, messages, add_generation_prompt, marks=('', '')):
    """-> text, in which special tokens are spelt out, and what {% generation %} encloses stands between the marks."""
    bos_token, eos_token = ends_of_text(tokenizer)
    try:
        return compiled(template, *marks).render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
            bos_token=bos_token, eos_token=eos_token)
    except Exception as error:  # of Jinja, of the template, or of what it does to the messages
        raise UserError(f"the model's chat template can not render this conversation: {error}") from error


@functools.lru_cache(maxsize=4)
def compiled(template, begin='', end=''):
    """
    A template, with what transformers offers to it; it writes begin and end around what {% generation %} encloses. It
    comes with a model, from anybody, hence the sandbox.
    """
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}, which some templates have around what the assistant says."""

        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method('enclose'), [], [], body).set_lineno(line)

        def enclose(self, caller):
            return begin + caller() + end

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, 'jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)


def find_endings(template, tokenizer):
    """-> (ids, texts) that end an answer: the usual special tokens, and what the template writes after an answer."""
    ids = {i for token, i in tokenizer.special_tokens.items() if token in ENDINGS}
    if template is None:
        return ids, ['\nUser:']
    question, answer = '\U000f0000', '\U000f0001'
    messages = [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer},
                {'role': 'user', 'content': question}]
    text = apply_template(template, tokenizer, messages, add_generation_prompt=False)
    after = text.rpartition(answer)[2].partition(question)[0]
    words, *special = split_specials(after, list(tokenizer.special_tokens))
    if special and not words.strip():
        ids.add(tokenizer.special_tokens[special[0]])
    return ids, [words.rstrip()] if words.strip() else []


# At the terminal -----------------------------------------------------------------------------------------------------


def bos_ids(tokenizer):
    """[the id that a model such as Llama 3 has seen before every text], or [] where there is none."""
    bos = tokenizer.special_tokens.get(tokenizer.bos_token)
    return [] if bos is None else [bos]
