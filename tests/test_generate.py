"""generate.py: drawing tokens, and the cache against no cache. Run: pytest tests/test_generate.py"""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import OPTIONS, sharpened, tiny

from flatgpt import quantize
from flatgpt.cache import KVCache
from flatgpt.constrain import Constraint
from flatgpt.generate import Sample, generate, generate_texts
from flatgpt.lookup import Lookup
from flatgpt.sampling import Sampling, likeliest, majority, penalize, sample_next, uniforms
from model import GPT, GPTConfig
from tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from tokenizer.chat import encode_prompt


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


def collect(model, prompts, n, u=None, **controls):
    return torch.cat([ids for ids, _, _ in generate(model, prompts, Sampling(n, **controls), u)], dim=1)


# against the plain definition -----------------------------------------------------------------------------------------

@settings(max_examples=40)
@given(options=OPTIONS, lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4), seed=st.integers(0, 99),
       prefill_rows=st.sampled_from((1, 2, 16)))
def test_options_greedy_equals_uncached(options, lengths, seed, prefill_rows):
    """Every option of the model, prompts of different lengths in one batch, beyond block_size (16): each row has the
    tokens that it has alone without a cache."""
    model = sharpened(tiny(**options)).eval()
    source = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(40, (length,), generator=source).tolist() for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('flatgpt.generate.PREFILL_ROWS', {'cpu': prefill_rows})
        together = collect(model, prompts, 12, temperature=0)
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), 12, temperature=0)[0, len(prompt) :]
        if not torch.equal(together[row], alone):  # then where they part two ids must be as good as equally likely
            n = (together[row] != alone).nonzero()[0].item()
            logits = model(torch.tensor([prompt + alone[:n].tolist()])[:, -16:])[0][0, -1]
            assert (logits[alone[n]] - logits[together[row, n]]).abs() < 1e-3, (row, n)


@settings(max_examples=10)
@given(options=OPTIONS, seed=st.integers(0, 99))
def test_logprobs(options, seed):
    """Of a ragged batch, whatever the controls: those of log_softmax over the whole context, the model's own."""
    model = sharpened(tiny(**options)).eval()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    steps = list(generate(model, prompts, Sampling(8, temperature=0.7, top_k=20, repetition_penalty=1.3),
                          torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))))
    new, logprobs = (torch.cat([step[i] for step in steps], dim=1) for i in (0, 1))
    for row, prompt in enumerate(prompts):
        idx = torch.tensor([prompt + new[row].tolist()])
        expected = model(idx, idx)[0][0].log_softmax(-1)[len(prompt) - 1 : -1].gather(1, new[row][:, None])[:, 0]
        torch.testing.assert_close(logprobs[row], expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=40)
@given(options=OPTIONS, prompt=st.lists(st.integers(0, 3), min_size=1, max_size=20), most=st.integers(1, 8),
       slide=st.integers(1, 5), penalty=st.sampled_from((1.0, 1.3)), temperature=st.sampled_from((0.0, 0.5)))
def test_lookup(options, prompt, most, slide, penalty, temperature):
    """Guesses change no token, beyond block_size (16) either; a constraint and a penalty see each token in its turn."""
    model = sharpened(tiny(**options)).eval()
    controls = {'temperature': temperature, 'repetition_penalty': penalty, 'slide': slide, 'n_ids': 5,
                'constraint': Constraint(ByteTokenizer(), regex='[^x]*') if penalty == 1 and slide == 2 else None}
    if controls['constraint']:
        controls['n_ids'] = 40
    u = torch.rand(1, 24, generator=torch.Generator().manual_seed(len(prompt)))
    runs = [[torch.cat(part, dim=1) for part in zip(*(step[:2] for step in generate(
        model, [prompt], Sampling(24, lookup=lookup, **controls), u)), strict=True)] for lookup in (0, most)]
    (ids, logprobs), (got, got_logprobs) = runs
    same = (ids == got).long().cumprod(1).bool()
    torch.testing.assert_close(got_logprobs[same], logprobs[same], atol=1e-3, rtol=1e-3)
    if not same.all():  # then where they part two ids must be as good as equally likely
        n = same.sum().item()
        assert abs(logprobs[0, n] - got_logprobs[0, n]) < 1e-3


