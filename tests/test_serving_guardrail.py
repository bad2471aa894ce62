"""serve.py --guardrail: requests and answers of a label. Run: pytest tests/test_serving_guardrail.py"""

import random
import string
from concurrent.futures import CancelledError
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from chat_models import TOKENIZER, tiny
from servers import Serving, wait_for
from test_serving_api import chat_model

from configurator import UserError
from flatgpt import classify
from serving.guardrail import CHARACTERS, Guardrail
from tokenizer import CharTokenizer, chat


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A classifier that gives about half of all texts the label 'bad'. Its context is 32 bytes."""
    path = tmp_path_factory.mktemp('classifier')
    model = classify.add_head(tiny('modern'), 2)
    torch.manual_seed(1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    torch.save({'version': 1, 'model': model.state_dict(), 'model_args': asdict(model.config), 'iter_num': 1,
                'best_val_loss': 1.0, 'config': {}, 'tokenizer': TOKENIZER.to_dict(), 'classes': ['bad', 'fine']},
               path / 'ckpt.pt')
    return str(path)


@pytest.fixture(scope='module')
def servers(folder):
    """The same model with a guardrail and without."""
    model = chat_model(block_size=1024)
    return [Serving(model, TOKENIZER, chat.TEMPLATE, guardrail=setting) for setting in (f'{folder}:bad', '')]


def ask(server, content, **more):
    return server.call('/v1/chat/completions', {'messages': [{'role': 'user', 'content': content}], 'max_tokens': 30, **more})


def is_bad(folder, text):
    return classify.load(folder).probabilities([text])[0]['bad'] > 0.5


def test_requests_and_answers_of_the_label(folder, servers):
    """Each message of its label is refused, each answer of it withheld; all else is as without it."""
    guarded, plain = servers
    counts = [0, 0, 0]
    for seed in range(16):
        content = f'Say {chr(97 + seed) * (seed + 1)}.'
        status, value = ask(guarded, content, seed=seed)
        [choice] = ask(plain, content, seed=seed)[1]['choices']
        if is_bad(folder, content):
            counts[0] += 1
            assert status == 400 and value['error']['code'] == 'content_filter', value
            assert "finds 'bad' in the request, with probability" in value['error']['message']
        elif is_bad(folder, choice['message']['content']):
            counts[1] += 1
            assert value['choices'][0]['finish_reason'] == 'content_filter'
            assert value['choices'][0]['message']['content'] == ''
        else:
            counts[2] += 1
            assert value['choices'] == [choice]
    assert min(counts) > 0, counts
    wait_for(guarded.is_idle)


def test_streams_come_in_pieces_that_were_read(folder, servers):
    guarded, plain = servers
    seen = set()
    for seed in range(6):
        asked = {'prompt': 'a', 'max_tokens': 450, 'seed': seed, 'stop': ['zz'], 'logit_bias': None}
        if is_bad(folder, 'a'):
            asked['prompt'] = 'b'
        whole = plain.call('/v1/completions', asked)[1]['choices'][0]['text']
        events = [event['choices'][0] for event in guarded.events('/v1/completions', asked)]
        text = ''.join(choice['text'] for choice in events)
        assert whole.startswith(text)
        if events[-1]['finish_reason'] == 'content_filter':
            rest = whole[len(text) :]  # the next piece has the label
            assert any(is_bad(folder, whole[: len(text) + n]) for n in range(min(len(rest), CHARACTERS), len(rest) + 1))
        else:
            assert text == whole and not is_bad(folder, whole)
        seen.add(events[-1]['finish_reason'])
    assert 'content_filter' in seen and len(seen) > 1


def test_a_long_text_is_read_whole(folder):
    """Windows as long as the classifier's context, which overlap by half, cover a text."""
    classifier, rng = classify.load(folder), random.Random(0)
    for n in (0, 1, 30, 31, 32, 60, 100):  # the context has 31 bytes beside the extract token
        text = ''.join(rng.choices(string.ascii_letters, k=n))
        starts = {*range(0, max(0, n - 31), 15), max(0, n - 31)}
        parts = classifier.probabilities([text[start : start + 31] for start in starts])
        assert classifier.greatest(text, 'bad') == pytest.approx(max(part['bad'] for part in parts), abs=1e-6)


def test_functions_run_in_the_engine(servers):
    """An error of a function reaches its caller alone."""
    engine = servers[0].engine
    assert engine.call(sum, [1, 2]).result(10) == 3
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(10)
    future = engine.call(time_of_nothing)
    if future.cancel():
        with pytest.raises(CancelledError):
            future.result(10)
    assert engine.call(sum, [2, 2]).result(10) == 4


def time_of_nothing():
    return 0


def test_refused(tmp_path, folder):
    for setting, message in ((f'{folder}:rude', "has no label 'rude'; expected one of bad, fine"),
                             (folder, 'expected FOLDER:LABEL'), ('bad', 'expected FOLDER:LABEL'),
                             (f'{tmp_path}:bad', 'there is no classifier in')):
        with pytest.raises(UserError, match=message):
            classify.load_label(setting)


def test_a_classifier_that_cannot_read_every_text(folder, tmp_path):
    """With a vocabulary of characters it would fail at a request's first other character."""
    state = torch.load(f'{folder}/ckpt.pt', weights_only=True)
    torch.save({**state, 'tokenizer': CharTokenizer('abc dé').to_dict()}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=f'guardrail={tmp_path}:bad: its classifier cannot read every text; expected a voc'):
        Guardrail(f'{tmp_path}:bad', 0.5, SimpleNamespace(device='cpu'))


def test_an_error_of_the_guardrail_ends_the_request(folder, servers, monkeypatch, capsys):
    """The client gets an error at once, and the log the reason."""
    async def fail(self, text):
        raise ZeroDivisionError('of a test')

    monkeypatch.setattr(Guardrail, 'withholds', fail)
    prompt = 'b' if is_bad(folder, 'a') else 'a'
    status, value = servers[0].call('/v1/completions', {'prompt': prompt, 'max_tokens': 3})
    assert status == 500 and value['error']['message'] == 'an error of the server'
    _, events = servers[0].call('/v1/completions', {'prompt': prompt, 'max_tokens': 3, 'stream': True})
    assert 'an error of the server' in events and 'of a test' in capsys.readouterr().err
