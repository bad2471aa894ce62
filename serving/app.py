"""
Answer HTTP requests: OpenAI's API, /health, /metrics, and the chat page at /.

    app = make_app(engine, served, Guard(hosts={'localhost'}))    # an ASGI app

Streams are server-sent events. A client that goes away frees its rows within one token. Reference:
platform.openai.com/docs/api-reference.
"""

import asyncio
import hmac
import ipaddress
import json
import math
import re
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from configurator import UserError
from flatgpt.constrain import token_bytes
from flatgpt.jsonl import to_line
from flatgpt.policy import policy_of
from serving import protocol, responses
from serving.engine import Answer, Full
from serving.guardrail import CHARACTERS
from serving.protocol import Refused
from serving.responses import Part
from tokenizer.chat import OUTPUT_END, PYTHON, PYTHON_END

MOST_BYTES = 1_000_000  # of a request's body; to parse it stops all other threads
BODY_SECONDS = 30  # to send it
MOST_REQUESTS = 256  # at once, those that wait included
STATUSES = {'error': 500, 'unavailable': 503, 'refused': 400}  # of News that end an answer
PAGE = Path(__file__).with_name('page.html')


# Requests -----------------------------------------------------------------------------------------


async def read_json(request):
    """Return the JSON value of a request's body. Raises Refused."""
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for block in request.stream():
                body += block
                if len(body) > MOST_BYTES:
                    raise Refused(f'the body is too large: expected at most {MOST_BYTES:,} bytes',
                                  413)
    except ClientDisconnect:
        raise Refused('the client has gone', 499) from None
    except TimeoutError:
        raise Refused(f'the body took over {BODY_SECONDS} s to arrive', 408) from None
    try:
        return json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f'the body is not JSON: {str(error)[:100]}') from None


def refuse_constant(name):
    raise ValueError(f'{name} is no JSON number')


class Json(JSONResponse):
    """Respond with JSON, in which half a surrogate pair stays escaped."""

    def render(self, content):
        return to_line(content)


@dataclass(eq=False)
class Choice:
    """Follow one answer of a job: from the engine's News to Parts of a response."""

    server: object  # Server
    job: protocol.Job
    index: int
    n_tokens: int = 0
    text: str = ''
    n_sent: int = 0  # characters

    def __post_init__(self):
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()
        prompt, sampling, u = self.job.prompt_of(self.index)
        if self.job.tools:  # a call ends the answer, and begins another
            end = self.server.served.tokenizer.special_tokens[PYTHON_END]
            sampling = replace(sampling, stop_ids={*sampling.stop_ids, end})
        self.deadline = time.monotonic() + self.server.served.max_seconds
        self.answer = self.first = self.answer_of(prompt, sampling, u)
        self.text = self.job.begun

    def answer_of(self, prompt, sampling, u):
        return Answer(prompt, sampling, u, self.on_news, self.job.n_likeliest or 0, self.deadline,
                      self.job.id)

    def on_news(self, news):
        """Take News over from the engine's thread."""
        with suppress(RuntimeError):  # the server has stopped
            self.loop.call_soon_threadsafe(self.queue.put_nowait, news)

    async def parts(self):
        """Yield the Parts of the answer.

        Those that a guardrail has not read are held. Raises Refused for an error of the engine.
        """
        guardrail, held, n_read = self.server.guardrail, [], 0
        step = CHARACTERS if self.job.body.stream else math.inf
        async for part in self.unread_parts():
            held.append(part)
            if guardrail and not part.finish and len(self.text) - n_read < step:
                continue
            if guardrail and self.text and await guardrail.withholds(self.text):
                self.answer.cancel()
                yield Part(finish='content_filter')
                return
            for part in held:
                yield part
            held, n_read = [], len(self.text)

    async def unread_parts(self):
        """Yield the Parts of the answer as they come. Raises Refused."""
        yield Part(is_first=True, text=self.cut_calls(self.text))
        while True:
            news = await self.queue.get()
            if news.finish in STATUSES:
                raise Refused(news.text, STATUSES[news.finish])
            offset, self.text = len(self.text), self.text + news.text
            self.n_tokens += len(news.tokens)
            logprobs = responses.logprobs_of(self.job, self.server.served, news.tokens, offset)
            answer, call = self.answer, await self.finish(news) if news.finish else None
            finish = 'stop' if news.finish == 'complete' else news.finish
            if call:
                finish = 'tool_calls'
            elif self.answer is not answer:
                finish = None  # another answer continues behind the tool's output
            yield Part(self.cut_calls(self.text), logprobs, finish, call)
            if finish:
                return

    def cut_calls(self, text):
        """Return what of the text may be sent: calls that the client makes are no text."""
        if any(tool.function is None for tool in self.job.tools.values()):
            done, end, last = text.rpartition(OUTPUT_END)  # calls that the server has run are shown
            text = done + end + last.partition(PYTHON)[0]
        text, self.n_sent = text[self.n_sent :], max(len(text), self.n_sent)
        return text

    async def finish(self, news):
        """Make the call that ended an answer, if one did; -> a call for the client, or None."""
        answer, tokenizer = self.answer, self.server.served.tokenizer
        if not self.job.tools or answer.ended_by != tokenizer.special_tokens[PYTHON_END]:
            return None
        tools, call = self.job.tools, self.text.rpartition(PYTHON)[2]
        with suppress(UserError):  # a call of no tool gets an error as its output
            tool, text = tools.split(call)
            if not tool.function:
                return responses.call_of(tool, text)
        # run the tool, and let the answer go on behind its output
        ids = [*answer.ids, answer.ended_by]
        output = await anyio.to_thread.run_sync(tools.output_ids, call, tokenizer,
                                                limiter=self.server.tools_at_once)
        n_used = len(ids) + len(output) - len(answer.prompt)
        n_left = answer.sampling.max_new_tokens - n_used
        self.text += PYTHON_END + tokenizer.decode(output)
        if n_left > 0:
            self.answer = self.answer_of(ids + output, replace(
                answer.sampling, max_new_tokens=n_left), answer.u[n_used:])
            self.server.engine.submit(self.answer, is_next=True)
        return None