def test_guesses():
    """As many as the two places have in common before them; a wrong one drops the rest."""
    lookup = Lookup([1, 2, 3, 4, 5, 1, 2, 3], most=8)
    assert lookup.guess(100) == []  # three in common are too few
    assert not lookup.append(4) and lookup.guess(100) == [5, 1, 2, 3] and lookup.guess(2) == [5, 1]
    lookup.guess(100)
    assert [lookup.append(i) for i in (5, 1, 2)] == [True, True, True] and lookup.guesses == [3]
    assert lookup.guess(100) == [3, 4, 5, 1, 2, 3, 4]  # they repeat themselves
    assert [lookup.append(i) for i in (3, 9, 1)] == [True, False, False] and lookup.guesses == []
    long = Lookup([*range(20), *range(15)], most=8)
    assert long.guess(100) == [*range(15, 20), 0, 1, 2] and long.guess(-1) == []


def test_lookup_saves_passes():
    """A pass checks all guesses, and its logits after them serve for the tokens that were guessed right."""
    model, sizes = tiny(block_size=64, vocab_size=256).eval(), []
    model.transformer.h[0].register_forward_hook(lambda module, args, x: sizes.append(x.size(1)))
    constraint = Constraint(ByteTokenizer(), regex='(abcd){8}')
    assert bytes(collect(model, [[1]], 32, lookup=4, constraint=constraint)[0].tolist()) == b'abcd' * 8
    assert sizes == [1] * 8 + [5] * 5  # from the second d on 4 guesses, all right


def test_sampled_distribution(gpt):
    """Two tokens drawn from a batch behind a cache have the probabilities of the plain model: Pearson's chi-squared
    over the 32 * 32 pairs, whose standardised value is below 5."""
    n = 60_000
    prompts = [[3, 7, 1]] * n
    pairs = collect(gpt, prompts, 2, temperature=1.3, u=torch.rand(n, 2, generator=torch.Generator().manual_seed(0)))
    observed = torch.bincount(pairs[:, 0] * 32 + pairs[:, 1], minlength=1024).double()
    first = (gpt(torch.tensor([[3, 7, 1]]))[0][0, -1].double() / 1.3).softmax(-1)
    then = (gpt(torch.tensor([[3, 7, 1, i] for i in range(32)]))[0][:, -1].double() / 1.3).softmax(-1)
    expected = (first[:, None] * then).flatten() * n
    many = expected > 5
    chi2 = ((observed - expected)[many] ** 2 / expected[many]).sum().item()
    assert abs(chi2 - many.sum().item()) / (2 * many.sum().item()) ** 0.5 < 5


def test_slide(gpt):
    """Full contexts drop `slide` tokens at once: what is seen then is what is said, and one pass serves that many."""
    passes = []
    hook = gpt.transformer.h[0].register_forward_hook(lambda module, args, x: passes.append(x.size(1)))
    got = collect(gpt, [[1, 2, 3, 4, 5]], 30, temperature=0, slide=4)[0].tolist()
    hook.remove()
    assert passes == [5] + [1] * 7 + ([9] + [1] * 3) * 5 + [9, 1]
    context = [1, 2, 3, 4, 5]
    for i in got:
        assert i == gpt(torch.tensor([context]))[0][0, -1].argmax()
        context = context + [i] if len(context) < 12 else context[4:] + [i]


MODERN = {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'n_kv_head': 2, 'window': 5, 'window_pattern': 'SL',
          'bias': False, 'tie_embeddings': False, 'qk_norm': True, 'logit_softcap': 5.0, 'value_embeddings': True}
GATED = {**MODERN, 'head_gates': True, 'value_gates': True}


