"""serve.py's tools: those that the server runs, and functions of the client. Run: pytest tests/test_serving_tools.py"""

import json

import pytest
import torch
from chat_models import LETTERS, TOKENIZER
from servers import Serving
from test_serving_api import HELLO, chat_model

from posttrain.python_tool import sandbox_failure
from posttrain.tools import toolbox
from tokenizer import chat
from tokenizer.chat import OUTPUT, OUTPUT_END, PYTHON, PYTHON_END

WEATHER = {'type': 'function', 'function': {'name': 'weather', 'description': 'Return the weather.', 'parameters': {
    'type': 'object', 'properties': {'city': {'type': 'string'}, 'days': {'type': 'integer'}}}}}
LOOKUP = {'type': 'function', 'function': {'name': 'lookup', 'parameters': {
    'type': 'object', 'properties': {'title': {'type': 'string'}}}}}


@pytest.fixture(scope='module')
def caller():
    """Serves a model that writes digits, operators, and the tokens of calls."""
    model = chat_model(words=(PYTHON, PYTHON_END), block_size=512)
    with torch.no_grad():
        model.lm_head.weight[[*LETTERS.encode()], 0] = -2.0
        model.lm_head.weight[[*b'0123456789+*'], 0] = 1.5
    serving = Serving(model, TOKENIZER, chat.TEMPLATE)
    serving.served.may_run = 'calculator,unsandboxed_python' if sandbox_failure() else 'calculator,python'
    return serving


def ask(caller, tools, messages=HELLO, **more):
    status, value = caller.call('/v1/chat/completions', {'messages': messages, 'tools': tools, 'max_tokens': 150, **more})
    assert status == 200, value
    return value['choices'][0]


def read(caller, tools, messages=HELLO):
    status, value = caller.call('/tokenize', {'messages': messages, 'tools': tools})
    return ''.join(value['token_strs']) if status == 200 else value['error']['message']


def forced(name):
    return {'type': 'function', 'function': {'name': name}}


def test_python_by_the_server(caller):
    """A call's output is what the code prints, and the answer goes on behind it."""
    assert caller.call('/v1/models')[1]['data'][0]['tools'] == ['calculator', 'python']
    for seed in range(3):
        text = ask(caller, [{'type': 'python'}], seed=seed, tool_choice=forced('python'))['message']['content']
        assert text.startswith(f'{PYTHON}python:')
        call, _, rest = text.removeprefix(PYTHON).partition(PYTHON_END)
        box = toolbox(caller.served.may_run)
        box.pop('calculator')
        if PYTHON not in call:
            assert rest.startswith(OUTPUT + box.run(call) + OUTPUT_END) and len(rest) > len(OUTPUT + box.run(call) + OUTPUT_END)
    assert 'You have python(code): Run Python code' in read(caller, [{'type': 'python'}])


def test_functions_of_the_client(caller):
    """Any function with a schema; the call, its result and the conversation are what the model wrote and reads."""
    for tool, name in ((WEATHER, 'weather'), (LOOKUP, 'lookup')):
        answers = [ask(caller, [tool], seed=seed, tool_choice=forced(name)) for seed in range(8)]
        answer = next(answer for answer in answers if 'tool_calls' in answer['message'])  # others begin a second call
        [call] = answer['message']['tool_calls']
        assert answer['finish_reason'] == 'tool_calls' and call['function']['name'] == name
        assert answer['message']['content'] is None
    assert list(json.loads(call['function']['arguments'])) == ['title']


@pytest.mark.parametrize('tool, arguments, written', [
    (WEATHER, '{"city": "Bern",  "days": 2}', 'weather: {"city": "Bern",  "days": 2}'), (LOOKUP, '{"title": "Bern"}', 'lookup: Bern')])
def test_calls_are_read_as_the_model_writes_them(caller, tool, arguments, written):
    call = {'id': 'a', 'type': 'function', 'function': {'name': tool['function']['name'], 'arguments': arguments}}
    messages = [*HELLO, {'role': 'assistant', 'content': 'Hm', 'tool_calls': [call]},
                {'role': 'tool', 'tool_call_id': 'a', 'content': 'sun'}]
    text = read(caller, [tool], messages)
    assert text.endswith(f'Hm{PYTHON}{written}{PYTHON_END}{OUTPUT}sun{OUTPUT_END}') and f'You have {written.split(":")[0]}(' in text


def test_the_client_reads_on_behind_its_result(caller):
    """The answer to a result is new text alone."""
    calculator = {'type': 'function', 'function': {'name': 'calculator'}}
    call = {'id': 'a', 'type': 'function', 'function': {'name': 'calculator', 'arguments': '{"expression": "1+1"}'}}
    messages = [*HELLO, {'role': 'assistant', 'content': 'xyz', 'tool_calls': [call]},
                {'role': 'tool', 'tool_call_id': 'a', 'content': '2'}]
    texts = [ask(caller, [calculator], messages, seed=seed)['message']['content'] or '' for seed in range(8)]
    assert any(texts) and not any('xyz' in text or '<|' in text for text in texts)


def test_both_kinds(caller):
    """The server's calls are text of the answer; the client's end it."""
    n_called = 0
    for seed in range(6):
        answer = ask(caller, [{'type': 'calculator'}, WEATHER], seed=seed)
        text = answer['message']['content'] or ''
        assert text.count(PYTHON_END) == text.count(OUTPUT) == text.count(OUTPUT_END)
        streamed = [event['choices'][0]['delta'].get('content', '') for event in caller.events(
            '/v1/chat/completions', {'messages': HELLO, 'tools': [{'type': 'calculator'}, WEATHER], 'max_tokens': 150, 'seed': seed})]
        assert ''.join(streamed) == text
        n_called += OUTPUT in text
    assert n_called


@pytest.mark.parametrize('function', [{'name': 'a b', 'parameters': {'properties': {}}}, {'name': 'x' * 65, 'parameters': {'properties': {}}},
                                      {'name': 'f'}, {'name': 'f', 'parameters': {'properties': 3}}, {'name': 'f', 'parameters': []},
                                      {'name': 'f', 'parameters': {'properties': {'a': 1}}}, {'name': ['f']}, 'f', None,
                                      {'name': 'unsandboxed_python'}])
def test_refused_functions(caller, function):
    assert 'is unknown; known are: calculator, python' in read(caller, [{'type': 'function', 'function': function}])


def test_refused_tools(caller):
    for kind in ('unsandboxed_python', 'weather', ['python'], None):
        assert 'is unknown' in read(caller, [{'type': kind}])
    call = {'function': {'name': 'weather', 'arguments': '[1]'}}
    assert 'expected a JSON object' in read(caller, [WEATHER], [{'role': 'assistant', 'content': '', 'tool_calls': [call]}])
