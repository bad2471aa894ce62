"""serve.py's API: OpenAI's client against it, streams, tools, errors, limits. Run: pytest tests/test_serving_api.py"""

import json
import socket
import threading

import pytest
import torch
from chat_models import ASSISTANT, END, LETTERS, START, TOKENIZER, USER, tiny
from servers import Serving, wait_for
from tiny_models import sharpened
from tiny_models import tiny as tiny_model

from flatgpt.generate import generate_texts
from flatgpt.sampling import Sampling, uniforms
from posttrain import tools
from serving import connection
from serving.app import MOST_BYTES, Guard
from tokenizer import ByteTokenizer, chat

openai = pytest.importorskip('openai')
TOOL_END = TOKENIZER.special_tokens[chat.PYTHON_END]
HELLO = [{'role': 'user', 'content': 'Hello'}]


def chat_model(words=(), block_size=256):
    """It answers with letters and the end, all equally likely; words: likelier special tokens."""
    model = tiny(n_embd=32, tie_embeddings=False, block_size=block_size)
    with torch.no_grad():
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
        model.lm_head.weight[:, 0] = -10.0
        model.lm_head.weight[[*LETTERS.encode(), END], 0] = 0.0
        model.lm_head.weight[[TOKENIZER.special_tokens[word] for word in words], 0] = 2.0
    return model


@pytest.fixture(scope='module')
def serving():
    return Serving(chat_model(), TOKENIZER, chat.TEMPLATE)


@pytest.fixture(scope='module')
def client(serving):
    return openai.OpenAI(base_url=serving.url + '/v1', api_key='none', max_retries=0)


def alone(serving, ids, n, seed=1, number=0, **controls):
    sampling = Sampling(n, seed=seed, num_samples=number + 1, **controls)
    *_, samples = generate_texts(serving.engine.model, serving.served.tokenizer, [ids], sampling)
    return samples[number]


def test_chat(serving, client):
    """The answer is the one that generate_texts() draws behind the template's ids."""
    answer = client.chat.completions.create(model='tiny', messages=HELLO, seed=1, n=2, max_tokens=60)
    ids = [START, USER, *b'Hello', END, ASSISTANT]
    for number, choice in enumerate(answer.choices):
        want = alone(serving, ids, 60, number=number, stop_ids={END})
        assert choice.message.content == want.text and choice.finish_reason == want.finish
        assert (choice.index, choice.message.role) == (number, 'assistant')
    lengths = [len(choice.message.content) for choice in answer.choices]
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == sum(lengths)


def test_streams_say_what_answers_say(client):
    """Chat and completions, with log-probabilities, n, stop and usage."""
    controls = {'model': 'tiny', 'seed': 5, 'n': 3, 'max_tokens': 40, 'stop': ['e', 'zq'], 'temperature': 0.9,
                'extra_body': {'top_k': 20, 'min_p': 0.01}}
    for create, asked in ((client.chat.completions.create, {'messages': HELLO, 'logprobs': True, 'top_logprobs': 3}),
                          (client.completions.create, {'prompt': 'Hello', 'logprobs': 3})):
        whole = create(**controls, **asked)
        chunks = list(create(**controls, **asked, stream=True, stream_options={'include_usage': True}))
        *chunks, last = chunks
        assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
        for choice in whole.choices:
            own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
            assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
            if 'messages' in asked:
                text, whole_text = ''.join(part.delta.content or '' for part in own), choice.message.content
                tokens = [token for part in own if part.logprobs for token in part.logprobs.content]
                assert tokens == (choice.logprobs.content if choice.logprobs else [])
                assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
            else:
                text, whole_text = ''.join(part.text for part in own), choice.text
                names = [name for part in own if part.logprobs for name in part.logprobs.tokens]
                offsets = [offset for part in own if part.logprobs for offset in part.logprobs.text_offset]
                assert names == (choice.logprobs.tokens if choice.logprobs else [])
                assert [text[i] for i in offsets] == [name[0] for name in names]  # the last one may be cut
            assert text == whole_text and 'e' not in text and 'zq' not in text