@pytest.mark.parametrize('compile', [False, True])
@pytest.mark.parametrize('options, dtype', [({}, torch.float32), (GATED, torch.float32), (GATED, torch.bfloat16),
                                            (MODERN, torch.int8)])
def test_for_decoding(options, dtype, compile):
    """In fp32 the same greedy tokens, compiled or not; in fewer bits nearly the same logits; step for step the same
    from the cache as from the whole context."""
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.int8: 0.2}[dtype]
    plain = sharpened(tiny(n_head=4, n_embd=128, vocab_size=40, **options)).eval()
    idx = torch.randint(40, (1, 6), generator=torch.Generator().manual_seed(0))
    expected = [plain(idx[:, :n])[0] for n in range(1, 7)]
    spread = torch.cat(expected).std()
    model = sharpened(tiny(n_head=4, n_embd=128, vocab_size=40, **options)).eval()
    quantize.for_decoding(model, dtype, compile)
    logits = [model(idx[:, :n])[0] for n in range(1, 7)]
    for got, want in zip(logits, expected, strict=True):
        assert (got - want).abs().max() < tolerance * spread
    steps = list(generate(model, idx[:, :3], Sampling(20, 0, cache_dtype=torch.float32)))
    whole = torch.cat((idx[:, :3], *(ids for ids, _, _ in steps)), dim=1)
    for n, (ids, logprob, _) in enumerate(steps):
        want = model(whole[:, max(0, 3 + n - 16) : 3 + n])[0][0, -1].log_softmax(-1)[ids[0, 0]]
        assert (logprob[0, 0] - want).abs() < max(1e-4, tolerance / 2) * spread
    if dtype == torch.float32:
        assert torch.equal(whole, plain.generate(idx[:, :3], 20, temperature=0))


def test_quantize_rows():
    """Within half a step of each weight; a row of zeros stays one."""
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    weight[7] = 0
    q, scale = quantize.quantize_rows(weight)
    assert q.dtype == torch.int8 and (q.abs().amax(1)[weight.abs().amax(1) > 0] == 127).all()
    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all() and (q[7] == 0).all()


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
    new = collect(gpt, idx, 20, temperature=1.0, u=torch.rand(2, 20, generator=torch.Generator().manual_seed(0)))
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
    ids = sample_next(torch.tensor(logits).expand(n, -1), Sampling(**controls), torch.rand(n, generator=generator))
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
    drawn = sample_next(torch.tensor([logits]), Sampling(1, temperature, top_k, top_p)).item()
    likelier = [x > logits[drawn] for x in logits]
    assert sum(likelier) < (top_k or len(logits))
    if temperature:
        p = torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, 0)
        mass = p[torch.tensor(likelier)].sum().item()
        assert top_p is None or mass < top_p + 1e-5
    else:
        assert not any(likelier)


@given(seed=st.integers(0, 999), top_k=st.sampled_from([1, 3, 50, 299]), top_p=st.sampled_from([None, 0.5, 0.9]),
       temperature=st.sampled_from([0.3, 1.0, 2.0]))
