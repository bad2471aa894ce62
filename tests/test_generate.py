"""generate.py: drawing tokens, and the cache against no cache. Run: pytest tests/test_generate.py"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generate import generate, generate_texts, sample_next
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer


@pytest.fixture(scope='module')
def gpt():
    """A model that says many different things, and whose likeliest tokens are no near ties that rounding could swap."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(block_size=12, vocab_size=32, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.4)
        model.transformer.ln_f.bias.zero_()
    return model.eval()


def collect(*args, **controls):
    return torch.cat(list(generate(*args, **controls)), dim=1)


# against the plain definition -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('n_prompt', [1, 5, 11, 12, 13, 30])  # block_size is 12
def test_greedy_equals_uncached(gpt, n_prompt):
    """With the cache, past block_size where the context slides, and from a prompt longer than block_size."""
    idx = torch.randint(32, (3, n_prompt), generator=torch.Generator().manual_seed(n_prompt))
    cached = collect(gpt, idx, 30, temperature=0)
    assert torch.equal(cached, gpt.generate(idx, 30, temperature=0)[:, n_prompt:])
    assert len(cached.unique()) > 2  # the test would see a model that repeats one token forever


def test_logits_of_every_step_equal_uncached(gpt):
    idx = torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(3))
    seen = []
    hook = gpt.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits[:, -1]))
    new = collect(gpt, idx, 20, temperature=1.0, generator=torch.Generator().manual_seed(0))
    hook.remove()
    context = torch.cat((idx, new), dim=1)
    for step in range(20):
        window = context[:, max(0, 5 + step - 12) : 5 + step]
        torch.testing.assert_close(seen[step], gpt(window)[0][:, -1], atol=1e-4, rtol=1e-4)


def test_the_cache_costs_one_position_a_token(gpt):
    lengths = []
    hook = gpt.transformer.h[0].register_forward_hook(lambda module, args, x: lengths.append(x.size(1)))
    collect(gpt, torch.zeros(1, 4, dtype=torch.long), 10)
    hook.remove()
    assert lengths[:9] == [4, 1, 1, 1, 1, 1, 1, 1, 1] and set(lengths[9:]) == {12}


def test_bf16_cache(gpt):
    idx = torch.zeros(1, 4, dtype=torch.long)
    with torch.autocast('cpu', torch.bfloat16):
        assert collect(gpt, idx, 20, cache_dtype=torch.bfloat16).shape == (1, 20)


# drawing --------------------------------------------------------------------------------------------------------------

def frequencies(logits, n=40_000, **controls):
    generator = torch.Generator().manual_seed(0)
    ids = sample_next(torch.tensor(logits).expand(n, -1), generator=generator, **controls)
    assert ids.shape == (n, 1)
    return torch.bincount(ids[:, 0], minlength=len(logits)) / n


PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]
LOGITS = torch.tensor(PROBABILITIES).log().tolist()