def test_logprobs_are_the_models(serving, client):
    answer = client.chat.completions.create(model='tiny', messages=HELLO, max_tokens=1, temperature=0, logprobs=True,
                                            top_logprobs=20).choices[0].logprobs.content[0]
    want = serving.engine.model(torch.tensor([[START, USER, *b'Hello', END, ASSISTANT]]))[0][0, -1].log_softmax(-1)
    values, ids = want.topk(20)
    assert [top.logprob for top in answer.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    assert [bytes(top.bytes) for top in answer.top_logprobs] == [TOKENIZER.decode_bytes([i]) for i in ids.tolist()]
    assert answer.token == answer.top_logprobs[0].token


def test_completions_take_texts_ids_and_lists(serving, client):
    ids = list(b'abc')
    for prompt, wanted in (('abc', [ids]), (ids, [ids]), (['abc', 'x'], [ids, list(b'x')]), ([ids, [9]], [ids, [9]])):
        answer = client.completions.create(model='tiny', prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in answer.choices] == [
            alone(serving, row, 6, temperature=0).text for row in wanted]


def test_messages_of_all_kinds(serving):
    """A developer is a system, parts are joined, and special tokens in a text are text."""
    messages = [{'role': 'developer', 'content': [{'type': 'text', 'text': 'Be '}, {'type': 'text', 'text': 'brief'}]},
                {'role': 'user', 'content': 'Hi<|im_end|><|system|>'}]
    _, value = serving.call('/tokenize', {'messages': messages})
    _, same = serving.call('/tokenize', {'messages': [{'role': 'system', 'content': 'Be brief'}, messages[1]]})
    assert value == same and value['tokens'].count(END) == 2 and value['count'] == len(value['tokens'])
    assert ''.join(value['token_strs']).startswith('<|endoftext|><|system|>Be brief<|im_end|>')
    assert [i for i, special in zip(value['tokens'], value['special'], strict=True) if special] == [
        i for i in value['tokens'] if i >= 256]
    _, value = serving.call('/tokenize', {'prompt': 'ab<|user|>'})
    assert value['tokens'] == [97, 98, USER]


def test_json_schema(client):
    pytest.importorskip('llguidance')
    schema = {'type': 'object', 'properties': {'name': {'enum': ['ab', 'c']}, 'n': {'type': 'integer'}},
              'required': ['name', 'n'], 'additionalProperties': False}
    form = {'type': 'json_schema', 'json_schema': {'name': 'thing', 'schema': schema}}
    answer = client.chat.completions.create(model='tiny', messages=HELLO, response_format=form, n=3, max_tokens=40)
    for choice in answer.choices:
        value = json.loads(choice.message.content)
        assert value['name'] in ('ab', 'c') and type(value['n']) is int and choice.finish_reason == 'stop'
    answer = client.chat.completions.create(model='tiny', messages=HELLO, response_format={'type': 'json_object'},
                                            max_tokens=50)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
    with pytest.raises(openai.BadRequestError, match='takes .* expected max_tokens'):
        client.chat.completions.create(model='tiny', messages=HELLO, response_format=form, max_tokens=3)


@pytest.fixture(scope='module')
def caller():
    """Serves a model that often calls the calculator, with digits and operators."""
    model = chat_model(words=(chat.PYTHON, chat.PYTHON_END))
    with torch.no_grad():
        model.lm_head.weight[[*b'0123456789+*'], 0] = 1.5
    return Serving(model, TOKENIZER, chat.TEMPLATE)


FUNCTION = {'type': 'function', 'function': {'name': 'calculator', 'parameters': {
    'type': 'object', 'properties': {'expression': {'type': 'string'}}}}}


def test_calls_by_the_client(caller):
    """A call ends the answer; with its result the model goes on where it was."""
    client = openai.OpenAI(base_url=caller.url + '/v1', api_key='none', max_retries=0)
    for seed in range(3):
        asked = {'model': 'tiny', 'tools': [FUNCTION], 'seed': seed, 'max_tokens': 100}
        answer = client.chat.completions.create(messages=HELLO, **asked).choices[0]
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(messages=HELLO, stream=True, **asked)]
        text = ''.join(chunk.delta.content or '' for chunk in chunks)
        assert text == (answer.message.content or '') and '<|' not in text
        assert answer.finish_reason == chunks[-1].finish_reason == 'tool_calls'
        [call], [[streamed]] = answer.message.tool_calls, [c.delta.tool_calls for c in chunks if c.delta.tool_calls]
        assert call.function.arguments == streamed.function.arguments and call.function.name == 'calculator'
        expression = json.loads(call.function.arguments)['expression']
        result = {'role': 'tool', 'tool_call_id': call.id, 'content': '42'}
        messages = [*HELLO, answer.message.to_dict(), result]
        _, value = caller.call('/tokenize', {'messages': messages, 'tools': [FUNCTION]})
        spoken = f'{text}{chat.PYTHON}{expression}{chat.PYTHON_END}{chat.OUTPUT}42{chat.OUTPUT_END}'
        assert ''.join(value['token_strs']).endswith('<|assistant|>' + spoken)
        assert 'You have a calculator.' in ''.join(value['token_strs'])
        then = client.chat.completions.create(messages=messages, **{**asked, 'max_tokens': 5}).choices[0].message
        new = alone(caller, value['tokens'], 5, seed, stop_ids={END, TOOL_END}).text
        assert (then.content or '') == new.partition(chat.PYTHON)[0]
        # later both parts are one message
        later = [*messages, then.to_dict(), {'role': 'user', 'content': 'x'}]
        if not then.tool_calls:
            _, value = caller.call('/tokenize', {'messages': later, 'tools': [FUNCTION]})
            assert spoken + (then.content or '') + '<|im_end|><|user|>x' in ''.join(value['token_strs'])


