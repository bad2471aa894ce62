"""
Read requests in OpenAI's shapes.

    job = read_chat(body, served)    # or read_text(); raises Refused

Reference: platform.openai.com/docs/api-reference, chat/completions and completions. top_k, min_p
and repetition_penalty are those of vLLM's server. A setting that would change the answer and that
is not supported is refused, never ignored.
"""

import functools
import json
import math
import re
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Annotated

from configurator import (
    Count,
    NonNegative,
    Positive,
    Probability,
    Range,
    UserError,
    check_fields,
    nearest,
)
from flatgpt.constrain import Constraint, token_bytes
from flatgpt.sampling import Sampling, uniforms
from posttrain.tools import TOOLS, Tool, Toolbox, calls_tools, toolbox
from tokenizer.chat import (
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    TOOL_TOKENS,
    encode_prompt,
    find_endings,
    render,
)

MOST_CHOICES = 64  # answers to one request
MOST_LISTED = 200_000  # likeliest tokens in a response; to write more stops all other threads
MOST_STOPS, LONGEST_STOP = 16, 200  # stop texts, and characters of each
LONGEST_SCHEMA = 20_000  # characters; a longer one takes seconds to compile
COMPILE_SECONDS, MOST_MEMORY = 5, 2 * 10**9  # of a schema, and bytes
# clients send these; they change no answer here
IGNORED = {'user', 'metadata', 'store', 'service_tier', 'parallel_tool_calls', 'logit_bias',
           'prompt_cache_key', 'safety_identifier', 'presence_penalty', 'frequency_penalty', 'echo',
           'suffix', 'best_of'}
# but other values of some would
NEUTRAL = {'logit_bias': ({},), 'presence_penalty': (0,), 'frequency_penalty': (0,),
           'echo': (False,), 'suffix': ('',), 'best_of': (1,)}


class Refused(UserError):
    """Refuse a request: HTTP status, and OpenAI's param and code."""

    def __init__(self, message, status=400, param=None, code=None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self):
        """Return the body of the response."""
        kinds = {401: 'authentication_error', 403: 'permission_error', 404: 'not_found_error',
                 429: 'rate_limit_error'}
        kind = 'server_error' if self.status >= 500 else kinds.get(
            self.status, 'invalid_request_error')
        return {'error': {'message': str(self), 'type': kind, 'param': self.param,
                          'code': self.code}}


@dataclass
class Controls:
    """Hold the settings that both kinds of requests have. Raises UserError outside a rule."""

    model: str | None = None
    stream: bool = False
    stream_options: dict | None = None
    n: Annotated[int, Range(least=1, most=MOST_CHOICES)] = 1  # answers to each prompt
    max_tokens: Count | None = None  # None: as many as the context holds
    temperature: NonNegative = 1.0
    top_p: Probability = 1.0
    top_k: Annotated[int, Range(least=-1)] = 0  # 0 and -1: all
    min_p: Probability = 0.0
    repetition_penalty: Positive = 1.0
    seed: int | None = None
    stop: str | list | None = None
    response_format: dict | None = None

    def __post_init__(self):
        check_fields(self)


@dataclass
class TextBody(Controls):
    """Hold a request for completions."""

    prompt: str | list = ''
    logprobs: Annotated[int, Range(least=0, most=20)] | None = None


@dataclass
class ChatBody(Controls):
    """Hold a request for an answer in a conversation."""

    messages: list = field(default_factory=list)
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Range(least=0, most=20)] | None = None
    tools: list | None = None
    tool_choice: str | dict | None = None