@settings(max_examples=60)
def test_sample_next_equals_sort_and_softmax(seed, top_k, top_p, temperature):
    """The ids of the same u by a sort and a softmax of all logits."""
    source = torch.Generator().manual_seed(seed)
    logits, u = 3 * torch.randn(5, 300, generator=source), torch.rand(5, generator=source)
    values, ids = (logits / temperature).sort(descending=True)
    p = values.masked_fill(torch.arange(300) >= top_k, -torch.inf).softmax(-1)
    p = p.masked_fill(p.cumsum(-1, dtype=torch.double) - p >= (top_p or 1.1), 0.0)
    cumulative = p.cumsum(-1, dtype=torch.double)
    expected = ids.gather(1, (cumulative <= u.double()[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True))
    assert torch.equal(sample_next(logits, Sampling(1, temperature, top_k, top_p), u), expected)


def test_padding_is_never_drawn(gpt):
    """Ids from n_ids on, even those of huge logits, are never drawn, greedily or not."""
    model = GPT(GPTConfig(block_size=12, vocab_size=32, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[20:] = 100.0
    idx = torch.zeros(4, 1, dtype=torch.long)
    assert collect(model, idx, 30, temperature=0).min() >= 20  # unless told
    for temperature in (0, 1.0, 100.0):
        assert collect(model, idx, 30, temperature=temperature, n_ids=20).max() < 20


def test_seeds_and_rows(gpt):
    idx = torch.zeros(6, 2, dtype=torch.long)
    u = torch.rand(2, 6, 20, generator=torch.Generator().manual_seed(1))
    a, b, c = (collect(gpt, idx, 20, u=u[i]) for i in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len({tuple(row) for row in a.tolist()}) > 1  # the samples of one batch differ
    before = torch.get_rng_state()
    collect(gpt, idx, 5, u=u[0])
    assert torch.equal(torch.get_rng_state(), before)  # nothing else's random numbers are used
    assert torch.equal(torch.cat([collect(gpt, idx[:1], 20, u=u[0, i : i + 1]) for i in range(6)]), a)


def test_uniforms():
    """Different for every seed, prompt and sample, the same whenever asked for, the fewer the first of the more, and
    uniform by the Kolmogorov-Smirnov statistic, whose 99.9% point is 1.95 / sqrt(n)."""
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**63, 2**31, 2**31)]
    assert len({tuple(uniforms(*key, 4).tolist()) for key in keys}) == len(keys)
    for key in keys:
        u = uniforms(*key, 10_000)
        assert torch.equal(uniforms(*key, 5), u[:5]) and 0 <= u.min() and u.max() < 1
        assert (u.sort().values - torch.arange(10_000) / 10_000).abs().max() < 0.0195


def test_no_tokens(gpt):
    assert list(generate(gpt, torch.zeros(1, 3, dtype=torch.long), Sampling(0))) == []


# texts ----------------------------------------------------------------------------------------------------------------

CHARS = CharTokenizer([chr(ord('a') + i) for i in range(26)] + list(' .,!?\n'))


class Script:
    """In place of a model: says the given ids, whatever it is asked."""

    has_compiled_step = False

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


def texts(model, tokenizer, prompts, n, numbers=None, **controls):
    return generate_texts(model, tokenizer, prompts, Sampling(n, **controls), numbers)


def texts_of(text, stops=(), num_samples=1, max_new_tokens=None):
    """-> what there is after every token when a byte model says `text`: [(text, finish) of each sample]."""
    ids = list(text if isinstance(text, bytes) else text.encode())
    steps = texts(Script(ids), ByteTokenizer(), ['x'], max_new_tokens or len(ids), num_samples=num_samples, stops=stops)
    return [[(sample.text, sample.finish) for sample in samples] for samples in steps]


def test_texts_grow_by_whole_characters():
    steps = [step[0][0] for step in texts_of('aé🙂z')]
    assert steps == ['a', 'a', 'aé', 'aé', 'aé', 'aé', 'aé🙂', 'aé🙂z']


def test_bytes_that_are_no_text():
    assert texts_of(b'a\xff\xc3z')[-1] == [('a\ufffd\ufffdz', 'length')]
    assert texts_of(b'a\xf0\x9f')[-1] == [('a\ufffd', 'length')]  # the tokens end inside a character


@pytest.mark.parametrize('text, stops, expected', [
    ('hello END more', ['END'], 'hello '), ('hello END more', ['xyz'], 'hello END more'), ('ENDEND', ['END'], ''),
    ('EENEND.', ['END'], 'EEN'), ('a🙂b', ['🙂'], 'a'), ('line\nnext', ['\n'], 'line'), ('one two', ['two', 'n'], 'o'),
    ('one two', ['e t', 'e'], 'on'), ('one two', ['e t', 'one t'], '')])
def test_stop(text, stops, expected):
    steps = texts_of(text, stops, num_samples=2)
    found = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert steps[-1] == [(expected, 'stop' if found else 'length')] * 2
    assert len(steps) == len(text[: min(found, default=None)].encode())  # no token more is computed


def test_shown():
    """What may be printed: all but a tail that may become a stop text."""
    sample = Sample(text='it is the EN')
    assert sample.shown(['END', 'is']) == 'it is the ' and sample.shown([]) == sample.shown(['x']) == 'it is the EN'
    assert Sample(text='it is the EN', finish='length').shown(['END']) == 'it is the EN'


def test_prompts(gpt):
    def first(prompt, **controls):
        return [sample.text for sample in next(texts(gpt, CHARS, [prompt], 1, num_samples=2, **controls))]

    assert [len(text) for text in first('hello')] == [1, 1]
    with pytest.raises(ValueError, match='prompt is empty.*--start="The"'):
        first('')
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\)"):
        first('caf\u00e9')
    with pytest.raises(ValueError, match='25 tokens: expected at most 12, the context.*--crop_prompt=True'):
        first('hello there, this is long')
    *_, samples = texts(gpt, CHARS, ['hello there, this is long'], 25, num_samples=3, temperature=0, crop_prompt=True)
    assert [len(sample.text) for sample in samples] == [25] * 3 and len({sample.text for sample in samples}) == 1
    assert {sample.finish for sample in samples} == {'length'}
    *_, cropped = texts(gpt, CHARS, ['hello there, this is long'[-12:]], 25, temperature=0)
    assert cropped[0].text == samples[0].text


def test_a_sample_depends_on_nothing_but_its_seed_and_numbers(gpt):
    def drawn(prompts, n, **controls):
        *_, samples = texts(gpt, CHARS, prompts, 10, num_samples=n, **controls)
        return [(sample.text, sample.ids) for sample in samples]

    both = drawn(['ab', 'hello'], 3)
    assert both[:3] == drawn(['ab'], 3) and both[:2] == drawn(['ab'], 2)
    assert both[3:] == drawn(['hello'], 3, numbers=[1])
    assert drawn(['hello', 'ab'], 3, numbers=[1, 0]) == both[3:] + both[:3]
    assert both != drawn(['ab', 'hello'], 3, seed=4) and len(set(map(str, both))) == 6


def test_stop_ids(gpt):
    """A row ends at such an id, and the text does not have it; the others go on."""
    ids = [5, 6, 7, 8]
    *_, samples = texts(Script(ids), ByteTokenizer(), ['x', 'y'], 4, stop_ids={7})
    assert [(sample.ids, sample.finish) for sample in samples] == [([5, 6], 'stop')] * 2


@torch.no_grad()
def test_one_long_prompt_does_not_pad_the_others():
    """The prompts are computed in parts of similar lengths, and once the long one has ended its slots are gone."""
    torch.manual_seed(0)
    model, sizes = GPT(GPTConfig(block_size=64, vocab_size=32, n_layer=1, n_head=1, n_embd=8, pos='rope')).eval(), []
    hook = model.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape))
    prompts = [[1] * 50, *([[2, 3]] * 47)]
    steps = generate(model, prompts, Sampling(3, 0))
    next(steps)
    assert sum(B * T for B, T in sizes) <= 16 * 50 + 32 * 2 and sum(B for B, _ in sizes) == 48
    hook.remove()
    cache = KVCache(model.config, 48, max_length=64)
    cache.restart(torch.tensor([0] + [48] * 47))
    model(torch.zeros(48, 50, dtype=torch.long), cache=cache)
    expected = model(torch.full((48, 1), 5), cache=copy.deepcopy(cache))[0]
    cache.keep(torch.arange(1, 48))
    assert cache.length == 2 and cache.k.size(3) <= 64 - 48 and cache.padding.tolist() == [0] * 47
    torch.testing.assert_close(model(torch.full((47, 1), 5), cache=cache)[0], expected[1:])


