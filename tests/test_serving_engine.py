"""The engine of serve.py: joins, pieces, shared beginnings, ends. Run: pytest tests/test_serving_engine.py"""

import random
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import wait_for
from tiny_models import ARCHITECTURES, sharpened, tiny

from configurator import UserError
from flatgpt.generate import generate_texts
from flatgpt.quantize import for_decoding
from flatgpt.sampling import Sampling, uniforms
from serving.engine import Answer, Engine, Full, Limits, common
from serving.pool import Pool, bytes_of
from tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SIZES = {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'block_size': 64, 'vocab_size': 256}
ALL = {**ARCHITECTURES['modern'], **SIZES, 'n_kv_head': 2, 'window': 7, 'window_pattern': 'SL',
       'value_embeddings': True, 'residual_lambdas': True, 'logit_softcap': 5.0}


def engine_of(options=None, **limits):
    model = sharpened(tiny(**{**SIZES, **(options or {})})).eval()
    return Engine(model, TOKENIZER, Limits(**{'max_streams': 4, 'context': 64, 'max_queue': 100, **limits}))


def ask(engine, prompt, n=8, seed=0, owner=None, **controls):
    """Submit a request; -> Answer with .heard, its News."""
    heard = []
    answer = Answer(list(prompt), Sampling(n, **controls), uniforms(seed, 0, 0, n), heard.append, n_likeliest=3,
                    owner=owner)
    answer.heard = heard
    engine.submit(answer)
    return answer


def finish(engine):
    for _ in range(2000):
        if not engine.running and not engine.waiting:
            return
        engine.step()
    raise AssertionError('the engine does not come to an end')


def alone(engine, prompt, n=8, seed=0, **controls):
    """The sample that sample.py draws: with generate_texts(), from a batch of one."""
    sampling = Sampling(n, **controls, seed=seed, n_ids=256)
    *_, [sample] = generate_texts(engine.model, TOKENIZER, [list(prompt)], sampling)
    return sample


def said(answer):
    return ''.join(news.text for news in answer.heard)


@pytest.mark.parametrize('preset', ['gpt2', 'llama', 'all'])
def test_answers_of_a_batch_are_those_alone(preset):
    """More answers than rows, of prompts of all lengths, greedy and drawn: ids, texts, log-probabilities, ends."""
    engine = engine_of({**ARCHITECTURES.get(preset, ALL), **SIZES} if preset != 'all' else ALL)
    rng = random.Random(0)
    cases = []
    for seed in range(14):
        prompt = rng.choices(range(32, 127), k=rng.randint(1, 40))
        controls = rng.choice([{'temperature': 0}, {'temperature': 0.8, 'top_k': 20}, {'top_p': 0.9}, {'min_p': 0.05},
                               {'temperature': 1.3, 'repetition_penalty': 1.4}, {'stops': ['a']}])
        cases.append((ask(engine, prompt, rng.randint(1, 20), seed, **controls), prompt, controls, seed))
    finish(engine)
    for answer, prompt, controls, seed in cases:
        want = alone(engine, prompt, answer.sampling.max_new_tokens, seed, **controls)
        assert answer.sample.ids == want.ids and said(answer) == want.text
        assert answer.heard[-1].finish == want.finish and answer.sample.finish == want.finish
        tokens = [token for news in answer.heard for token in news.tokens]
        assert [token.id for token in tokens] == want.ids
        assert [token.logprob for token in tokens] == pytest.approx(want.logprobs, abs=1e-4)
        for token in tokens:
            (_, best), (_, second), (_, third) = token.likeliest
            assert best >= second >= third and best >= token.logprob - 1e-6


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(1, 12), st.booleans()), max_size=20),
       st.integers(0, 99))
def test_joins_and_leaves_change_no_answer(events, seed):
    """Requests come at any step, with common beginnings; some leave. The others are what they are alone."""
    engine, rng, answers = engine_of(max_streams=3), random.Random(seed), []
    texts = [bytes(rng.choices(b'abc ', k=30)) for _ in range(3)]
    for wait, which, n, leaves in events:
        prompt = (texts[which % 3][: 8 + 5 * which] + bytes(rng.choices(b'xyz', k=which)))[:40]
        answers.append((ask(engine, prompt, n, seed=len(answers)), prompt, leaves))
        for _ in range(wait):
            engine.step()
        if leaves:
            answers[rng.randrange(len(answers))][0].cancel()
    finish(engine)
    assert engine.running == [] and sorted(map(len, engine.pool.ids))[-1] <= 64
    for i, (answer, prompt, _) in enumerate(answers):
        want = alone(engine, prompt, answer.sampling.max_new_tokens, i)
        if answer.is_cancelled and answer.sample.finish is None:
            assert want.ids[: len(answer.tokens)] == [token.id for token in answer.tokens]
        else:
            assert answer.sample.ids == want.ids and said(answer) == want.text