@dataclass
class Served:
    """Describe the model that is served."""

    name: str
    tokenizer: object
    template: str | None
    context: int  # tokens of a prompt and its answer
    vocab_size: int  # ids that the model takes
    max_seconds: float = math.inf  # of a request
    may_run: str = 'calculator'  # tools that this server runs, as toolbox() takes them
    created: int = field(default_factory=lambda: int(time.time()))

    @functools.cached_property
    def tools(self):
        """Return the Toolbox that this server runs, empty for a model without calls."""
        return toolbox(self.may_run if self.template and calls_tools(self.tokenizer) else '')

    @functools.cached_property
    def endings(self):
        """Return the ids and the texts that end an answer in a conversation."""
        return find_endings(self.template, self.tokenizer)

    @functools.cached_property
    def longest_token(self):
        """Return the most characters that a token stands for."""
        ids = range(self.tokenizer.vocab_size)
        return max(len(token_bytes(self.tokenizer, i)) for i in ids)

    def check_length(self, text):
        """Raise Refused for a text, or ids, that no tokens of the context can hold.

        To encode it first would take time.
        """
        if len(text) > self.context * self.longest_token:
            raise self.too_long(f'over {self.context:,}')

    def too_long(self, n):
        """Return the refusal of a prompt of n tokens."""
        return Refused(f'the prompt has {n} tokens: expected fewer than {self.context:,}, the '
                       f'context of this server', code='context_length_exceeded')

    def to_json(self):
        """Return the model's entry in /v1/models."""
        return {'id': self.name, 'object': 'model', 'created': self.created,
                'owned_by': 'flatgpt', 'max_model_len': self.context,
                'chat': self.template is not None, 'tools': list(self.tools)}


@dataclass
class Job:
    """Hold a request: prompts, each with n answers."""

    kind: str  # 'chat' or 'text'
    body: Controls
    prompts: list  # of lists of ids
    sampling: list  # a Sampling for the answers to each prompt
    n_likeliest: int | None  # tokens to list beside each; None: no log-probabilities
    seed: int
    tools: Toolbox = field(default_factory=Toolbox)  # a function of None: the client runs it
    begun: str = ''  # the part of the answer that the prompt holds and the client has not read
    id: str = ''
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.id = {'chat': 'chatcmpl-', 'text': 'cmpl-'}[self.kind] + secrets.token_hex(12)

    def prompt_of(self, index):
        """Return the prompt, Sampling and random numbers of an answer.

        They are those of sample.py for the same seed.
        """
        prompt, number = divmod(index, self.body.n)
        sampling = self.sampling[prompt]
        return self.prompts[prompt], sampling, uniforms(self.seed, prompt, number,
                                                        sampling.max_new_tokens)