class Server:
    """Hold what the routes share."""

    def __init__(self, engine, served, guardrail):
        self.engine, self.served, self.guardrail = engine, served, guardrail
        self.statuses, self.started = Counter(), time.monotonic()
        # what takes the CPU; a schema may take seconds, and other requests do not wait for it
        self.one_at_a_time, self.one_schema = anyio.CapacityLimiter(1), anyio.CapacityLimiter(1)
        self.tools_at_once = anyio.CapacityLimiter(4)
        self.page, self.policy = load_page()

    def routes(self):
        """Return the routes of the app."""
        return [Route('/', self.show_page), Route('/health', self.health),
                Route('/metrics', self.metrics), Route('/v1/models', self.models),
                Route('/v1/models/{name:path}', self.model),
                Route('/v1/completions', self.complete, methods=['POST']),
                Route('/v1/chat/completions', self.chat, methods=['POST']),
                Route('/tokenize', self.tokenize, methods=['POST'])]

    async def show_page(self, request):
        headers = {'Content-Security-Policy': self.policy, 'Cache-Control': 'no-cache'}
        return Response(self.page, media_type='text/html', headers=headers)

    async def health(self, request):
        return Json({'status': 'ok'})

    async def models(self, request):
        return Json({'object': 'list', 'data': [self.served.to_json()]})

    async def model(self, request):
        if request.path_params['name'] != self.served.name:
            raise Refused(f'the model does not exist; expected {self.served.name!r}', 404, 'model',
                          'model_not_found')
        return Json(self.served.to_json())

    async def metrics(self, request):
        """Write counters in Prometheus' text format."""
        engine, lines = self.engine, []
        held = sum(map(len, engine.pool.ids))
        for name, kind, value in (
                ('prompt_tokens_total', 'counter', engine.counts['prompt_tokens']),
                ('cached_tokens_total', 'counter', engine.counts['cached_tokens']),
                ('generated_tokens_total', 'counter', engine.counts['generated_tokens']),
                ('steps_total', 'counter', engine.counts['steps']),
                ('tokens_per_second', 'gauge', engine.tokens_per_second()),
                ('streams_running', 'gauge', len(engine.running)),
                ('streams_waiting', 'gauge', len(engine.waiting)),
                ('cache_tokens', 'gauge', held),
                ('cache_tokens_size', 'gauge', len(engine.pool.ids) * engine.limits.context),
                ('uptime_seconds', 'gauge', time.monotonic() - self.started)):
            lines += [f'# TYPE flatgpt_{name} {kind}', f'flatgpt_{name} {value}']
        lines.append('# TYPE flatgpt_requests_total counter')
        lines += [f'flatgpt_requests_total{{status="{status}"}} {n}'
                  for status, n in sorted(self.statuses.items())]
        return Response('\n'.join(lines) + '\n', media_type='text/plain; version=0.0.4')

    async def tokenize(self, request):
        """Return the ids and texts of a prompt, or of a conversation as the model reads it."""
        body = await read_json(request)
        return Json(await self.compute(self.tokens_of, body))

    def tokens_of(self, body):
        """Return the response of /tokenize. Raises Refused."""
        ids, tokenizer = self.ids_of(body), self.served.tokenizer
        special = set(tokenizer.special_tokens.values())
        return {'count': len(ids), 'max_model_len': self.served.context, 'tokens': ids,
                'token_strs': [token_bytes(tokenizer, i).decode('utf-8', 'replace')
                               for i in ids],
                'special': [i in special for i in ids]}

    def ids_of(self, body):
        """Return the ids of a prompt or of messages. Raises Refused."""
        if not isinstance(body, dict) or ('prompt' in body) == ('messages' in body):
            raise Refused('expected {"prompt": ...} or {"messages": [...]}')
        if 'prompt' in body:
            return protocol.encode(body['prompt'], self.served)
        body = protocol.read_body(protocol.ChatBody, body)
        tools = protocol.read_tools(body, self.served)
        return protocol.render_chat(body.messages, tools, self.served)

    async def compute(self, function, body, *arguments):
        """Run a function of a body, which takes the CPU, in a thread, one at a time."""
        has_schema = isinstance(body, dict) and body.get('response_format')
        return await anyio.to_thread.run_sync(
            function, body, *arguments,
            limiter=self.one_schema if has_schema else self.one_at_a_time)

    async def complete(self, request):
        return await self.respond(request, protocol.read_text)

    async def chat(self, request):
        return await self.respond(request, protocol.read_chat)

    async def respond(self, request, read):
        """Answer a request for completions."""
        body = await read_json(request)
        job = await self.compute(read, body, self.served)
        for ids in job.prompts if self.guardrail else ():
            await self.guardrail.check(ids, self.served.tokenizer)
        choices = self.submit(job)
        if job.body.stream:
            return StreamingResponse(
                self.stream(job, choices), media_type='text/event-stream',
                headers={'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'})
        answering = asyncio.ensure_future(collect(choices))
        leaving = asyncio.ensure_future(disconnection(request))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return Response(status_code=499)  # nobody reads it
            parts = answering.result()
            return Json(responses.response_of(job, self.served, parts, usage(job, choices)))
        finally:
            answering.cancel()
            leaving.cancel()
            for choice in choices:
                choice.answer.cancel()

    def submit(self, job):
        """Queue all answers of a job; -> Choices. Raises Refused if they do not fit."""
        choices = [Choice(self, job, i) for i in range(len(job.prompts) * job.body.n)]
        try:
            for choice in choices:
                self.engine.submit(choice.answer)
        except UserError as error:
            for choice in choices:
                choice.answer.cancel()
            raise Refused(str(error), 429 if isinstance(error, Full) else 400) from None
        return choices

    async def stream(self, job, choices):
        """Yield the server-sent events of a job."""
        options = job.body.stream_options or {}
        try:
            async for index, part in merged(choices):
                begins_chat = part.is_first and job.kind == 'chat'  # its chunk holds the role
                if part.text or part.logprobs or part.finish or part.call or begins_chat:
                    yield event(responses.chunk_of(job, self.served, index, part))
            if options.get('include_usage'):
                head = responses.head_of(job, self.served, True)
                yield event({**head, 'choices': [], 'usage': usage(job, choices)})
            yield b'data: [DONE]\n\n'
        except Refused as error:
            yield event(error.to_json())
        finally:
            for choice in choices:
                choice.answer.cancel()