def test_pool_holds_what_it_says():
    """After any traffic the keys of a row are those of its ids, computed anew."""
    engine, rng = engine_of(), random.Random(1)
    for seed in range(12):
        ask(engine, rng.choices(b'ab', k=rng.randint(1, 30)), rng.randint(1, 9), seed)
        for _ in range(rng.randint(0, 4)):
            engine.step()
    finish(engine)
    for row, ids in enumerate(engine.pool.ids):
        pool = Pool(engine.model.config, 1, 64)
        with torch.no_grad():
            engine.model.hidden(torch.tensor([ids]), pool.pieces([len(ids)]))
        for ours, fresh in ((engine.pool.k, pool.k), (engine.pool.v, pool.v)):
            torch.testing.assert_close(ours[:, row, :, : len(ids)], fresh[:, 0, :, : len(ids)], atol=1e-4, rtol=1e-4)
    assert sum(map(len, engine.pool.ids)) > 40


def test_long_prompts_are_read_in_pieces():
    """While a prompt is read, each running answer gets a token in every step."""
    engine = engine_of(max_streams=3)
    engine.rate = 0.0  # so a piece has the least size, 16 tokens
    short = [ask(engine, b'ab', 30, seed) for seed in range(2)]
    engine.step()
    long = ask(engine, b'x' * 50, 4)
    for n in range(1, 5):
        before = [len(answer.tokens) for answer in short]
        engine.rate = 0.0
        engine.step()
        assert [len(answer.tokens) for answer in short] == [count + 1 for count in before]
        assert len(engine.pool.ids[long.row]) == min(50, 16 * n) and len(long.tokens) == (n == 4)
    finish(engine)


def test_a_shared_beginning_is_read_once():
    engine = engine_of(max_streams=3)
    system = bytes(range(32, 72))
    first = ask(engine, system + b'one', 4)
    second = ask(engine, system + b'two', 4)  # it waits until the first has read what they share
    engine.step()
    assert second.row is None and first.row == 0
    finish(engine)
    assert (first.n_cached, second.n_cached) == (0, 40)
    chat = system + b'one' + bytes(first.sample.ids) + b'more'
    third = ask(engine, chat, 4)
    finish(engine)
    assert third.n_cached == len(chat) - 5  # all that was computed: the last token drawn was not
    again = ask(engine, chat, 4)
    finish(engine)
    assert again.n_cached == len(chat) - 1 and again.sample.ids == third.sample.ids
    assert engine.counts['cached_tokens'] == sum(answer.n_cached for answer in (second, third, again))


def test_common():
    assert [common(a, b) for a, b in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1, 3, 3]), ([2], [1]))] == [0, 2, 1, 0]


def test_a_cancelled_answer_frees_its_row_at_once():
    engine = engine_of(max_streams=2)
    going = [ask(engine, b'abc', 40, seed) for seed in range(2)]
    waiting = [ask(engine, b'x', 5, seed) for seed in range(2)]
    engine.step()
    assert [answer.row for answer in waiting] == [None, None]
    going[0].cancel()
    waiting[1].cancel()
    engine.step()
    assert set(engine.running) == {going[1], waiting[0]} and not engine.waiting
    finish(engine)
    assert waiting[0].sample.ids == alone(engine, b'x', 5).ids and waiting[1].heard == []


def test_a_request_with_many_answers_shares_the_rows():
    """Another request gets the next row that is free, though it came later."""
    engine = engine_of(max_streams=2)
    many = [ask(engine, b'abc', 4, seed, owner='many') for seed in range(6)]
    engine.step()
    late = ask(engine, b'xyz', 4, owner='late')
    while late.row is None:
        engine.step()
    assert sum(answer.sample.finish is None for answer in many) >= 4
    finish(engine)


def test_full_queue_and_prompts_that_never_fit():
    engine = engine_of(max_streams=1, max_queue=2)
    for seed in range(3):
        ask(engine, b'a', 3, seed)
    with pytest.raises(Full, match='2 answers are waiting: expected fewer than 2'):
        ask(engine, b'a', 3)
    finish(engine)
    for n_prompt, n in ((64, 1), (60, 5)):
        with pytest.raises(UserError, match='expected at most 64 in all'):
            ask(engine, b'a' * n_prompt, n)
    ask(engine, b'a' * 60, 4)
    finish(engine)


def test_deadline():
    engine = engine_of(max_streams=1)
    running, waiting = ask(engine, b'abc', 50), ask(engine, b'abc', 5)
    engine.step()
    running.deadline = waiting.deadline = time.monotonic() - 1
    engine.step()
    assert running.heard[-1].finish == 'length' and len(said(running)) >= 1
    assert waiting.heard[-1].finish == 'unavailable' and not engine.running and not engine.waiting


