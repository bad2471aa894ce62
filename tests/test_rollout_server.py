"""posttrain.rl --rollout_server, against a stand-in that speaks vLLM's protocol. Run: pytest tests/test_rollout_server.py"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from chat_models import END, make_chats, save_chat_model
from conftest import environments, same_tensors
from test_rl_e2e import SMALL, steps_of

from flatgpt import huggingface

pytest.importorskip('safetensors')
SETTINGS = {**SMALL, 'out_dir': 'out', 'rollout_folder': 'served', 'prompts_per_step': 6, 'group_size': 4,
            'minibatch_size': 24, 'max_iters': 4, 'eval_interval': 2}


class Server(ThreadingHTTPServer):
    request_queue_size = 256


class Handler(BaseHTTPRequestHandler):
    """Answer as vLLM does, by a model that is read from the folder anew when that is asked for."""

    def log_message(self, *arguments):
        pass

    def answer(self, value, code=200):
        content = b'' if value is None else json.dumps(value).encode()
        self.send_response(code)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.answer({'data': [{'id': 'served', 'root': 'served'}]} if self.path == '/v1/models' else None,
                    200 if self.path == '/v1/models' else 404)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with server.lock:
            if self.path in server.missing:
                self.answer({'detail': 'Not Found'}, 404)
            elif self.path == '/collective_rpc' and body == {'method': 'reload_weights'}:
                server.model, server.reloads = huggingface.load(str(server.folder))[0].eval(), server.reloads + 1
                self.answer({'results': [None]})
            elif self.path == '/reset_prefix_cache':
                server.is_reset = server.reloads
                self.answer(None)
            elif self.path == '/v1/completions' and body['model'] == 'served':
                assert server.is_reset == server.reloads  # no keys and values of former weights
                ids = draw(server.model, body)
                choice = {'index': 0, 'text': '', 'finish_reason': 'stop' if ids[-1] == END else 'length',
                          'token_ids': ids}
                server.answers.append(ids)
                self.answer({'choices': [{name: choice[name] for name in set(choice) - server.missing}]})
            else:
                self.answer({'detail': 'Bad Request'}, 400)


@torch.no_grad()
def draw(model, body):
    generator, ids = torch.Generator().manual_seed(body['seed']), []
    while len(ids) < body['max_tokens'] and (not ids or ids[-1] not in body['stop_token_ids']):
        logits = model.logits(model.hidden(torch.tensor([body['prompt'] + ids])))[0, -1]
        for i, bias in body['logit_bias'].items():
            logits[int(i)] += bias
        if body['temperature']:
            probabilities = (logits / body['temperature']).softmax(-1)
            ids.append(torch.multinomial(probabilities, 1, generator=generator).item())
        else:
            ids.append(logits.argmax().item())
    return ids


@pytest.fixture
def served(tmp_path):
    """(a folder with the model `chat` exported to `served`, a server of that)."""
    folder = make_chats(tmp_path)
    state = folder.checkpoint('chat')
    for name in ('transformer.wte.weight', 'lm_head.weight'):  # ids that are none of the tokenizer, and likely
        state['model'][name] = torch.cat((state['model'][name], torch.zeros(4, 32)))
    state['model']['lm_head.weight'][-4:, 0] = 3.0
    state['model_args']['vocab_size'] += 4
    torch.save(state, tmp_path / 'chat' / 'ckpt.pt')
    folder.start('flatgpt.export', out_dir='chat', out='served').ok()
    server = Server(('localhost', 0), Handler)
    server.folder, server.lock, server.missing, server.answers = tmp_path / 'served', threading.Lock(), set(), []
    server.model, server.reloads, server.is_reset = None, 0, 0
    server.url = f'http://localhost:{server.server_address[1]}/v1'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, server
    server.shutdown()
    server.server_close()


def start(folder, server, env=None, **changes):
    return folder.start('posttrain.rl', **{**SETTINGS, 'rollout_server': server.url, **changes}, env=env)


@pytest.mark.slow
@pytest.mark.parametrize('algorithm', ['grpo', 'ppo'])
def test_the_server_draws_and_gets_the_weights(served, algorithm):
    """Of each step, also after a run resumes, and with two processes as with one."""
    folder, server = served
    start(folder, server, algorithm=algorithm, max_iters=2).ok()
    start(folder, server, algorithm=algorithm, init_from='resume').ok()
    assert server.reloads == 3 + 3 and len(server.answers) == 4 * 24 + 3 * 16
    assert max(max(ids) for ids in server.answers) < 266  # the tokenizer's, of 270 in the model
    weights = folder.checkpoint()['model']
    same_tensors(server.model.state_dict(), weights)
    assert not torch.equal(weights['lm_head.weight'], folder.checkpoint('chat')['model']['lm_head.weight'])
    answers, server.answers, server.reloads = server.answers, [], 0
    for process in [start(folder, server, env, algorithm=algorithm, out_dir='two') for env in environments(2)]:
        process.ok()
    assert server.reloads == 5
    assert sorted(server.answers) == sorted(answers)
    times = {'ms': 0, 'train_time': 0}
    for record, other in zip(steps_of(folder, 'two'), steps_of(folder), strict=True):
        assert {**record, **times} == pytest.approx({**other, **times}, abs=1e-5)


@pytest.mark.slow
def test_it_learns(served):
    folder, server = served
    start(folder, server, max_iters=25, eval_interval=25, prompts_per_step=8, group_size=8, minibatch_size=32).ok()
    first, *_, last = steps_of(folder)
    assert first['reward'] < 0.3 and last['reward'] > 0.6


@pytest.mark.parametrize('changes, missing, said', [
    ({'rollout_folder': ''}, (), '--rollout_folder=FOLDER, and no tools'), ({'tools': True}, (), 'and no tools'),
    ({'rollout_server': 'localhost:8000'}, (), "rollout_server='localhost:8000': expected an address such as"),
    pytest.param({'rollout_server': 'http://localhost:1/v1'}, (),
                 'http://localhost:1/v1/models gives no answer ([Errno 111] Connection', marks=pytest.mark.slow),
    ({'rollout_folder': 'tasks'}, (), "rollout_folder='tasks' has no config.json; expected the folder"),
    ({'rollout_folder': 'other'}, (), "rollout_folder='other' has vocab_size=266, and the policy 270; expected"),
    ({'init_from': 'served'}, (), "rollout_folder='served': expected another folder than --init_from"),
    ({}, {'/collective_rpc'}, 'collective_rpc answers 404 Not Found: {"detail": "Not Found"}; start it with VLLM_'),
    ({}, {'token_ids'}, 'returned token_ids=None, expected 1 to 6 ids below 266')])
def test_refuses(served, changes, missing, said):
    folder, server = served
    server.missing = set(missing)
    if changes.get('rollout_folder') == 'other':
        save_chat_model(folder.path, 'smaller')
        folder.start('flatgpt.export', out_dir='smaller', out='other').ok()
    start(folder, server, **changes).refused(said)
    assert not (folder.path / 'out' / 'ckpt.pt').exists()
