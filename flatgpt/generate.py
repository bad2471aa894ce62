"""
Continue prompts token by token, as ids or as text.

    sampling = Sampling(max_new_tokens=20, temperature=0.8, top_k=200)
    for ids, logprobs, ended in generate(model, [[1, 2, 3], [4, 5]], sampling): ...
    for samples in generate_texts(model, tokenizer, ['Once upon', 'He'], sampling): ...
"""

import functools
from dataclasses import replace

import torch

from configurator import UserError
from flatgpt.cache import KVCache
from flatgpt.lookup import LookAhead
from flatgpt.quantize import GraphStep
from flatgpt.sampling import Sample, Sampling, likeliest, majority, penalize, sample_next, uniforms
from tokenizer.chat import encode_prompt

__all__ = ['KVCache', 'NotNumbers', 'Sample', 'Sampling', 'encode_prompt', 'generate',
           'generate_texts', 'likeliest', 'majority', 'sample_next', 'uniforms']

PREFILL_ROWS = {'cpu': 16}  # prompts of different lengths at once; elsewhere 256, as launches cost


class NotNumbers(UserError):
    """Report that the logits of a model are NaN."""


class Decoder:
    """Compute the logits that follow a batch of growing contexts.

    At block_size tokens a context drops its first `slide` and is computed anew, since each token
    depends on those before it. slide=1 is exact, and then each token costs a whole pass; n costs
    one pass in n tokens, and between block_size - n + 1 and block_size tokens are visible.
    """

    def __init__(self, model, prompts, sampling):
        self.model, self.slide, self.device = model, sampling.slide, model.lm_head.weight.device
        self.block_size, B, T = model.config.block_size, len(prompts), max(map(len, prompts))
        # zeros come before shorter prompts: idx (B, T), and their number, (B,) or None
        padding = torch.tensor([T - len(ids) for ids in prompts], device=self.device)
        self.idx = torch.tensor([[0] * (T - len(ids)) + ids for ids in prompts], device=self.device)
        self.padding = padding if padding.any() else None
        self.is_compiled = model.has_compiled_step
        self.graph, length = None, min(self.block_size, T + sampling.max_new_tokens)
        if self.is_compiled:  # few lengths, since each is compiled
            length = min(self.block_size, -(-length // 256) * 256)
        dtype = model.lm_head.weight.dtype
        dtype = sampling.cache_dtype or (dtype if dtype.is_floating_point else torch.bfloat16)
        self.cache = KVCache(model.config, B, self.device, dtype, length)
        if self.is_compiled:
            self.cache.make_room(B, length)
        can_guess = sampling.lookup and B == 1 and not self.is_compiled  # a CUDA graph cannot
        self.ahead = can_guess and LookAhead(model, self.cache, prompts[0], sampling.lookup)
        self.start_over(min(self.block_size, T))

    def start_over(self, n):
        """Empty the cache and make the last n tokens the context."""
        dropped = self.idx.size(1) - n
        self.new = self.idx[:, dropped:]  # (B, T), not in the cache yet
        self.cache.restart(None if self.padding is None else (self.padding - dropped).clamp(min=0))

    def append(self, ids):
        """Add ids (B, 1) to the contexts."""
        self.idx, self.new = torch.cat((self.idx, ids), dim=1), ids
        if self.ahead and self.ahead.take(int(ids)):
            return
        if self.cache.length == self.block_size:
            self.start_over(self.block_size + 1 - self.slide)

    def keep(self, rows):
        """Keep these rows of the batch. A compiled step has one shape and cannot."""
        self.idx, self.new = self.idx[rows], self.new[rows]
        self.padding = None if self.padding is None else self.padding[rows]
        self.cache.keep(rows)

    def seen(self):
        """Return which ids each row's prompt and sample contain, (B, vocab_size) of bool."""
        places = torch.arange(self.idx.size(1), device=self.device)
        is_token = places >= (0 if self.padding is None else self.padding[:, None])
        counts = self.idx.new_zeros(len(self.idx), self.model.config.vocab_size)
        return counts.scatter_add_(1, self.idx, is_token.long().expand_as(self.idx)) > 0

    def logits(self):
        """Return the logits after each context, (B, V)."""
        if self.ahead:
            return self.ahead.logits(self.new)
        if not self.model.has_compiled_step:
            return self.compute()
        if self.new.size(1) > 1:
            with torch.compiler.set_stance('force_eager'):
                return self.compute()
        self.graph = self.graph or GraphStep(self.model, self.cache, self.new)
        return self.graph(self.new)

    def compute(self):
        """Run the model. Prompts of different lengths run in parts of little padding."""
        cache, (B, T) = self.cache, self.new.shape
        at_once = PREFILL_ROWS.get(self.device.type, 256)
        if T == 1 or B <= at_once or cache.padding is None or not cache.padding.any():
            return self.model(self.new, cache=cache)[0][:, -1]
        order, logits = cache.padding.argsort(), []  # the longest first
        for rows in order.split(at_once):
            unused = int(cache.padding[rows].min())
            part = KVCache(self.model.config, len(rows), self.device, cache.k.dtype, T - unused)
            part.restart(cache.padding[rows] - unused)
            logits.append(self.model(self.new[rows, unused:], cache=part)[0][:, -1])
            cache.fill(rows, part, T)
        cache.advance(T)
        return torch.cat(logits)[order.argsort()]


@torch.no_grad()
def generate(model, prompts, sampling: Sampling, u=None):
    """Continue prompts; yield (ids, logprobs, ended) after each token.

    prompts: B lists of ids, or (B, T). ids: (B, 1). logprobs: (B, 1), before any control. ended: B
    bools; the id of an ended row is a stop id or has no meaning. Ended rows leave the batch once
    they are a quarter of it. u: (B, max_new_tokens) of [0, 1), which fix the ids; None: random.
    Raises NotNumbers for logits of NaN.
    """
    prompts = prompts.tolist() if torch.is_tensor(prompts) else prompts
    B, n, constraint = len(prompts), sampling.max_new_tokens, sampling.constraint
    decoder, device = Decoder(model, prompts, sampling), model.lm_head.weight.device
    draw_on = 'cpu' if device.type == 'mps' else device  # mps has no float64
    u = (torch.rand(B, n) if u is None else u).to(draw_on)
    matchers = None if constraint is None else [constraint.matcher() for _ in prompts]
    rows, ended = torch.arange(B), [False] * B  # rows: those that are still computed
    for step in range(n):
        logits = plain = decoder.logits()[:, : sampling.n_ids].to(draw_on).float()  # (B, V)
        if sampling.repetition_penalty != 1.0:
            seen = decoder.seen()[:, : sampling.n_ids].to(draw_on)
            logits = penalize(logits, seen, sampling.repetition_penalty)
        if matchers is None:
            next_id = sample_next(logits, sampling, u[:, step])
        else:
            next_id = torch.zeros(len(rows), 1, dtype=torch.long, device=draw_on)
            for i, row in enumerate(rows.tolist()):
                if not ended[row]:
                    draw = functools.partial(sample_next, sampling=sampling, u=u[i : i + 1, step])
                    drawn = matchers[row].draw(logits[i : i + 1], n - step, draw)
                    ended[row], next_id[i] = drawn is None, 0 if drawn is None else drawn
        for row, i in zip(rows.tolist(), next_id[:, 0].tolist(), strict=True):
            ended[row] = ended[row] or i in sampling.stop_ids
        logprobs = plain.log_softmax(-1).gather(1, next_id)
        if logprobs.isnan().any():
            raise NotNumbers('the logits are NaN: the weights are damaged, or need a wider range, '
                             '--dtype=float32')
        new = next_id.to(device), logprobs
        if len(rows) < B:
            new = (part.new_zeros(B, 1).index_copy_(0, rows.to(part.device), part) for part in new)
        yield *new, list(ended)
        going = [i for i, row in enumerate(rows.tolist()) if not ended[row]]
        if not going:
            return
        if step + 1 < n:
            decoder.append(next_id.to(device))
            # fewer rows need a copy of their cache, so not after each end
            if len(going) <= 0.75 * len(rows) and not decoder.is_compiled:
                decoder.keep(torch.tensor(going, device=device))
                rows, u = rows[going], u[going]


def generate_texts(model, tokenizer, prompts, sampling: Sampling, numbers=None):
    """Continue texts or lists of ids as one batch; yield Samples after each token.

    Samples: num_samples of the first prompt, then those of the next. numbers: one of each prompt,
    which with the seed fixes its samples; None: 0, 1, ... Raises UserError as encode_prompt() does.
    """
    n, n_samples, constraint = sampling.max_new_tokens, sampling.num_samples, sampling.constraint
    rows, u, sampling = [], [], replace(sampling, n_ids=tokenizer.vocab_size)
    for number, prompt in zip(numbers or range(len(prompts)), prompts, strict=True):
        ids = encode_prompt(prompt, tokenizer, model.config.block_size, sampling.crop_prompt)
        rows += [ids] * n_samples
        u += [uniforms(sampling.seed, number, sample, n) for sample in range(n_samples)]
    if constraint:
        constraint.check_length(n)
    samples = [Sample(finish=None if n else 'length') for _ in rows]
    if not n:
        yield samples
    for step, new in enumerate(generate(model, rows, sampling, torch.stack(u)), 1):
        columns = new[0][:, 0].tolist(), new[1][:, 0].tolist(), new[2]
        for sample, i, logprob, has_ended in zip(samples, *columns, strict=True):
            if has_ended and not sample.finish:
                sample.end('complete' if constraint else 'stop')
            if sample.finish:
                continue
            sample.append(i, logprob, tokenizer.decode_bytes([i]), sampling.stops)
            if step == n and not sample.finish:
                sample.end('complete' if constraint else 'length')
        yield samples
        if all(sample.finish for sample in samples):
            return
