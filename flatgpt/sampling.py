"""
Draw the next token from logits, and choose among finished samples.

    next_id = sample_next(logits, Sampling(temperature=0.8, top_k=200))  # (B, V) -> (B, 1)
"""

import codecs
import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from configurator import UserError

MOST_TOKENS = 10**7  # of all samples of a prompt


@dataclass(frozen=True)
class Sampling:
    """Hold the controls of sampling. top_k, then top_p, then min_p drop ids."""

    max_new_tokens: int = 100  # tokens of each sample
    temperature: float = 1.0  # divides the logits; 0: always the likeliest id
    top_k: int | None = None  # keep the k likeliest ids; None or 0: all
    top_p: float | None = None  # keep the fewest ids of this probability (Holtzman et al. 2020)
    min_p: float | None = None  # keep ids with this share of the largest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # above 1: earlier ids become less likely (Keskar et al. 2019)
    n_ids: int | None = None  # ids from here on are never drawn; None: draw from all
    stop_ids: tuple | set = ()  # ids that end a sample
    slide: int = 1  # tokens that a full context drops at once, see Decoder
    lookup: int = 0  # most tokens to guess from repeats, of a single context, see lookup.py
    stops: tuple | list = ()  # texts that end a sample
    num_samples: int = 1  # samples of each prompt of generate_texts()
    seed: int = 1337  # fixes the samples of generate_texts(), see uniforms()
    crop_prompt: bool = False  # keep the end of a prompt that exceeds the context
    constraint: object = None  # a constrain.Constraint that each sample satisfies
    cache_dtype: torch.dtype | None = None  # precision of the KV cache; None: the weights'

    def __post_init__(self):
        n_tokens = self.num_samples * max(1, self.max_new_tokens)
        if n_tokens > MOST_TOKENS:  # each has a random number in memory from the start
            raise UserError(f'num_samples={self.num_samples} and max_new_tokens='
                            f'{self.max_new_tokens} are {n_tokens:,} tokens; expected '
                            f'{MOST_TOKENS:,} or fewer')


def sample_next(logits, sampling, u=None):
    """Draw one id for each row: logits (B, V) -> (B, 1).

    A logit of -inf excludes its id. u: (B,) of [0, 1), the quantiles to draw; None: random ones.
    """
    logits, ids = logits.float(), None
    top_p, min_p = 1.0 if sampling.top_p is None else sampling.top_p, sampling.min_p or 0.0
    if sampling.temperature < 1e-30:  # a quotient of it overflows float32
        return logits.argmax(-1, keepdim=True)
    if sampling.top_k and sampling.top_k < logits.size(-1):
        logits, ids = logits.topk(sampling.top_k)
    logits = logits / sampling.temperature
    log_total = logits.logsumexp(-1, keepdim=True)
    if ids is None and (top_p < 1 or min_p):
        logits, ids = sort_logits(logits, log_total, top_p, min_p)
    p = (logits - log_total).exp()
    if top_p < 1:  # drop an id when the likelier ones reach top_p without it
        p = p.masked_fill(p.cumsum(-1, dtype=torch.double) - p >= top_p, 0.0)
    if min_p:
        p = p.masked_fill(p < min_p * p[:, :1], 0.0)
    u = torch.rand(len(p), device=p.device) if u is None else u
    cumulative = p.cumsum(-1, dtype=torch.double)
    drawn = torch.searchsorted(cumulative, u.double()[:, None] * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=p.size(-1) - 1)  # generate() reports logits of NaN
    return drawn if ids is None else ids.gather(1, drawn)


def sort_logits(logits, log_total, top_p, min_p):
    """Sort (B, V) downwards -> (logits, ids); on a CPU 1024 where these suffice."""
    if logits.device.type == 'cpu' and logits.size(-1) > 1024:  # a full sort takes 1/3 of a step
        largest, ids = logits.topk(1024)
        p = (largest - log_total).exp()
        if (p.sum(-1) > top_p).all() or (p[:, -1] < min_p * p[:, 0]).all():
            return largest, ids
    return logits.sort(descending=True)


def penalize(logits, seen, penalty):
    """Make ids less likely: those in seen, (B, V) of bool (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def uniforms(seed, prompt, sample, n):
    """Return n numbers of [0, 1) that fix a sample, whatever batch it is in."""
    key = np.array([seed, prompt << 32 | sample], dtype=np.uint64)
    random = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(random.random(n, dtype=np.float32))


def likeliest(samples):
    """Return the Sample with the highest mean log-probability, empty ones last."""
    return max(samples, key=lambda sample: sum(sample.logprobs) / len(sample.logprobs)
               if sample.ids else -math.inf)


def majority(texts, pattern):
    """Count the answers in texts -> [(answer, count), ...], the most frequent first.

    The answer is the last match of a regular expression, or that match's first group. Of equally
    frequent answers the earliest comes first. Source: "Self-Consistency Improves Chain of Thought
    Reasoning", Wang et al. 2023.
    """
    answers = []
    for match in (matches[-1] for text in texts if (matches := list(re.finditer(pattern, text)))):
        answers.append(match.group(1 if match.re.groups else 0))
    return Counter(answer for answer in answers if answer is not None).most_common()


@dataclass
class Sample:
    """Hold a sample. finish: None, then 'stop', 'complete' or 'length'."""

    text: str = ''
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self):
        self.starts = []  # length of the text before each token
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def append(self, i, logprob, token, stops=()):
        """Add a token: its id, log-probability and bytes. End before the first of `stops`."""
        self.ids.append(i)
        self.logprobs.append(logprob)
        self.starts.append(len(self.text))
        self.text += self.decoder.decode(token)
        if cuts := [self.text.find(stop) for stop in stops if stop in self.text]:
            n_kept = sum(start < min(cuts) for start in self.starts)
            for items in (self.ids, self.logprobs, self.starts):
                del items[n_kept:]
            self.text, self.finish = self.text[: min(cuts)], 'stop'

    def end(self, finish):
        """End the text, also within a character."""
        self.text, self.finish = self.text + self.decoder.decode(b'', final=True), finish

    def shown(self, stops):
        """Return the text without a tail that may become one of `stops`."""
        if self.finish is not None:
            return self.text
        tails = [n for stop in stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return self.text[: len(self.text) - max(tails, default=0)]