def test_stop():
    engine = engine_of(max_streams=1)
    answers = [ask(engine, b'abc', 9, seed) for seed in range(2)]
    engine.step()
    engine.stop()
    assert [answer.heard[-1].finish for answer in answers] == ['unavailable', 'unavailable']
    with pytest.raises(Full, match='the server stops'):
        ask(engine, b'abc', 9)


def test_an_error_ends_the_answers_and_not_the_loop(capsys):
    engine = engine_of()
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    broken, forward = threading.Event(), engine.model.hidden

    def fail(*arguments):
        if broken.is_set():
            raise RuntimeError('a kernel failed')
        return forward(*arguments)
    engine.model.hidden = fail
    broken.set()
    answer = ask(engine, b'abc', 5)
    wait_for(lambda: answer.heard)
    assert answer.heard[-1].finish == 'error' and 'an error of the server' in said(answer)
    broken.clear()
    answer = ask(engine, b'abc', 5)
    wait_for(lambda: answer.sample.finish)
    assert answer.sample.ids == alone(engine, b'abc', 5).ids and 'a kernel failed' in capsys.readouterr().err


class Broken:
    def draw(self, logits, remaining, draw):
        raise ValueError('no way on')


class Slow:
    def draw(self, logits, remaining, draw):
        time.sleep(0.06)
        return torch.tensor([[97]])


def test_slow_constraints_take_turns():
    """They take 0.1 s of a step; the other answers get a token in each, and all come to their end."""
    engine = engine_of(max_streams=5)
    free = ask(engine, b'xyz', 8)
    slow = [ask(engine, b'abc', 3, constraint=SimpleNamespace(matcher=Slow)) for _ in range(4)]
    for n in range(1, 7):
        engine.step()
        assert len(free.tokens) == n and sum(len(answer.tokens) for answer in slow) == 2 * n
    finish(engine)
    assert [said(answer) for answer in slow] == ['aaa'] * 4 and free.sample.ids == alone(engine, b'xyz', 8).ids


def test_nan_ends_one_answer():
    """A row whose logits are NaN says so; its neighbours go on."""
    engine = engine_of({'pos': 'learned'})
    with torch.no_grad():
        engine.model.transformer.wte.weight[65] = float('nan')  # no other row reads this embedding
        engine.model.lm_head.weight = torch.nn.Parameter(engine.model.lm_head.weight.nan_to_num(0.0))
    good, bad = ask(engine, b'xyz', 5, temperature=0), ask(engine, b'A', 5, temperature=0)
    finish(engine)
    bound = ask(engine, b'A', 5, constraint=SimpleNamespace(matcher=Broken))  # it ends once
    finish(engine)
    assert bound.heard[-1].finish == 'refused' and len(bound.heard) == 1
    assert bad.heard[-1].finish == 'error' and 'NaN' in said(bad)
    assert good.heard[-1].finish == 'length' and len(good.tokens) == 5


def test_constraint():
    """One answer is JSON of a schema, another in the same batch is free."""
    constrain = pytest.importorskip('flatgpt.constrain')
    pytest.importorskip('llguidance')
    engine = engine_of()
    constraint = constrain.Constraint(TOKENIZER, json_schema={'enum': ['red', 'green', 7]})
    bound = [ask(engine, b'color: ', 20, seed, constraint=constraint) for seed in range(6)]
    free = ask(engine, b'color: ', 20)
    finish(engine)
    assert {said(answer) for answer in bound} <= {'"red"', '"green"', '7'} and len({*map(said, bound)}) > 1
    assert all(answer.heard[-1].finish == 'complete' for answer in bound)
    assert free.sample.ids == alone(engine, b'color: ', 20).ids


def test_bytes_of():
    engine = engine_of({'n_kv_head': 2})
    pool = engine.pool
    assert pool.k.nbytes + pool.v.nbytes == 4 * bytes_of(engine.model.config, 64, torch.float32)


@pytest.mark.parametrize('options', [{}, ALL])
def test_compiled_step(options):
    """One row and several say the same, in whatever lengths."""
    options = {**options, 'n_embd': 128}
    plain, compiled = engine_of(options), engine_of(options)
    for_decoding(compiled.model, torch.float32, compile=True, any_rows=True)
    compiled.warm_up()
    rng = random.Random(2)
    pairs = []
    for seed in range(9):
        prompt, n = rng.choices(range(256), k=rng.randint(1, 30)), rng.randint(1, 30)
        pairs.append([ask(engine, prompt, n, seed) for engine in (plain, compiled)])
        for _ in range(rng.randint(0, 12)):
            plain.step(), compiled.step()
    finish(plain), finish(compiled)
    assert all(a.sample.ids == b.sample.ids for a, b in pairs)