async def merged(choices):
    """Yield (index, Part) of several answers as they come. Raises Refused."""
    queue = asyncio.Queue()

    async def follow(choice):
        try:
            async for part in choice.parts():
                await queue.put((choice.index, part))
            await queue.put(None)
        except Refused as error:
            await queue.put(error)
        except Exception:  # the request would wait for ever
            traceback.print_exc()
            await queue.put(Refused('an error of the server', 500))

    tasks = [asyncio.ensure_future(follow(choice)) for choice in choices]
    try:
        n_left = len(tasks)
        while n_left:
            item = await queue.get()
            if isinstance(item, Refused):
                raise item
            if item is None:
                n_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


async def collect(choices):
    """Return the Parts of each answer. Raises Refused."""
    parts = [[] for _ in choices]
    async for index, part in merged(choices):
        parts[index].append(part)
    return parts


async def disconnection(request):
    """Return when the client has closed the connection."""
    while (await request.receive())['type'] != 'http.disconnect':
        pass


def event(value):
    """Return a server-sent event."""
    return b'data: ' + to_line(value) + b'\n'


def usage(job, choices):
    """Count the tokens of a job; a prompt counts once."""
    n_prompt, n_answers = sum(map(len, job.prompts)), sum(choice.n_tokens for choice in choices)
    return {'prompt_tokens': n_prompt, 'completion_tokens': n_answers,
            'total_tokens': n_prompt + n_answers, 'prompt_tokens_details': {
                'cached_tokens': sum(choice.first.n_cached for choice in choices)}}


