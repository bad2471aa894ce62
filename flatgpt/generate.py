"""
From logits to text: draw the next token, and the one after it, from a cache of what was computed already.

    for ids, logprobs, ended in generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=20, temperature=0): ...
    for samples in generate_texts(model, tokenizer, ['Once upon', 'He'], max_new_tokens=100): ...
"""

import codecs
import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from configurator import UserError
from ops import visible
from tokenizer.chat import bos_ids

# Drawing --------------------------------------------------------------------------------------------------------------


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, u=None):
    """
    logits (B, V) -> one id for each row, (B, 1), of those whose logits are not -inf.

    temperature divides the logits; 0 takes the likeliest id. Of the ids by falling probability top_k keeps the first k;
    top_p the fewest that hold probability p ("The Curious Case of Neural Text Degeneration", Holtzman et al. 2020);
    min_p those that have p times the probability of the first ("Turning Up the Heat", Nguyen et al. 2024); each
    of what the one before it left. u: (B,) of [0, 1), which decide; None: random ones.
    """
    logits = logits.float()
    if temperature < 1e-30:  # 0, or so small that dividing overflows float32 and the likeliest has all probability
        return logits.argmax(-1, keepdim=True)
    logits, ids = logits / temperature, None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    log_total = logits.logsumexp(-1, keepdim=True)
    if ids is None and (top_p is not None and top_p < 1.0 or min_p):
        logits, ids = by_probability(logits, log_total, 1.0 if top_p is None else top_p, min_p or 0.0)
    p = (logits - log_total).exp()
    if top_p is not None and top_p < 1.0:
        p = p.masked_fill(p.cumsum(-1, dtype=torch.double) - p >= top_p, 0.0)  # what all likelier ids hold is enough
    if min_p:
        p = p.masked_fill(p < min_p * p[:, :1], 0.0)
    u = torch.rand(len(p), device=p.device) if u is None else u
    # an id of probability 0 ends where the one before it does, so it is never the first that ends above u
    below = p.cumsum(-1, dtype=torch.double)
    drawn = torch.searchsorted(below, u.double()[:, None] * below[:, -1:], right=True)
    drawn = drawn.clamp(max=p.size(-1) - 1)  # where all is NaN
    return drawn if ids is None else ids.gather(1, drawn)


def by_probability(logits, log_total, top_p, min_p):
    """
    The logits (B, V) and their ids by falling probability; on the CPU, where sorting a large vocabulary would take
    a third of a step, only the first 1024 if top_p and min_p ask for no more.
    """
    if logits.device.type == 'cpu' and logits.size(-1) > 1024:
        largest, ids = logits.topk(1024)
        p = (largest - log_total).exp()
        if (p.sum(-1) > top_p).all() or (p[:, -1] < min_p * p[:, 0]).all():
            return largest, ids
    return logits.sort(descending=True)


class NotNumbers(UserError):
    """The logits of a model are not numbers."""


def uniforms(seed, prompt, sample, n):
    """
    n numbers of [0, 1) that decide over the tokens of a sample: a function of the seed and the numbers of the prompt
    and of the sample alone, so that a sample is the same in whatever batch it is drawn.
    """
    key = np.array([seed, prompt << 32 | sample], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(n, dtype=np.float32))


def sample_allowed(logits, matcher, remaining, draw):
    """
    What draw(logits (1, V)) gives, (1, 1), for a text that keeps to a constraint (constrain.Constraint.matcher()); None
    if it ends here: it is complete, and the model would go on with something that may not follow. remaining: how many
    tokens the text may still have.
    """
    while True:
        allowed = matcher.allowed(remaining).to(logits.device)
        if matcher.may_end and not allowed.any():
            return None
        next_id = draw(logits if matcher.may_end else logits.masked_fill(~allowed, -torch.inf))
        if matcher.accept(next_id.item(), remaining):
            return next_id
        if matcher.may_end:
            return None