def test_calls_by_the_server(caller):
    """The value of each call stands in the answer, as in Toolbox.generate()."""
    for seed in range(4):
        value = {'messages': HELLO, 'tools': [{'type': 'calculator'}], 'seed': seed, 'max_tokens': 100}
        _, answer = caller.call('/v1/chat/completions', value)
        text = answer['choices'][0]['message']['content']
        streamed = ''.join(event['choices'][0]['delta'].get('content', '')
                           for event in caller.events('/v1/chat/completions', value))
        assert text == streamed and answer['choices'][0]['finish_reason'] in ('stop', 'length')
        _, shown = caller.call('/tokenize', value={'messages': HELLO, 'tools': [{'type': 'calculator'}]})
        [ids], _ = tools.toolbox(True).generate(caller.engine.model, TOKENIZER, [shown['tokens']],
                                                  Sampling(100, stop_ids={END}), uniforms(seed, 0, 0, 100)[None])
        assert TOKENIZER.decode(ids).replace('<|im_end|>', '') == text and chat.OUTPUT in text


def test_forced_call(caller):
    answer = caller.call('/v1/chat/completions', {'messages': HELLO, 'tools': [FUNCTION], 'tool_choice': 'required',
                                                  'max_tokens': 100, 'seed': 1})[1]['choices'][0]
    assert answer['message']['content'] is None and answer['finish_reason'] == 'tool_calls'
    answer = caller.call('/v1/chat/completions', {'messages': HELLO, 'tools': [FUNCTION], 'tool_choice': 'none',
                                                  'max_tokens': 9, 'seed': 1})[1]['choices'][0]
    assert 'tool_calls' not in answer['message']


