"""
Write answers in OpenAI's shapes.

    chunk_of(job, served, index, Part('Hello'))    # of a stream
    response_of(job, served, parts, usage)         # the whole answer

Reference: platform.openai.com/docs/api-reference, chat/completions and completions.
"""

import itertools
import secrets
from dataclasses import dataclass
from typing import Any

from flatgpt.constrain import token_bytes


def head_of(job, served, is_chunk):
    """Return the entries that begin each response and each chunk."""
    kind = {'text': 'text_completion',
            'chat': 'chat.completion.chunk' if is_chunk else 'chat.completion'}[job.kind]
    return {'id': job.id, 'object': kind, 'created': job.created, 'model': served.name}


def chunk_of(job, served, index, part):
    """Return the chunk that adds a Part to an answer."""
    choice = {'index': index, 'finish_reason': part.finish, 'logprobs': part.logprobs}
    if job.kind == 'text':
        choice['text'] = part.text
    else:
        choice['delta'] = {**({'role': 'assistant'} if part.is_first else {}),
                           **({'content': part.text} if part.text or part.is_first else {}),
                           **({'tool_calls': [{'index': 0, **part.call}]} if part.call else {})}
    return {**head_of(job, served, True), 'choices': [choice]}


def response_of(job, served, parts, usage):
    """Return the whole response of the Parts of each answer."""
    choices = []
    for index, own in enumerate(parts):
        text, calls = ''.join(part.text for part in own), [part.call for part in own if part.call]
        choice = {'index': index, 'finish_reason': own[-1].finish,
                  'logprobs': joined([part.logprobs for part in own])}
        if job.kind == 'text':
            choice['text'] = text
        else:
            choice['message'] = {'role': 'assistant', 'content': None if calls and not text
                                 else text, 'refusal': None,
                                 **({'tool_calls': calls} if calls else {})}
        choices.append(choice)
    return {**head_of(job, served, False), 'choices': choices, 'usage': usage}


def joined(logprobs):
    """Join the log-probabilities of the parts of an answer; None without any."""
    logprobs = [part for part in logprobs if part]
    return {key: [item for part in logprobs for item in part[key]] for key in logprobs[0]
            } if logprobs else None


def logprobs_of(job, served, tokens, offset):
    """Return the log-probabilities of tokens in the shape of the kind of request, or None.

    offset: characters of the answer before them.
    """
    if job.n_likeliest is None or not tokens:
        return None
    if job.kind == 'chat':
        return {'content': [{**entry(served, token.id, token.logprob), 'top_logprobs': [
            entry(served, i, logprob) for i, logprob in token.likeliest]} for token in tokens]}
    names = [entry(served, token.id, token.logprob)['token'] for token in tokens]
    offsets = list(itertools.accumulate(map(len, names[:-1]), initial=offset))
    return {'tokens': names, 'token_logprobs': [token.logprob for token in tokens],
            'top_logprobs': [{entry(served, i, logprob)['token']: logprob
                              for i, logprob in token.likeliest} for token in tokens],
            'text_offset': offsets}


def entry(served, i, logprob):
    """Return a token as OpenAI writes it."""
    token = token_bytes(served.tokenizer, i)
    return {'token': token.decode('utf-8', 'replace'), 'logprob': max(logprob, -9999.0),
            'bytes': list(token)}


def call_of(tool, text):
    """Return a call as OpenAI writes it."""
    return {'id': f'call_{secrets.token_hex(12)}', 'type': 'function',
            'function': {'name': tool.name, 'arguments': tool.to_json(text)}}


@dataclass
class Part:
    """Hold what a chunk adds to an answer."""

    text: str = ''
    logprobs: Any = None
    finish: str | None = None
    call: dict | None = None
    is_first: bool = False