def penalized(logits, seen, penalty):
    """
    logits (B, V), those of the ids in seen (B, V) of bool divided by the penalty, or multiplied where they are negative
    ("CTRL", Keskar et al. 2019); above 1 repetitions become less likely.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


# Decoding -------------------------------------------------------------------------------------------------------------


def left_padded(prompts, device):
    """Lists of ids -> idx (B, T), padded with 0 in front; and how much that is in each row, (B,), or None."""
    T = max(map(len, prompts))
    idx = torch.tensor([[0] * (T - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    padding = torch.tensor([T - len(prompt) for prompt in prompts], device=device)
    return idx, padding if padding.any() else None


PREFILL_ROWS = {'cpu': 16}  # prompts at once where their lengths differ; elsewhere 256, as each launch costs there


class Decoder:
    """
    The logits that follow a growing context, (B, T) and then one token after the other. What was computed stays in a
    KVCache up to block_size tokens; beyond that the context slides, by `slide` tokens each time it is full, and
    all of it is computed anew, because a dropped token changes what every later one was computed from.
    """

    def __init__(self, model, idx, padding, max_length, cache_dtype, slide):
        self.model, self.slide = model, slide
        self.idx, self.padding = idx, padding
        block_size, (B, T) = model.config.block_size, idx.shape
        # a compiled step of several rows would be slower on the CPU than its library (bench/results)
        self.is_compiled = model.has_compiled_step and (B == 1 or idx.device.type == 'cuda')
        if self.is_compiled:  # for few sizes of the cache, not for each anew
            max_length = -(-max_length // 256) * 256
        self.cache = KVCache(model.config, B, idx.device, cache_dtype, min(block_size, max_length),
                             is_static=self.is_compiled)
        self.new, self.graph = None, None
        self.start_over(min(block_size, T))

    def start_over(self, n):
        """Forget the cache; the context is the last n tokens."""
        dropped = self.idx.size(1) - n
        self.new = self.idx[:, dropped:]
        self.cache.restart(None if self.padding is None else (self.padding - dropped).clamp(min=0))

    def append(self, ids):
        """ids: (B, 1)"""
        self.idx = torch.cat((self.idx, ids), dim=1)
        self.new = ids
        if self.cache.length == self.model.config.block_size:
            self.start_over(self.cache.length + 1 - self.slide)

    def keep(self, rows):
        """Go on with these rows of the batch alone. Not for a compiled step, which has one shape."""
        self.idx, self.new = self.idx[rows], self.new[rows]
        self.padding = None if self.padding is None else self.padding[rows]
        self.cache.keep(rows)

    def logits(self):
        """-> (B, V), of what follows the context."""
        if not self.model.has_compiled_step:
            return self.computed()
        if not self.is_compiled or self.new.size(1) > 1:
            with torch.compiler.set_stance('force_eager'):
                return self.computed()
        return self.replayed() if self.new.device.type == 'cuda' else self.computed()

    def computed(self):
        """
        -> (B, V). Prompts are computed in parts of similar lengths: as one batch with a long one the short ones would
        be mostly padding, which costs as much as a prompt.
        """
        cache, (B, T), at_once = self.cache, self.new.shape, PREFILL_ROWS.get(self.new.device.type, 256)
        if T == 1 or B <= at_once or cache.padding is None or not cache.padding.any():
            return self.model(self.new, cache=cache)[0][:, -1]
        order, parts = cache.padding.argsort(), []
        for rows, unused in zip(order.split(at_once), cache.padding[order[::at_once]].tolist(), strict=True):
            part = KVCache(self.model.config, len(rows), self.new.device, cache.k.dtype, T - unused,
                           cache.padding[rows] - unused)
            parts.append(self.model(self.new[rows, unused:], cache=part)[0][:, -1])
            cache.fill(rows, part, T)
        cache.advance(T)
        return torch.cat(parts)[order.argsort()]

    def replayed(self):
        """
        A step as a CUDA graph: its hundreds of kernels are launched at once, where launching them one by one would take
        longer than they do. Captured at the first step, after warming up in a stream of its own.
        """
        cache = self.cache
        if self.graph is None:
            self.input, length = self.new.clone(), cache.length
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.model(self.input, cache=cache)
                    cache.go_back_to(length)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.model(self.input, cache=cache)[0][:, -1]
            cache.go_back_to(length)
        self.input.copy_(self.new)
        self.graph.replay()  # which advances cache.next_slot, on the device, but not the number beside it
        cache.length += 1
        return self.output


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
             repetition_penalty=1.0, vocab_size=None, u=None, stop_ids=(), matchers=None, slide=1, cache_dtype=None):
    """
    Continue the prompts, idx (B, T) or lists of ids of any lengths above 0. After every token yield (ids, logprobs,
    ended): the new ids (B, 1); the log-probabilities that the model itself gives them, before any control, (B, 1);
    and B bools, whether a row has ended, without its new id, which is one of stop_ids or of no meaning. Rows that have
    ended are no longer computed once they are a quarter of all.

    vocab_size: ids from there on, the padding of the embedding, are never drawn. u: (B, max_new_tokens) of [0, 1),
    which decide over what is drawn; None: random ones. matchers: B of constrain.Constraint.matcher(), or None.
    slide: how many tokens the context drops at once when it is full; 1 is exact, as if there was no cache, and each
    token costs a whole pass; n costs one pass in n tokens, and between block_size - n + 1 and block_size are seen.
    """
    device = model.lm_head.weight.device
    idx, padding = (prompts, None) if torch.is_tensor(prompts) else left_padded(prompts, device)
    (B, T), V = idx.shape, vocab_size or model.config.vocab_size
    if cache_dtype is None:
        cache_dtype = model.lm_head.weight.dtype if model.lm_head.weight.is_floating_point() else torch.bfloat16
    draw_on = 'cpu' if device.type == 'mps' else device  # which has no float64
    u = torch.rand(B, max_new_tokens) if u is None else u
    u, ended = u.to(draw_on), [False] * B
    seen = None
    if repetition_penalty != 1.0:
        is_token = torch.ones_like(idx, dtype=torch.bool) if padding is None else (
            torch.arange(T, device=device) >= padding[:, None])
        seen = torch.zeros(B, model.config.vocab_size, dtype=torch.int, device=device).scatter_add_(
            1, idx, is_token.int())[:, :V].bool().to(draw_on)
    draw = functools.partial(sample_next, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    decoder = Decoder(model, idx, padding, T + max_new_tokens, cache_dtype, slide)
    rows = torch.arange(B)  # those that are computed: all at first
    for step in range(max_new_tokens):
        logits = plain = decoder.logits()[:, :V].to(draw_on).float()
        if seen is not None:
            logits = penalized(logits, seen, repetition_penalty)
        if matchers is None:
            next_id = draw(logits, u=u[:, step])
        else:
            next_id = torch.zeros(len(rows), 1, dtype=torch.long, device=draw_on)
            for i, row in enumerate(rows.tolist()):
                allowed_id = None if ended[row] else sample_allowed(
                    logits[i : i + 1], matchers[row], max_new_tokens - step,
                    functools.partial(draw, u=u[i : i + 1, step]))
                ended[row] = allowed_id is None
                next_id[i] = 0 if ended[row] else allowed_id
        for row, drawn in zip(rows.tolist(), next_id[:, 0].tolist(), strict=True) if stop_ids else ():
            ended[row] = ended[row] or drawn in stop_ids
        logprobs = plain.gather(1, next_id) - plain.logsumexp(-1, keepdim=True)
        if logprobs.isnan().any():
            raise NotNumbers('the logits are not numbers: the weights are broken, or their precision can not hold what '
                             'they give (--dtype=float32 can)')
        found = next_id.to(device), logprobs
        if len(rows) < B:
            found = (part.new_zeros(B, 1).index_copy_(0, rows.to(part.device), part) for part in found)
        yield *found, list(ended)
        going = [i for i, row in enumerate(rows.tolist()) if not ended[row]]
        if not going:
            return
        if seen is not None:
            seen.scatter_(1, next_id, True)
        if step + 1 < max_new_tokens:
            decoder.append(next_id.to(device))
            # to go on with fewer rows means to copy their cache: not for every row that ends
            if len(going) <= 0.75 * len(rows) and not decoder.is_compiled:
                decoder.keep(torch.tensor(going, device=device))
                rows, u = rows[going], u[going]
                seen = None if seen is None else seen[going]


# Text -----------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """What one sample has so far. finish: None while it goes on, 'stop', 'complete' (the constraint) or 'length'."""

    text: str = ''
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self):
        self.starts = []  # length of the text before each token
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def append(self, i, logprob, token):
        """A token: its id, log-probability and bytes."""
        self.ids.append(i)
        self.logprobs.append(logprob)
        self.starts.append(len(self.text))
        self.text += self.decoder.decode(token)

    def end(self, finish):
        """The text ends here, whether or not with a whole character."""
        self.text += self.decoder.decode(b'', final=True)
        self.finish = finish

    def cut(self, length):
        """The text ends before a stop text, at this length, and so do its tokens."""
        while self.starts and self.starts[-1] >= length:
            for of_tokens in (self.ids, self.logprobs, self.starts):
                of_tokens.pop()
        self.text, self.finish = self.text[:length], 'stop'

    def shown(self, stops):
        """The text without a tail that may yet turn out to be the beginning of one of `stops`."""
        if self.finish is not None:
            return self.text
        ends = [n for stop in stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return self.text[: len(self.text) - max(ends, default=0)]


def encode_prompt(prompt, tokenizer, block_size, crop_prompt=False):
    """
    A text, or a list of ids, -> the ids that the model continues. A special token such as <|endoftext|> in a text is
    that token, since whoever asks wrote the prompt himself. Raises ValueError for an empty prompt, one that the
    tokenizer can't encode, and, unless crop_prompt lets the model see only its end, one longer than the context.
    """
    ids = tokenizer.encode(prompt, allowed_special='all') if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise UserError('the prompt is empty, and the model continues at least one token; try --start="The"')
    if isinstance(prompt, str) and ids[:1] != bos_ids(tokenizer):
        ids = bos_ids(tokenizer) + ids
    if len(ids) > block_size and not crop_prompt:
        raise UserError(f'the prompt has {len(ids):,} tokens, the context of the model {block_size:,}; shorten it, or '
                         f'let the model see only its end with --crop_prompt=True')
    return ids[-block_size:]


def generate_texts(model, tokenizer, prompts, max_new_tokens, num_samples=1, stops=(), seed=1337, numbers=None,
                   constraint=None, crop_prompt=False, stop_ids=(), **controls):
    """
    Draw num_samples continuations of each of the texts, or lists of ids, `prompts`, all as one batch. After every token
    yield the Samples, those of the first prompt first. A sample ends before the first of the texts `stops`.

    controls: of generate(). numbers: of the prompts, which decide over their samples as the seed does; None: 0, 1, ...
    Raises ValueError for a prompt that encode_prompt() refuses.
    """
    rows, u = [], []
    for number, prompt in zip(range(len(prompts)) if numbers is None else numbers, prompts, strict=True):
        rows += [encode_prompt(prompt, tokenizer, model.config.block_size, crop_prompt)] * num_samples
        u += [uniforms(seed, number, sample, max_new_tokens) for sample in range(num_samples)]
    samples = [Sample(finish=None if max_new_tokens else 'length') for _ in rows]
    matchers = None
    if constraint is not None:
        constraint.check_length(max_new_tokens)
        matchers = [constraint.matcher() for _ in rows]
    if not max_new_tokens:
        yield samples
    steps = generate(model, rows, max_new_tokens, vocab_size=tokenizer.vocab_size, u=torch.stack(u), stop_ids=stop_ids,
                     matchers=matchers, **controls)
    for step, (next_id, logprobs, ended) in enumerate(steps, 1):
        for sample, i, logprob, has_ended in zip(samples, next_id[:, 0].tolist(), logprobs[:, 0].tolist(), ended,
                                                 strict=True):
            if sample.finish is not None:
                continue
            if has_ended:
                sample.end('stop' if constraint is None else 'complete')
                continue
            sample.append(i, logprob, tokenizer.decode_bytes([i]))
            found = [sample.text.find(stop) for stop in stops if stop in sample.text]
            if found:
                sample.cut(min(found))
            elif step == max_new_tokens:
                sample.end('length' if constraint is None else 'complete')
        yield samples
        if all(sample.finish for sample in samples):
            return


def likeliest(samples):
    """
    Best of n: the sample whose tokens are the likeliest on average, so that long ones are not at a disadvantage. One
    that ended before its first token comes last.
    """
    return max(samples, key=lambda sample: sum(sample.logprobs) / len(sample.logprobs) if sample.ids else -math.inf)


def majority(texts, pattern):
    """
    Self-consistency ("Self-Consistency Improves Chain of Thought Reasoning", Wang et al. 2023): the answer that most
    texts come to. pattern: regular expression that finds the answer, its first group if it has one; the last match in a
    text counts. -> [(answer, how many)], the most frequent first, of equally frequent ones that which came first.
    """
    answers = []
    for text in texts:
        if matches := list(re.finditer(pattern, text)):
            answers.append(matches[-1].group(1 if matches[-1].re.groups else 0))
    return Counter(answer for answer in answers if answer is not None).most_common()


class LayerCache(NamedTuple):
    """
    Keys and values of one layer, (B, G, S, D), and the slots (T,) that the new tokens take.

    A block gets this view, not the cache and its own number: it would be compiled anew for each number.
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor

    def update(self, k, v):
        """Write (B, G, T, D) of the new tokens; -> those of all tokens, (B, G, S, D)."""
        self.k.index_copy_(2, self.slots, k.to(self.k.dtype))
        self.v.index_copy_(2, self.slots, v.to(self.v.dtype))
        return self.k, self.v