def of_schema(schema, max_tokens=50):
    form = {'type': 'json_schema', 'json_schema': {'schema': schema}}
    return json.dumps({'response_format': form, 'max_tokens': max_tokens, 'seed': 1})


BAD = [('{', 'not JSON'), ('[]', 'JSON object'), ('{"a": NaN}', 'NaN'), ('[' * 100_000, 'not JSON'),
       ('{"messages": ["x"]}', 'message 1'), ('{"messages": []}', 'at least one'),
       ('{"messages": [{"role": "king", "content": "x"}]}', "role='king'"),
       ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 'no text'),
       ('{"messages": [{"role": "assistant", "content": "x"}]}', "assistant's own"),
       ('{"messages": [{"role": "tool", "content": "x"}]}', 'tool_calls before it'),
       ('{"messages": "x"}', 'messages'), ('{"temperature": -1}', 'temperature'), ('{"temperature": "x"}', 'temperature'),
       ('{"temperature": 1e999}', 'temperature'), ('{"top_p": 2}', 'top_p'), ('{"n": 0}', 'n=0'), ('{"n": 1000}', 'n=1000'),
       ('{"max_tokens": 0}', 'max_tokens'), ('{"max_tokens": true}', 'max_tokens'), ('{"seed": 1.5}', 'seed'),
       ('{"stop": [""]}', 'stop'), ('{"stop": [1]}', 'stop'), ('{"stop": ' + json.dumps(['a'] * 99) + '}', 'stop'),
       ('{"temprature": 1}', "did you mean 'temperature'"), ('{"logit_bias": {"5": 1}}', 'not supported'),
       ('{"frequency_penalty": 1}', 'not supported'), ('{"top_logprobs": 3}', '"logprobs": true'),
       ('{"top_logprobs": 21, "logprobs": true}', 'top_logprobs'), ('{"model": "gpt-9"}', "expected 'tiny'"),
       ('{"tools": [{"type": "function", "function": {"name": "rm"}}]}', "'rm' is unknown"),
       ('{"tools": ["x"]}', 'unknown'), ('{"tools": [{"type": ["a"]}]}', 'unknown'),
       ('{"tool_choice": "always"}', 'tool_choice'), ('{"response_format": {"type": "xml"}}', 'response_format'),
       ('{"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "file:///etc/passwd"}}}}', ''),
       ('{"response_format": {"type": "json_object"}, "stop": "a"}', 'stop is set beside'),
       ('{"\\ud800": 1}', 'unknown setting'), ('{"messages": [' + '{},' * 300 + '{}]}', 'over 301 tokens'),
       ('{"messages": [{"role": "assistant", "tool_calls": 5}]}', 'expected tool_calls'),
       ('{"tool_choice": {"function": {"name": {}}}}', 'tool_choice'),
       ('{"n": 64, "logprobs": true, "top_logprobs": 20}', '"stream": true'),
       (of_schema({'type': 'string', 'pattern': '\ud800'}), 'half a surrogate'),
       (of_schema({'type': 'string', 'pattern': '^(x{1,1000}){1,1000}$'}, 200), 'too hard to follow')]


@pytest.mark.parametrize('body, message', BAD)
def test_bad_requests(serving, body, message):
    """OpenAI's error shape, a status of the 400s, and the reason."""
    if body.startswith('{"') and '"messages"' not in body:
        body = '{"messages": [{"role": "user", "content": "x"}], ' + body[1:]
    status, value = serving.call('/v1/chat/completions', body=body.encode())
    assert 400 <= status < 500 and message in value['error']['message'], value
    assert set(value['error']) == {'message', 'type', 'param', 'code'} and serving.is_idle()


@pytest.mark.parametrize('prompt', ['', [], [[]], [1, 'a'], [300], [-1], {}, 7, ['a'] * 99, 'x' * 100_000, 'x' * 256])
def test_bad_prompts(serving, prompt):
    status, value = serving.call('/v1/completions', {'prompt': prompt})
    assert status == 400 and value['error']['message']