def read_body(kind, body):
    """Return a TextBody or ChatBody of a JSON value. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused(f'the body is {type(body).__name__}: expected a JSON object')
    given = {key: value for key, value in body.items() if value is not None}
    known = {field.name for field in fields(kind)}
    for key, value in given.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            raise Refused(f'{key} is not supported: expected {NEUTRAL[key][0]!r}, or leave it out',
                          param=key)
        if key not in known and key not in IGNORED:
            raise Refused(f'unknown setting {key[:60]!r}{nearest(key[:60], known)}', param=key[:60])
    try:
        return kind(**{key: given[key] for key in given if key in known})
    except UserError as error:
        message = str(error)
        raise Refused(message[:400], param=message.partition('=')[0]) from None


def read_text(body, served):
    """Return the Job of a request for completions. Raises Refused."""
    body = read_body(TextBody, body)
    prompts = body.prompt
    is_one = isinstance(prompts, str) or all(type(i) is int for i in prompts)
    prompts = [prompts] if is_one else prompts
    if len(prompts) * body.n > MOST_CHOICES:
        raise Refused(f'{len(prompts)} prompts with {body.n} answers each: expected at most '
                      f'{MOST_CHOICES} answers', param='prompt')
    ids = [encode(prompt, served) for prompt in prompts]
    return job_of('text', body, served, ids, body.logprobs)


def encode(prompt, served):
    """Return the ids of a text or of a list of ids. Raises Refused."""
    if not prompt:
        raise Refused('prompt is empty: expected a text or ids', param='prompt')
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(
            type(i) is int and 0 <= i < served.vocab_size for i in prompt)):
        raise Refused(f'prompt: expected a text, ids from 0 to {served.vocab_size - 1}, or a list '
                      f'of these', param='prompt')
    served.check_length(prompt)
    try:
        # the limit of the context is checked with all prompts
        return encode_prompt(prompt, served.tokenizer, sys.maxsize)
    except ValueError as error:
        raise Refused(str(error), param='prompt') from None


def read_chat(body, served):
    """Return the Job of a request for an answer in a conversation. Raises Refused."""
    body = read_body(ChatBody, body)
    if body.top_logprobs and not body.logprobs:
        raise Refused('top_logprobs is set: expected "logprobs": true too', param='top_logprobs')
    tools = read_tools(body, served)
    ids = render_chat(body.messages, tools, served)
    forced = forced_call(body.tool_choice, tools)
    ids += served.tokenizer.encode_parts(forced, [PYTHON])
    job = job_of('chat', body, served, [ids], (body.top_logprobs or 0) if body.logprobs else None)
    job.tools, job.begun = tools, forced
    if forced:  # only the end of the call ends the answer
        job.sampling = [replace(job.sampling[0], stop_ids=set(), stops=[])]
    return job


def forced_call(choice, tools):
    """Return the beginning of the call that a tool_choice requires, or ''."""
    if not tools or choice in (None, 'auto'):
        return ''
    name = choice['function']['name'] if isinstance(choice, dict) else [*tools][0]
    is_known = len(tools) == 1 or isinstance(choice, dict)
    return PYTHON + (tools.join(tools[name], '').rstrip() if is_known else '')


def render_chat(messages, tools, served):
    """Return the ids of a conversation. tools: those that its next answer may call."""
    if len(messages) >= served.context:  # each has a token; to render them first takes seconds
        raise served.too_long(f'over {len(messages):,}')
    try:
        messages, begun = plain_messages(messages, tools)
        if tools:
            has_system = bool(messages) and messages[0]['role'] == 'system'
            first = messages[0]['content'] if has_system else ''
            messages = [{'role': 'system', 'content': f'{first} {tools.system}'.strip()},
                        *messages[has_system:]]
        served.check_length(''.join(message['content'] for message in messages) + begun)
        ids = render(messages, served.template, served.tokenizer)
        return ids + served.tokenizer.encode_parts(
            begun, [token for token in TOOL_TOKENS if token in served.tokenizer.special_tokens])
    except Refused:
        raise
    except ValueError as error:
        raise Refused(str(error)[:400], param='messages') from None


def plain_messages(messages, tools):
    """Return messages as tokenizer.chat takes them, and the answer that a tool's result begins.

    A developer is a system, parts of a text are joined, and calls of tools with their results are
    text of the assistant, as the models of this project write them. tools: a Toolbox.
    Raises Refused.
    """
    plain = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise Refused(f'message {number}: expected {{"role": ..., "content": ...}}',
                          param='messages')
        role, content = message.get('role'), text_of(message.get('content'), number)
        role = 'system' if role == 'developer' else role
        last = plain[-1] if plain and plain[-1]['role'] == 'assistant' else {'content': ''}
        if role == 'tool':
            if not last['content'].endswith(PYTHON_END):
                raise Refused(f"message {number} is of a tool: expected the assistant's tool_calls "
                              f'before it', param='messages')
            last['content'] += OUTPUT + without_tokens(content, number) + OUTPUT_END
            continue
        calls = message.get('tool_calls') or []
        for call in calls if isinstance(calls, list) else [calls]:
            text = without_tokens(text_of_call(call, tools, number), number)
            content += PYTHON + text + PYTHON_END
        if role == 'assistant' and last['content'].endswith(OUTPUT_END):
            last['content'] += content
        else:
            plain.append({'role': role, 'content': content})
    if plain and plain[-1]['role'] == 'assistant' and plain[-1]['content'].endswith(OUTPUT_END):
        return plain[:-1], plain[-1]['content']
    return plain, ''


def text_of(content, number):
    """Return the text of a message's content: a text, parts of type text, or None."""
    if content is None or isinstance(content, str):
        return content or ''
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and part.get('type') == 'text'
               and isinstance(part.get('text'), str) for part in parts):
        raise Refused(f'message {number}: the content is no text: expected a text, or parts of '
                      f'{{"type": "text", "text": ...}}', param='messages')
    return ''.join(part['text'] for part in parts)