@pytest.mark.parametrize('controls', [{}, {'repetition_penalty': 1.5}])
def test_rows_that_have_ended_are_not_computed(gpt, controls):
    """Each row is what it is alone, up to its end, in ever smaller batches; also beyond block_size."""
    source = torch.Generator().manual_seed(3)
    prompts = [torch.randint(32, (length,), generator=source).tolist() for length in (1, 7, 3, 12, 9, 3, 14, 2)]
    u, sizes = torch.rand(8, 30, generator=source), []
    hook = gpt.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))

    def until_ended(prompts, u):
        texts = [[] for _ in prompts]
        was_ended = [False] * len(prompts)
        for ids, logprobs, ended in generate(gpt, prompts, Sampling(30, stop_ids={4, 5, 6}, **controls), u):
            assert ids.shape == logprobs.shape == (len(prompts), 1)
            for text, pair, was in zip(texts, zip(ids.tolist(), logprobs.tolist(), strict=True), was_ended,
                                       strict=True):
                if not was:
                    text.append(pair)
            assert all(now or not was for now, was in zip(ended, was_ended, strict=True))
            was_ended = ended
        return texts

    together = until_ended(prompts, u)
    hook.remove()
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= 3
    assert len({len(text) for text in together}) >= 4
    for row, text in enumerate(together):
        [alone] = until_ended(prompts[row : row + 1], u[row : row + 1])
        assert [ids for ids, _ in text] == [ids for ids, _ in alone]
        torch.testing.assert_close(*(torch.tensor([logprob for _, logprob in pairs]) for pairs in (text, alone)))