@pytest.mark.parametrize('controls, expected', [
    ({}, PROBABILITIES),
    ({'temperature': 0.5}, [p * p / 0.285 for p in PROBABILITIES]),
    ({'temperature': 1e-4}, [0, 1, 0, 0, 0]), ({'temperature': 1e-29}, [0, 1, 0, 0, 0]),
    ({'temperature': 1e-37}, [0, 1, 0, 0, 0]),  # the quotients overflow float32
    ({'temperature': 1e-42}, [0, 1, 0, 0, 0]), ({'temperature': 1e-300}, [0, 1, 0, 0, 0]),
    ({'temperature': 1e-42, 'top_k': 3, 'top_p': 0.5}, [0, 1, 0, 0, 0]), ({'temperature': 1e300}, [0.2] * 5),
    ({'temperature': 0}, [0, 1, 0, 0, 0]),
    ({'top_k': 2}, [0, 4 / 7, 0, 3 / 7, 0]),
    ({'top_k': 1}, [0, 1, 0, 0, 0]), ({'top_k': 99}, PROBABILITIES), ({'top_k': 5}, PROBABILITIES),
    ({'top_p': 0.39}, [0, 1, 0, 0, 0]),
    ({'top_p': 0.41}, [0, 4 / 7, 0, 3 / 7, 0]), ({'top_p': 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
    ({'top_p': 0.8}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
    ({'top_p': 1.0}, PROBABILITIES), ({'top_p': 1e-9}, [0, 1, 0, 0, 0]),
    ({'top_k': 3, 'top_p': 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),  # of three that sum to 0.85, two hold 0.82
    ({'temperature': 0, 'top_k': 3, 'top_p': 0.5}, [0, 1, 0, 0, 0])])
def test_sample_next(controls, expected):
    observed = frequencies(LOGITS, **controls)
    for p, q in zip(expected, observed.tolist(), strict=True):
        assert abs(p - q) < 5 * (p * (1 - p) / 40_000) ** 0.5 + 1e-9


@given(logits=st.lists(st.integers(-5000, 5000).map(lambda i: i / 100), min_size=1, max_size=20),  # no near ties
       top_k=st.none() | st.integers(1, 25), top_p=st.none() | st.floats(0.001, 1),
       temperature=st.sampled_from([0, 0.01, 1.0, 3.0]))
@settings(max_examples=200)
def test_sample_next_keeps_to_its_set(logits, top_k, top_p, temperature):
    """What is drawn is always among the top_k, and among the likeliest that hold top_p."""
    drawn = sample_next(torch.tensor([logits]), temperature, top_k, top_p).item()
    likelier = [x > logits[drawn] for x in logits]
    assert sum(likelier) < (top_k or len(logits))
    if temperature:
        p = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0)
        mass = p[torch.tensor(likelier)].sum().item()
        assert top_p is None or mass < top_p + 1e-5
    else:
        assert not any(likelier)


def test_padding_is_never_drawn(gpt):
    """Ids past vocab_size, even those of huge logits, are never drawn, greedily or not."""
    model = GPT(GPTConfig(block_size=12, vocab_size=32, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[20:] = 100.0
    idx = torch.zeros(4, 1, dtype=torch.long)
    assert collect(model, idx, 30, temperature=0).min() >= 20  # unless told
    for temperature in (0, 1.0, 100.0):
        assert collect(model, idx, 30, temperature=temperature, vocab_size=20).max() < 20


def test_seeds_and_rows(gpt):
    idx = torch.zeros(6, 2, dtype=torch.long)
    a, b, c = (collect(gpt, idx, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len({tuple(row) for row in a.tolist()}) > 1  # the samples of one batch differ
    torch.manual_seed(0)
    before = torch.get_rng_state()
    collect(gpt, idx, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)  # nothing else's random numbers are used


def test_no_tokens(gpt):
    assert list(generate(gpt, torch.zeros(1, 3, dtype=torch.long), 0)) == []


# texts ----------------------------------------------------------------------------------------------------------------

CHARS = CharTokenizer([chr(ord('a') + i) for i in range(26)] + list(' .,!?\n'))


class Script:
    """In place of a model: says the given ids, whatever it is asked."""

    def __init__(self, ids, vocab_size=256, block_size=1000):
        self.ids, self.said, self.vocab_size = ids, 0, vocab_size
        self.config = GPTConfig(block_size=block_size, n_layer=1, n_head=1, n_embd=1)
        self.lm_head = torch.nn.Linear(1, 1)

    def __call__(self, idx, cache=None):
        self.heard = idx
        logits = torch.full((len(idx), 1, self.vocab_size), -100.0)
        logits[:, 0, self.ids[min(self.said, len(self.ids) - 1)]] = 100.0
        self.said += 1
        if cache is not None:
            cache.length += idx.size(1)
        return logits, None


def texts_of(text, stop='', num_samples=1, max_new_tokens=None):
    """-> the texts after every token when a byte model says `text`."""
    ids = list(text if isinstance(text, bytes) else text.encode())
    steps = generate_texts(Script(ids), ByteTokenizer(), 'x', num_samples, max_new_tokens or len(ids), stop)
    return [(list(texts), list(done)) for texts, done in steps]


def test_texts_grow_by_whole_characters():
    steps = [texts[0] for texts, _ in texts_of('aé🙂z')]
    assert steps == ['a', 'a', 'aé', 'aé', 'aé', 'aé', 'aé🙂', 'aé🙂z']


def test_bytes_that_are_no_text():
    assert texts_of(b'a\xff\xc3z')[-1][0] == ['a\ufffd\ufffdz']


@pytest.mark.parametrize('text, stop, expected', [
    ('hello END more', 'END', 'hello '), ('hello END more', 'xyz', 'hello END more'), ('ENDEND', 'END', ''),
    ('EENEND.', 'END', 'EEN'), ('a🙂b', '🙂', 'a'), ('line\nnext', '\n', 'line')])
def test_stop(text, stop, expected):
    steps = texts_of(text, stop, num_samples=2)
    assert steps[-1] == ([expected] * 2, [stop in text] * 2)
    if stop in text:
        assert len(steps) == len(text[: text.index(stop)].encode()) + len(stop.encode())  # no token more is computed


def test_prompts(gpt):
    def first(prompt, **controls):
        return next(generate_texts(gpt, CHARS, prompt, 2, 1, **controls))[0]

    assert [len(text) for text in first('hello')] == [1, 1]
    with pytest.raises(ValueError, match='prompt is empty.*--start="The"'):
        first('')
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\)"):
        first('caf\u00e9')
    *_, (texts, done) = generate_texts(gpt, CHARS, 'hello there, this is long', 3, 25, seed=4, temperature=0)
    assert [len(text) for text in texts] == [25] * 3 and len(set(texts)) == 1 and done == [False] * 3
    runs = [list(generate_texts(gpt, CHARS, 'a', 3, 25, seed=seed))[-1][0] for seed in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]


def test_special_tokens_of_a_prompt():
    """What the model is given is the one id of <|endoftext|>, not the ids of its characters."""
    tokenizer = BPETokenizer.train(['hello hello'] * 3, vocab_size=260, special_tokens=['<|endoftext|>'])
    model = Script([0], tokenizer.vocab_size)
    next(generate_texts(model, tokenizer, 'hi<|endoftext|>', 2, 1))
    assert model.heard.tolist() == [[*tokenizer.encode('hi'), tokenizer.eot]] * 2