def text_of_call(call, tools, number):
    """Return a call of tool_calls as the model writes it."""
    try:
        name, arguments = call['function']['name'], call['function']['arguments']
        tool = tools.get(name) or TOOLS.get(name) or Tool(str(name), '', {})
        return tools.join(tool, tool.from_json(arguments))
    except (KeyError, TypeError, UserError) as error:
        why = error if isinstance(error, UserError) else 'such as {"expression": "2 + 3"}'
        raise Refused(f'message {number}: expected tool_calls as this server writes them, with '
                      f'arguments {str(why)[:200]}', param='messages') from None


def without_tokens(text, number):
    """Return a text that stands between tokens of a call. Raises Refused if it has some."""
    if not isinstance(text, str) or any(token in text for token in TOOL_TOKENS):
        raise Refused(f"message {number}: a tool's text has {', '.join(TOOL_TOKENS)} in it, or is "
                      f'no text', param='messages')
    return text


def read_tools(body, served):
    """Return the Toolbox that an answer may call.

    {"type": "calculator"} is run here; {"type": "function", ...} ends the answer, and the client
    sends the result. Raises Refused for an unknown one.
    """
    tools = Toolbox()
    for tool in body.tools or ():
        kind = tool.get('type') if isinstance(tool, dict) else None
        function = tool.get('function') if kind == 'function' else None
        name = function.get('name') if isinstance(function, dict) else kind
        tool = read_function(function) if kind == 'function' else served.tools.get(
            name if isinstance(name, str) else '')
        if not (tool and served.template and calls_tools(served.tokenizer)):
            able = ', '.join(served.tools) or 'none, for this model was trained with none'
            raise Refused(f'tools: {str(name)[:60]!r} is unknown; known are: {able}',
                          param='tools')
        tools[tool.name] = tool
    choice = body.tool_choice
    name = choice.get('function', {}).get('name') if isinstance(choice, dict) and isinstance(
        choice.get('function', {}), dict) else None
    if choice not in (None, 'none', 'auto', 'required') and name not in list(tools):
        raise Refused('tool_choice: expected "none", "auto", "required", or a function of tools',
                      param='tool_choice')
    return Toolbox() if choice == 'none' else tools


def read_function(function):
    """Return the Tool of a function that the client runs, or None if it is unknown.

    One of posttrain.tools needs a name alone, any other "parameters".
    """
    match function:
        case {'name': 'calculator'}:
            return replace(TOOLS['calculator'], function=None)
        case {'name': str(name), 'parameters': {'properties': dict(properties)} as parameters} if (
                re.fullmatch('[A-Za-z0-9_-]{1,64}', name)
                and all(isinstance(schema, dict) for schema in properties.values())):
            return Tool(name, str(function.get('description') or ''), parameters)
        case {'name': 'python' as name}:
            return replace(TOOLS[name], function=None)
    return None