def test_special_tokens_of_a_prompt():
    """What the model is given is the one id of <|endoftext|>, not the ids of its characters."""
    tokenizer = BPETokenizer.train(['hello hello'] * 3, vocab_size=260, special_tokens=['<|endoftext|>'])
    model = Script([0], tokenizer.vocab_size)
    next(texts(model, tokenizer, ['hi<|endoftext|>'], 1, num_samples=2))
    assert model.heard.tolist() == [[*tokenizer.encode('hi'), tokenizer.eot]] * 2


def test_repetition_penalty(gpt):
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]
    # of prompt and answer alike, and not of the padding, id 0
    prompts = [[1, 2, 3], [4]]
    positive = sharpened(GPT(GPTConfig(block_size=40, vocab_size=20, n_layer=1, n_head=1, n_embd=8))).eval()
    new = collect(positive, prompts, 15, temperature=0, repetition_penalty=1e9)
    for prompt, row in zip(prompts, new.tolist(), strict=True):
        alone = collect(positive, [prompt], 15, temperature=0, repetition_penalty=1e9)[0].tolist()
        assert row == alone


def test_best_and_majority():
    samples = [Sample('a', [1, 2], [-1.0, -3.0]), Sample('b', [1], [-1.9]), Sample('c', [1, 2, 3], [-2.0, -2.0, -2.0])]
    assert likeliest([Sample(finish='stop'), *samples]).text == 'b' and likeliest([Sample()]).text == ''
    said = ['so it is 12', 'I think 7, no, 12.', 'it is 7', 'nothing', '12']
    assert majority(said, r'\d+') == [('12', 3), ('7', 1)]
    assert majority(said, r'is (\d+)') == [('12', 1), ('7', 1)] and majority(said, 'x') == []
    assert majority(said, r'(7)?') == [] and majority(['7 or', 'b'], r'(\d) or|b') == [('7', 1)]


@pytest.mark.parametrize('controls', [{'top_p': 0.6}, {'min_p': 0.02}, {'top_p': 0.9999},
                                      {'top_p': 0.9, 'min_p': 0.01}])