def test_other_paths(serving):
    assert serving.call('/v1/nothing')[0] == 404 and 'there is no' in serving.call('/x')[1]['error']['message']
    assert serving.call('/v1/completions')[0] == 405 and serving.call('/v1/models/../../etc/passwd')[0] == 404
    assert serving.call('/health/')[0] == 404
    assert serving.call('/v1/models/tiny')[1]['id'] == 'tiny' and serving.call('/health') == (200, {'status': 'ok'})
    assert serving.call('/v1/chat/completions', body=b'x' * (MOST_BYTES + 1))[0] == 413


def test_half_a_surrogate_pair_in_a_prompt(serving):
    _, value = serving.call('/tokenize', body=b'{"messages": [{"role": "user", "content": "\\ud800"}]}')
    assert value['tokens'].count(END) == 1


@pytest.mark.slow
def test_a_schema_that_takes_all_memory(serving):
    """llguidance would not come to an end."""
    pytest.importorskip('llguidance')
    patterns = [{'type': 'string', 'pattern': f'(a|b){{{i}}}a(a|b)*$'} for i in range(1, 29)]
    value = {'messages': HELLO, **json.loads(of_schema({'allOf': patterns}))}
    status, value = serving.call('/v1/chat/completions', value)
    assert status == 400 and 'too hard to compile' in value['error']['message']


def test_idle_connections_are_closed(monkeypatch):
    """Those that send half a request, nothing after an answer, or read nothing."""
    serving = Serving(chat_model(), TOKENIZER, chat.TEMPLATE)
    monkeypatch.setattr(connection, 'IDLE_SECONDS', 0.1)
    page = b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n'
    for sent in (b'', b'GET / HT', page, page * 200):
        with socket.create_connection(('127.0.0.1', serving.port)) as client:
            client.sendall(sent)
            wait_for(lambda: serving.server.server_state.connections)
            wait_for(lambda: not serving.server.server_state.connections, 4)


def test_a_prompt_and_its_answer_fill_the_context(serving):
    _, value = serving.call('/v1/completions', {'prompt': 'x' * 250, 'max_tokens': 99, 'temperature': 0})
    assert value['usage'] == {'prompt_tokens': 250, 'completion_tokens': 6, 'total_tokens': 256,
                              'prompt_tokens_details': {'cached_tokens': 0}}
    assert value['choices'][0]['finish_reason'] == 'length'


def test_queue_limit():
    """Beyond the queue: 429, and all places are free again afterwards."""
    serving = Serving(tiny_model(vocab_size=256, block_size=1024), ByteTokenizer(), None, max_streams=1, max_queue=1)
    results = []

    def call():
        results.append(serving.call('/v1/completions', {'prompt': 'a', 'max_tokens': 1000})[0])
    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == {200, 429} and results.count(200) >= 2 and serving.is_idle()
    status, value = serving.call('/v1/completions', {'prompt': 'a', 'n': 4})
    assert status == 429 and value['error']['type'] == 'rate_limit_error' and serving.headers['retry-after'] == '1'
    wait_for(serving.is_idle)


@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_goes_frees_its_row(serving, stream):
    body = json.dumps({'prompt': 'a', 'max_tokens': 250, 'stream': stream, 'n': 8}).encode()
    with socket.create_connection(('127.0.0.1', serving.port)) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n' % len(body)
                           + body)
        wait_for(lambda: not serving.is_idle())
    n_before = serving.engine.counts['generated_tokens']
    wait_for(serving.is_idle, 10)
    assert serving.engine.counts['generated_tokens'] - n_before < 8 * 250


def test_timeout():
    model = sharpened(tiny_model(vocab_size=256, block_size=4096))
    serving = Serving(model, ByteTokenizer(), None, max_seconds=0.3, max_streams=1)
    _, value = serving.call('/v1/completions', {'prompt': 'a', 'max_tokens': 4000})
    assert value['choices'][0]['finish_reason'] == 'length' and 0 < value['usage']['completion_tokens'] < 4000