def job_of(kind, body, served, prompts, n_likeliest):
    """Return the Job of prompts (ids). Raises Refused for one that does not fit."""
    if body.model not in (None, served.name):
        raise Refused(f'the model {body.model[:60]!r} does not exist; expected {served.name!r}',
                      404, 'model', 'model_not_found')
    if (longest := max(map(len, prompts))) >= served.context:
        raise served.too_long(f'{longest:,}')
    asked = getattr(body, 'max_completion_tokens', None) or body.max_tokens or math.inf
    stops, stop_ids = read_stops(body.stop), set()
    schema = read_format(body.response_format)
    if schema and stops:
        raise Refused('stop is set beside response_format, which ends the text itself; leave one '
                      'out', param='stop')
    if kind == 'chat':
        stop_ids, endings = served.endings
        stops += endings * (schema is None)
    constraint = schema and constraint_of(served, schema)
    samplings = []
    for ids in prompts:
        n = int(min(asked, served.context - len(ids)))
        if constraint:
            check_room(constraint, n)
        samplings.append(Sampling(
            n, body.temperature, max(0, body.top_k), max(body.top_p, 1e-9), body.min_p,
            body.repetition_penalty, stop_ids=stop_ids, stops=stops, constraint=constraint))
    n_listed = body.n * sum(each.max_new_tokens for each in samplings) * (n_likeliest or 0)
    if n_listed > MOST_LISTED and not body.stream:
        raise Refused(f'up to {n_listed:,} log-probabilities: expected at most {MOST_LISTED:,}; '
                      f'set a smaller max_tokens, or "stream": true', param='max_tokens')
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    return Job(kind, body, prompts, samplings, n_likeliest, seed)


def read_stops(stop):
    """Return the stop texts. Raises Refused."""
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if len(stops) > MOST_STOPS or not all(
            isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stops):
        raise Refused(f'stop: expected at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} '
                      f'characters', param='stop')
    return stops


def read_format(response_format):
    """Return the JSON schema of a response_format as text, or None. Raises Refused."""
    match response_format:
        case None | {'type': 'text'}:
            return None
        case {'type': 'json_object'}:
            schema = {'type': 'object'}
        case {'type': 'json_schema', 'json_schema': {'schema': dict(schema)}}:
            pass
        case _:
            raise Refused('response_format: expected {"type": "json_object"} or {"type": '
                          '"json_schema", "json_schema": {"schema": {...}}}',
                          param='response_format')
    if len(text := json.dumps(schema)) > LONGEST_SCHEMA:
        raise Refused(f'response_format: the schema has {len(text):,} characters: expected at most '
                      f'{LONGEST_SCHEMA:,}', param='response_format')
    return text


def constraint_of(served, schema):
    """Return the Constraint of a schema. Raises Refused."""
    try:
        return compiled(served.tokenizer, schema)
    except UserError as error:
        raise Refused(str(error)[:400], param='response_format') from None


@functools.lru_cache(maxsize=16)
def compiled(tokenizer, schema):
    """Return the Constraint of a schema's text; it may take seconds."""
    try_grammar(schema)
    return Constraint(tokenizer, json_schema=schema)


TRIAL = f'''
import resource, sys, llguidance
resource.setrlimit(resource.RLIMIT_AS, ({MOST_MEMORY}, {MOST_MEMORY}))
llguidance.LLMatcher.validate_grammar('start: %json ' + sys.stdin.read())
'''


def try_grammar(schema):
    """Raise UserError for a schema that llguidance cannot compile in bounded time and memory.

    A process tries it: schemas of 1 kB exist that take hours and all memory, and no thread can be
    stopped. Errors of other kinds are left to Constraint.
    """
    if sys.platform == 'win32':  # it has no resource
        return
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run([sys.executable, '-c', TRIAL], input=schema.encode(),
                              stderr=subprocess.DEVNULL, timeout=COMPILE_SECONDS)
        if done.returncode >= 0:  # below: ended by a signal, as where memory runs out
            return
    raise UserError('the schema is too hard to compile; simplify it')


def check_room(constraint, n):
    """Raise Refused if no match has n tokens."""
    try:
        constraint.check_length(n)
    except UserError as error:
        raise Refused(str(error).replace('--max_new_tokens', 'max_tokens').replace(
            'max_new_tokens', 'max_tokens'), param='max_tokens') from None