class KVCache:
    """
    Keys and values of the tokens seen so far, so that the next token costs one position instead of the whole context.

    k, v: (n_layer, B, G, S, D), of whose S slots the first `length` are filled, by GPT.forward or by fill() and
    advance(). S grows with the tokens up to max_length; with is_static it is max_length from the start, so that all
    steps of one position have the same shapes, which is what a compiled step or a CUDA graph needs. Memory:
    2 * n_layer * B * S * G * D numbers; GPT-2 124M at 1 x 1024 in fp32: 75 MB.

    padding: None, or (B,), for prompts of different lengths, which all end at the same slot: how many slots before the
    first token of each row nobody attends to.
    """

    def __init__(self, config, batch_size, device=None, dtype=None, max_length=None, padding=None, is_static=False):
        self.max_length = max_length or config.block_size
        S = self.max_length if is_static else 0
        self.k, self.v = torch.zeros(2, config.n_layer, batch_size, config.kv_heads, S, config.head_size,
                                     device=device, dtype=dtype)
        self.length = 0
        self.next_slot = torch.zeros(1, dtype=torch.long, device=device)  # length, where a CUDA graph can read it
        self.padding = padding

    def restart(self, padding=None):
        """Empty, for prompts with this padding; at the same addresses, which a CUDA graph has recorded."""
        self.go_back_to(0)
        if self.padding is None or padding is None:
            self.padding = padding
        else:
            self.padding.copy_(padding)

    def go_back_to(self, length):
        """Forget all but the first `length` tokens."""
        self.length = length
        self.next_slot.fill_(length)

    def advance(self, T):
        """T more slots are written."""
        self.length += T
        self.next_slot += T

    def keep(self, rows):
        """Of the batch these rows alone, a tensor of their numbers, and no slots that are padding in all of them."""
        unused = 0
        if self.padding is not None:
            self.padding = self.padding[rows]
            unused = min(int(self.padding.min()), self.length)  # of an empty cache all slots are yet to be filled
            self.padding -= unused
        self.k, self.v = self.k[:, rows, :, unused:], self.v[:, rows, :, unused:]
        self.go_back_to(self.length - unused)

    def fill(self, rows, part, T):
        """Of an empty cache: the rows' last of T slots are those of part, a cache of these rows."""
        self.make_room(self.k.size(1), T)
        self.k[:, rows, :, T - part.length : T] = part.k[:, :, :, : part.length]
        self.v[:, rows, :, T - part.length : T] = part.v[:, :, :, : part.length]

    def start(self, B, T):
        """
        Make room for T more tokens of B rows; -> their positions, (T,), or (B, T) behind padding.

        Raises UserError if the cache was not made for so many.
        """
        self.make_room(B, T)
        self.slots = self.next_slot + torch.arange(T, device=self.k.device)
        return self.slots if self.padding is None else (self.slots - self.padding[:, None]).clamp(min=0)

    def layer(self, layer, T):
        """Return the part of one layer, for the T tokens that start() made room for."""
        S = self.k.size(3) if T == 1 else self.length + T  # one shape for all steps of a static cache
        return LayerCache(self.k[layer, :, :, :S], self.v[layer, :, :, :S], self.slots)

    def make_room(self, B, T):
        """For T more tokens of B rows. ValueError if the cache was not made for so many."""
        rows, S, needed = self.k.size(1), self.k.size(3), self.length + T
        if B != rows:
            raise UserError(f'the cache was made for a batch of {rows}, but the tokens are a batch of {B}')
        if needed > self.max_length:
            raise UserError(f'the cache has room for {self.max_length} tokens, but {self.length} + {T} were to be in '
                             f'it; make a longer one with max_length={needed}')
        if needed > S:
            more = min(self.max_length, -(-needed // 128) * 128) - S
            self.k, self.v = (F.pad(part, (0, 0, 0, more)) for part in (self.k, self.v))

    def mask(self, T, window):
        """
        Which slots each of the next T positions attends to: (B or 1, 1, 1, S) of bool for T = 1, for more
        (B, 1, T, length + T), or None where the usual causal mask will do.
        """
        if T > 1 and self.padding is None:
            return None
        slots = torch.arange(self.k.size(3) if T == 1 else self.length + T, device=self.k.device)
        queries = (self.next_slot + slots[:T])[:, None]
        seen = visible(queries, slots, window)
        if self.padding is None:
            return seen[None, None]
        # padding sees itself, since a softmax over nothing would be NaN
        return (seen & (slots >= self.padding[:, None, None]) | (slots == queries))[:, None]