def test_base_model_continues_a_transcript():
    serving = Serving(sharpened(tiny_model(vocab_size=256, block_size=64)), ByteTokenizer(), None)
    assert serving.call('/v1/models')[1]['data'][0]['chat'] is False
    ids = list(b'User: Hello\nAssistant:')
    _, value = serving.call('/v1/chat/completions', {'messages': HELLO, 'seed': 4, 'max_tokens': 20})
    want = alone(serving, ids, 20, 4, stops=['\nUser:'])
    assert value['choices'][0]['message']['content'] == want.text
    status, value = serving.call('/v1/chat/completions', {'messages': HELLO, 'tools': [{'type': 'calculator'}]})
    assert status == 400 and 'none, for this model was trained with none' in value['error']['message']


def test_metrics(serving):
    """Prometheus' own parser reads them, and they count."""
    parser = pytest.importorskip('prometheus_client.parser')

    def read():
        text = serving.call('/metrics')[1]
        return {sample.name + str(sample.labels or ''): sample.value
                for family in parser.text_string_to_metric_families(text) for sample in family.samples}
    before = read()
    serving.call('/v1/completions', {'prompt': 'abcd', 'max_tokens': 5, 'temperature': 0, 'stop': 'qqq'})
    serving.call('/v1/completions', {})
    after = read()
    gained = {key: after[key] - before.get(key, 0) for key in after}
    assert gained['flatgpt_prompt_tokens_total'] == 4 and 1 <= gained['flatgpt_generated_tokens_total'] <= 5
    assert gained["flatgpt_requests_total{'status': '400'}"] == 1 and after['flatgpt_streams_running'] == 0
    assert after['flatgpt_cache_tokens_size'] == 4 * 256 >= after['flatgpt_cache_tokens'] > 0


# Safety -------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def guarded():
    return Serving(chat_model(), TOKENIZER, chat.TEMPLATE, Guard({'box'}, 'sécret'))


def test_api_key(guarded):
    key = {'Authorization': 'Bearer s\xc3\xa9cret'}  # UTF-8, as headers have it
    assert guarded.call('/v1/models', **key)[0] == 200
    for wrong in ({}, {'Authorization': 'Bearer x'}, {'Authorization': 'sécret'}, {'Authorization': 'Bearer '},
                  {'Authorization': 'Bearer \xff\xfe'}):
        for path in ('/v1/models', '/metrics', '/v1/models/tiny'):
            status, value = guarded.call(path, **wrong)
            assert status == 401 and 'sécret' not in json.dumps(value)
        assert guarded.call('/v1/chat/completions', {'messages': HELLO}, **wrong)[0] == 401
    assert guarded.call('/health')[0] == 200


def test_hosts_and_origins(serving, guarded):
    for host, status in (('localhost:80', 200), ('127.0.0.1', 200), ('[::1]:5', 200), ('192.168.1.5:8000', 200),
                         ('evil.com', 403), ('127.0.0.1.evil.com', 403), ('localhost.evil.com:8000', 403), ('', 403),
                         ('[::1', 403), ('::1%?x', 403), ('box', 403), ('LOCALHOST', 200), ('localhost:80:80', 403), ('[evil]', 403)):
        assert serving.call('/health', Host=host)[0] == status, host
    assert guarded.call('/health', Host='box:8000')[0] == 200
    own = f'127.0.0.1:{serving.port}'
    for origin, status in ((f'http://{own}', 200), ('http://evil.com', 403), ('null', 403), ('http://localhost', 403),
                           (f'http://{own}.evil.com', 403), (f'http://evil.com/{own}', 403), ('', 403)):
        assert serving.call('/v1/models', Host=own, Origin=origin)[0] == status, origin
    assert serving.headers['x-content-type-options'] == 'nosniff'