# The page -----------------------------------------------------------------------------------------


def load_page():
    """Return the page, and the policy that lets only its own script and style work."""
    page = PAGE.read_text(encoding='utf-8')
    return page, policy_of(page) + "; connect-src 'self'; img-src data:; frame-ancestors 'none'"


# Safety -------------------------------------------------------------------------------------------


@dataclass
class Guard:
    """Check each request before its route: host, origin, key, number.

    hosts: names that the Host header may have beside IP addresses and localhost. A page of another
    site cannot send requests here (Origin), nor can a name that it points at this machine (Host:
    "DNS rebinding"). api_key: '' for none; the page and /health need none.
    """

    hosts: set = field(default_factory=set)
    api_key: str = ''

    def check(self, request):
        """Raise Refused for a request that may not pass."""
        host = request.headers.get('host', '')
        if not self.is_own(host):
            raise Refused(f'the host {host[:60]!r} is not served here; expected localhost, an IP '
                          f'address or the name in --host', 403)
        origin = request.headers.get('origin')
        if origin is not None and origin.partition('://')[2] != host:
            raise Refused(f'the origin {origin[:60]!r} may not send requests here', 403)
        if self.api_key and request.scope['path'] not in ('/', '/health'):
            given = request.headers.get('authorization', '').removeprefix('Bearer ')
            if not hmac.compare_digest(given.encode('latin-1'), self.api_key.encode()):
                raise Refused('the API key is missing or wrong; expected the header '
                              'Authorization: Bearer KEY', 401, code='invalid_api_key')

    def is_own(self, host):
        """Return whether a Host header names this server."""
        name = re.sub(r':\d{1,5}$', '', host).lower()
        with suppress(ValueError):
            if re.fullmatch(r'\[[0-9a-f:.]+\]', name):
                return bool(ipaddress.IPv6Address(name[1:-1]))
            return name in {'localhost', *self.hosts} or bool(ipaddress.IPv4Address(name))
        return False


class Gate:
    """Wrap the app: guard each request, bound their number, count their statuses."""

    def __init__(self, app, server, guard):
        self.app, self.server, self.guard, self.n_open = app, server, guard, 0

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)

        async def counted(message):
            if message['type'] == 'http.response.start':
                self.server.statuses[message['status']] += 1
                message['headers'] = [*message['headers'], *SECURITY_HEADERS]
            await send(message)

        self.n_open += 1
        try:
            if self.n_open > MOST_REQUESTS:
                raise Refused(f'{self.n_open} requests are open: expected at most {MOST_REQUESTS}; '
                              f'try again later', 429)
            self.guard.check(Request(scope))
        except Refused as error:
            await refusal(error)(scope, receive, counted)
        else:
            await self.app(scope, receive, counted)
        finally:
            self.n_open -= 1


SECURITY_HEADERS = [(b'x-content-type-options', b'nosniff'), (b'referrer-policy', b'no-referrer'),
                    (b'cross-origin-resource-policy', b'same-origin')]


def refusal(error):
    """Return the response of a Refused."""
    headers = {'Retry-After': '1'} if error.status == 429 else {}
    return Json(error.to_json(), error.status, headers=headers)


def make_app(engine, served, guard, guardrail=None):
    """Return the ASGI app of an Engine that serves a model.

    guardrail: a Guardrail that reads requests and answers, or None.
    """
    async def refused(request, error):
        return refusal(error)

    async def other(request, error):
        message = {404: f'there is no {request.scope["path"][:60]}',
                   405: f'{request.method[:20]} is not possible here'}.get(error.status_code, '')
        return refusal(Refused(message or error.detail, error.status_code))

    async def broken(request, error):
        return refusal(Refused('an error of the server', 500))

    server = Server(engine, served, guardrail)
    app = Starlette(routes=server.routes(), exception_handlers={
        Refused: refused, HTTPException: other, Exception: broken})
    app.router.redirect_slashes = False  # a redirect would name the host of the request
    return Gate(app, server, guard)