def test_large_vocabularies(controls):
    """Where not everything is sorted: the same ids are kept as where it is."""
    logits = torch.randn(2, 5_000, generator=torch.Generator().manual_seed(0)) * 3
    for row in logits:
        p, ids = row.double().softmax(0).sort(descending=True)
        kept = (p.cumsum(0) - p < controls.get('top_p', 2)) & (p >= controls.get('min_p', 0) * p[0])
        u = torch.linspace(0, 1, 100)[:-1]
        drawn = sample_next(row.expand(len(u), -1), Sampling(**controls), u)[:, 0]
        assert set(drawn.tolist()) <= set(ids[kept].tolist())
        edges = torch.cat((torch.zeros(1).double(), p[kept].cumsum(0) / p[kept].sum()))
        place = {i: n for n, i in enumerate(ids.tolist())}
        for x, i in zip(u.tolist(), drawn.tolist(), strict=True):  # the inverse of the distribution function
            assert edges[place[i]] - 1e-6 <= x <= edges[place[i] + 1] + 1e-6


@pytest.mark.parametrize('kind, value', [
    ('choices', ['yes', 'no', 'maybe, yes']), ('regex', r'[a-c]{2,5}, (so|no)!?'), ('regex', 'hello')])
@pytest.mark.parametrize('controls', [{'temperature': 0}, {'temperature': 1.5}, {'top_k': 3}, {'min_p': 0.3}])
def test_constraint(gpt, kind, value, controls):
    """Every sample of a batch matches, whatever the controls, with few tokens and with many."""
    pytest.importorskip('llguidance')
    constraint = Constraint(CHARS, **{kind: value})
    least = {'choices': 2, 'regex': len('aa, so') if 'so' in value else 5}[kind]
    for n in (least, least + 3, 30):
        *_, samples = texts(gpt, CHARS, ['what ', 'a'], n, num_samples=5, constraint=constraint, **controls)
        for sample in samples:
            assert sample.text in value if kind == 'choices' else re.fullmatch(value, sample.text), sample
            assert CHARS.decode(sample.ids) == sample.text and len(sample.logprobs) == len(sample.ids)
            assert sample.finish == 'complete'
    with pytest.raises(ValueError, match=str(least)):
        next(texts(gpt, CHARS, ['a'], least - 1, constraint=constraint))


def test_a_complete_text_ends_where_the_model_would_go_on_with_something_else():
    """Without an end-of-text token: '12' of any digits is complete, and the model wants a letter."""
    pytest.importorskip('llguidance')
    constraint = Constraint(ByteTokenizer(), regex=r'\d+')
    *_, samples = texts(Script(list(b'12 apples')), ByteTokenizer(), ['x'], 9, constraint=constraint, temperature=0)
    assert (samples[0].text, samples[0].finish) == ('12', 'complete')


def test_the_end_of_a_constraint_is_no_stop_id():
    """A row that has ended has no id, whatever the stop ids are."""
    pytest.importorskip('llguidance')
    constraint = Constraint(ByteTokenizer(), choices=['12'])
    *_, samples = texts(Script(list(b'12')), ByteTokenizer(), ['x'], 9, constraint=constraint, stop_ids={0})
    assert (samples[0].text, samples[0].finish) == ('12', 'complete')


def test_weights_that_are_not_numbers(gpt):
    broken = sharpened(GPT(gpt.config)).eval()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float('nan')
    for controls in ({}, {'top_k': 5}, {'top_p': 0.5}, {'temperature': 0}):
        with pytest.raises(ValueError, match='logits are NaN'):
            collect(broken, [[1, 2]], 2, **controls)


def test_a_token_before_every_text(gpt):
    """A bos_token of the tokenizer comes in front of a text that does not begin with it; ids are taken as they are."""
    tokenizer = BPETokenizer.train(['hello hello'] * 3, vocab_size=260, special_tokens=['<|endoftext|>'])
    for bos, expected in ((None, [104, 105]), ('<|endoftext|>', [tokenizer.eot, 104, 105])):
        tokenizer.bos_token = bos
        assert encode_prompt('hi', tokenizer, 10) == expected
        assert encode_prompt([104, 105], tokenizer, 10) == [104, 105]
        assert encode_prompt('<|endoftext|>hi', tokenizer, 10) == [tokenizer.eot, 104, 105]
