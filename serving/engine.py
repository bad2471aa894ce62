"""
Answer many requests at once: one loop owns the model and its pool of rows.

    engine = Engine(model, tokenizer, Limits(max_streams=8))
    engine.run()                                      # in the main thread

    answer = Answer(ids, sampling, u, on_news=print)  # on_news is called in the engine's thread
    engine.submit(answer)                             # in any thread; raises Full
    answer.cancel()                                   # its row is free within one token

A step of the loop is one forward pass: the next token of every running answer, and a piece of
the prompts that wait to be read ("continuous batching": "Orca", Yu et al. 2022; chunked prefill:
"Sarathi-Serve", Agrawal et al. 2024). A piece takes about PIECE_SECONDS, so that running answers
do not stall. A row keeps its keys and values after its answer; a later prompt with the same
beginning copies them ("prefix caching").
"""

import bisect
import functools
import itertools
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from configurator import UserError
from flatgpt import runtime
from flatgpt.sampling import Sample, Sampling, penalize, sample_next
from serving.pool import Pool, dynamic

PIECE_SECONDS = 0.1  # of prompts in a step
CONSTRAINT_SECONDS = 0.1  # of a step; further answers with a constraint get their token later
LATER = -1
FIRST_PIECE, LEAST_PIECE, LARGEST_PIECE = 128, 16, 2048  # tokens
SHARED = 8  # tokens of a common beginning that are worth a copy


class Full(UserError):
    """Report that as many answers wait as may wait."""


@dataclass(frozen=True)
class Limits:
    """Bound what an engine holds."""

    max_streams: int = 16  # answers that run at once, each in a row of the pool
    context: int = 1024  # tokens of a prompt and its answer
    max_queue: int = 64  # answers that wait for a row


class Token(NamedTuple):
    """Describe a drawn token: id, log-probability, and [(id, log-probability)] of the likeliest."""

    id: int
    logprob: float
    likeliest: list


class News(NamedTuple):
    """Hold what an answer has gained: text, the tokens that begin in it, the reason of its end.

    finish: as Sample's; or None; or, with the reason as text, 'error', 'unavailable' for now, or
    'refused' for what was asked.
    """

    text: str
    tokens: list
    finish: str | None = None


@dataclass(eq=False)
class Answer:
    """Hold a request for one answer, and its state in the engine."""

    prompt: list[int]  # ids
    sampling: Sampling  # max_new_tokens, controls, stops, stop_ids, constraint
    u: torch.Tensor  # (max_new_tokens,) of [0, 1), which fix the ids
    on_news: object  # function of News, called in the engine's thread
    n_likeliest: int = 0  # tokens to list beside each drawn one
    deadline: float = float('inf')  # of time.monotonic(); the answer ends there
    owner: object = None  # the request that it belongs to, beside others
    sample: Sample = field(default_factory=Sample)

    def __post_init__(self):
        self.row = None  # while it runs
        self.ids = list(self.prompt)  # and those of the answer so far
        self.tokens, self.n_sent, self.n_chars = [], 0, 0  # tokens and characters sent
        self.is_cancelled, self.n_cached, self.started = False, 0, time.monotonic()
        self.matcher = self.sampling.constraint and self.sampling.constraint.matcher()
        self.seen = None  # (V,) of bool for the repetition penalty
        self.ended_by = None  # the stop id that ended it

    def cancel(self):
        """Give the answer up; the engine frees its row before its next step."""
        self.is_cancelled = True

    def news(self):
        """Return the News since the last call."""
        shown, sample = self.sample.shown(self.sampling.stops), self.sample
        text, self.n_chars = shown[self.n_chars :], len(shown)
        n = bisect.bisect_left(sample.starts, len(shown)) if sample.finish is None else len(
            sample.ids)
        tokens, self.n_sent = self.tokens[self.n_sent : n], n
        return News(text, tokens, sample.finish)


class Engine:
    """Run the loop. All but submit() happens in its thread.

    That should be the thread that loaded the model: OpenMP keeps threads for each one that ever
    computed, and waits twice as long for them when there are more than cores.
    """

    def __init__(self, model, tokenizer, limits):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.device = model.lm_head.weight.device
        self.pool = Pool(model.config, limits.max_streams, limits.context, self.device,
                         model.lm_head.weight.dtype)
        self.running, self.waiting = [], deque()  # row i of the pool is that of running[i]
        self.used = [0] * limits.max_streams  # for each row, the step of its last answer
        self.chores = deque()  # functions to run between steps
        self.changed, self.is_stopped = threading.Condition(), False
        self.recent = deque(maxlen=64)  # (time, tokens drawn) of the last steps
        self.rate = FIRST_PIECE / PIECE_SECONDS  # tokens of prompts in a second
        self.counts = defaultdict(int)  # since the start, see serving.app.Server.metrics()

    def submit(self, answer, is_next=False):
        """Queue an answer. Raises Full, and UserError for one that can never fit.

        is_next: put it before all others and beyond the limit, the continuation of an answer.
        """
        most = self.limits.context - len(answer.prompt)
        if most < answer.sampling.max_new_tokens or most < 1:
            raise UserError(f'a prompt of {len(answer.prompt):,} tokens and an answer of '
                            f'{answer.sampling.max_new_tokens:,}: expected at most '
                            f'{self.limits.context:,} in all')
        with self.changed:
            if self.is_stopped:
                raise Full('the server stops')
            n_waiting = len(self.waiting) + len(self.running) - self.limits.max_streams
            if n_waiting >= self.limits.max_queue and not is_next:
                raise Full(f'{n_waiting} answers are waiting: expected fewer than '
                           f'{self.limits.max_queue}; try again later')
            if is_next:
                self.waiting.appendleft(answer)
            else:
                self.waiting.append(answer)
            self.changed.notify()

    def call(self, function, *arguments):
        """Call a function in the engine's thread before its next step; -> Future."""
        future = Future()
        with self.changed:
            self.chores.append((future, function, arguments))
            self.changed.notify()
        return future

    def run(self):
        """Work for ever. An error of a step ends the answers that run, not the loop."""
        while True:
            with self.changed:
                while not self.waiting and not self.running and not self.chores:
                    self.changed.wait()
            self.do_chores()
            try:
                self.step()
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                what = 'out of memory' if runtime.out_of_memory(error) else 'an error of the server'
                for answer in list(self.running):
                    self.end(answer, f'{what}; try a shorter prompt')

    def do_chores(self):
        """Call the functions that wait."""
        while self.chores:
            future, function, arguments = self.chores.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)

    def step(self):
        """Compute one forward pass, and draw a token for each answer that is due."""
        self.drop_ended()
        self.admit()
        if not self.running:
            return
        began, counts = time.perf_counter(), self.choose_tokens()
        ids, drawing = [], []  # drawing: answers whose next token is due
        for answer, n in zip(self.running, counts, strict=True):
            done = len(self.pool.ids[answer.row])
            ids.append(answer.ids[done : done + n])
            if n and done + n == len(answer.ids):
                drawing.append(answer)
        logits = self.compute(ids, drawing)
        for answer, new in zip(self.running, ids, strict=True):
            self.pool.ids[answer.row] += new
        if drawing:
            self.draw(logits, drawing)
        n_read = sum(counts) - len(drawing)
        if n_read >= LEAST_PIECE:
            self.rate = 0.5 * self.rate + 0.5 * n_read / (time.perf_counter() - began)
        self.counts['steps'] += 1
        self.recent.append((time.monotonic(), len(drawing)))

    def tokens_per_second(self):
        """Return the rate of drawn tokens over the last steps; 0 while nothing runs."""
        recent = list(self.recent)
        if not self.running or len(recent) < 2:
            return 0.0
        return sum(n for _, n in recent[1:]) / max(1e-9, recent[-1][0] - recent[0][0])

    def drop_ended(self):
        """Free the rows of cancelled and late answers, and forget those that wait."""
        now = time.monotonic()
        for answer in list(self.running):
            if answer.is_cancelled:
                self.release(answer)
            elif now > answer.deadline:
                answer.sample.end('length')
                self.finish(answer)
        with self.changed:
            late = [answer for answer in self.waiting if now > answer.deadline]
            self.waiting = deque(answer for answer in self.waiting
                                 if not answer.is_cancelled and answer not in late)
        for answer in late:
            answer.on_news(News('the server is busy; try again later', [], 'unavailable'))

    def admit(self):
        """Give idle rows to waiting answers, those first whose request has the fewest.

        An answer waits while another row reads the beginning that they share.
        """
        held, waiting = Counter(running.owner for running in self.running), list(self.waiting)
        while waiting:
            answer = min(waiting, key=lambda answer: held[answer.owner])
            waiting.remove(answer)
            row, most = len(self.running), len(answer.prompt) - 1  # the last token gives the logits
            if row == self.limits.max_streams:
                return
            texts = [running.ids for running in self.running] + self.pool.ids[row:]
            shared = [min(most, common(text, answer.prompt)) for text in texts]
            source = max(range(len(texts)), key=shared.__getitem__)
            n_ready = min(shared[source], len(self.pool.ids[source]))
            if n_ready + SHARED < shared[source]:
                continue
            self.take_row(row, source, n_ready)
            answer.row, answer.n_cached = row, len(self.pool.ids[row])
            self.running.append(answer)
            held[answer.owner] += 1
            with self.changed:
                self.waiting.remove(answer)
            self.counts['prompt_tokens'] += len(answer.prompt)
            self.counts['cached_tokens'] += answer.n_cached

    def take_row(self, row, source, n):
        """Let an idle row begin with the first n tokens of the row `source`."""
        idle = range(row, self.limits.max_streams)
        # a chat goes on in place; a short common beginning is copied over the oldest text
        is_same = source in idle and 2 * n >= len(self.pool.ids[source])
        oldest = source if is_same else min(idle, key=self.used.__getitem__)
        self.pool.swap(row, oldest)
        self.used[oldest] = self.used[row]
        source = {row: oldest, oldest: row}.get(source, source)
        self.pool.copy(source, row, n if n >= SHARED or is_same else 0)

    def choose_tokens(self):
        """Return the number of tokens of each running answer in the next pass.

        An answer has one. Prompts share the piece that fits the time, the first come first.
        """
        left = int(max(LEAST_PIECE, min(self.rate * PIECE_SECONDS, LARGEST_PIECE)))
        counts = [0] * len(self.running)
        for answer in sorted(self.running, key=lambda answer: answer.started):
            n_due = len(answer.ids) - len(self.pool.ids[answer.row])
            counts[answer.row] = n_due if n_due == 1 else min(n_due, left)
            left -= counts[answer.row] if n_due > 1 else 0
        return counts

    @torch.no_grad()
    def compute(self, ids, drawing):
        """Run the model on new ids of each row; -> logits of the answers in `drawing`, (n, V)."""
        lengths = [len(self.pool.ids[row]) + 1 for row in range(len(ids))]
        # rows of very different lengths run in pieces, which read no empty slots
        if all(len(new) == 1 for new in ids) and len(ids) * max(lengths) <= 2 * sum(lengths):
            idx = dynamic(torch.tensor(ids, device=self.device), 0)  # (B, 1)
            stance = 'default' if self.model.has_compiled_step else 'force_eager'
            with torch.compiler.set_stance(stance):
                return self.model(idx, cache=self.pool.first_rows(len(ids)))[0][:, -1]
        with torch.compiler.set_stance('force_eager'):
            idx = torch.tensor([[i for new in ids for i in new]], device=self.device)
            x = self.model.hidden(idx, self.pool.pieces([len(new) for new in ids]))  # (1, N, C)
            ends = list(itertools.accumulate(len(new) for new in ids))
            ends = [ends[answer.row] - 1 for answer in drawing]
            return self.model.logits(x[:, ends])[0] if ends else None

    def warm_up(self):
        """Compile the step of one row, and that of several, if the model is to be compiled."""
        def step():
            for n in range(1, min(3, self.limits.max_streams) + 1):
                self.compute([[0]] * n, [None] * n)

        if self.model.has_compiled_step:
            self.pool.ids = [[0] * 4 for _ in self.pool.ids]  # sizes of 0 and 1 compile apart
            self.model.has_compiled_step = runtime.compile_or_eager(step)
            self.pool.ids = [[] for _ in self.pool.ids]

    @torch.no_grad()
    def draw(self, logits, answers):
        """Draw the next token of each answer from logits (answers, V), and send the news."""
        logits = logits[:, : self.tokenizer.vocab_size].float()
        if logits.device.type == 'mps':
            logits = logits.cpu()  # mps has no float64
        next_ids, logprobs = self.choose(logits, answers), logits.log_softmax(-1)
        chosen = torch.tensor([max(0, i or 0) for i in next_ids], device=logits.device)
        chosen = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        n = min(max(answer.n_likeliest for answer in answers), logits.size(1))
        values, ids = (part.tolist() for part in logprobs.topk(n))  # (answers, n)
        for i, answer in enumerate(answers):
            if answer.row is None:  # it has ended with an error
                continue
            if next_ids[i] == LATER:
                self.pool.ids[answer.row].pop()  # this token is computed again
            elif chosen[i] != chosen[i]:
                self.end(answer, 'the logits are NaN: the weights are damaged, or need '
                                 '--dtype=float32')
            else:
                likeliest = list(zip(ids[i], values[i], strict=True))[: answer.n_likeliest]
                self.append(answer, Token(next_ids[i], chosen[i], likeliest))

    def choose(self, logits, answers):
        """Return the next id of each answer.

        None: its constraint is met, or has failed. LATER: others' took too long in this step.
        """
        seconds = 0.0
        if any(answer.sampling.repetition_penalty != 1.0 for answer in answers):
            logits = torch.stack([self.penalized(row, answer) for row, answer in
                                  zip(logits, answers, strict=True)])
        next_ids, groups = [None] * len(answers), defaultdict(list)
        for i, answer in enumerate(answers):  # answers with the same controls are drawn together
            groups[controls_of(answer)].append(i)
        # those that had to wait come first
        for group in sorted(groups.values(), key=lambda group: len(answers[group[0]].tokens)):
            first = answers[group[0]]
            u = torch.stack([answers[i].u[len(answers[i].tokens)] for i in group])
            draw = functools.partial(sample_next, sampling=first.sampling, u=u.to(logits.device))
            if not first.matcher:
                for i, next_id in zip(group, draw(logits[group])[:, 0].tolist(), strict=True):
                    next_ids[i] = next_id
                continue
            if seconds > CONSTRAINT_SECONDS:
                next_ids[group[0]] = LATER
                continue
            remaining = first.sampling.max_new_tokens - len(first.tokens)
            began = time.perf_counter()
            try:
                drawn = first.matcher.draw(logits[group], remaining, draw)
            except ValueError as error:
                self.end(first, str(error), 'refused')
            else:
                next_ids[group[0]] = None if drawn is None else int(drawn)
            seconds += time.perf_counter() - began
        return next_ids

    def penalized(self, logits, answer):
        """Return the logits (V,) of an answer with its repetition penalty."""
        penalty = answer.sampling.repetition_penalty
        if penalty == 1.0:
            return logits
        if answer.seen is None:
            answer.seen = torch.zeros_like(logits, dtype=torch.bool)
            answer.seen[[i for i in answer.prompt if i < len(logits)]] = True
        return penalize(logits, answer.seen, penalty)

    def append(self, answer, token):
        """Add a token to an answer, and send what is new. An id of None ends it."""
        sampling, sample = answer.sampling, answer.sample
        if token.id is None or token.id in sampling.stop_ids:
            answer.ended_by = token.id
            sample.end('complete' if answer.matcher else 'stop')
        else:
            answer.tokens.append(token)
            answer.ids.append(token.id)
            if answer.seen is not None:
                answer.seen[token.id] = True
            sample.append(token.id, token.logprob, self.tokenizer.decode_bytes([token.id]),
                          sampling.stops)
            self.counts['generated_tokens'] += 1
            if len(answer.tokens) == sampling.max_new_tokens and not sample.finish:
                sample.end('complete' if answer.matcher else 'length')
        if sample.finish:
            self.finish(answer)
        elif (news := answer.news()).text:
            answer.on_news(news)

    def finish(self, answer):
        """Free the row of an answer that has ended, and send the rest."""
        self.release(answer)
        answer.on_news(answer.news())

    def end(self, answer, reason, finish='error'):
        """End a running answer with an error."""
        self.release(answer)
        answer.on_news(News(reason, [], finish))

    def stop(self):
        """End all answers, and refuse others."""
        with self.changed:
            self.is_stopped, waiting = True, list(self.waiting)
            self.waiting.clear()
        for answer in list(self.running):
            self.end(answer, 'the server stops', 'unavailable')
        for answer in waiting:
            answer.on_news(News('the server stops', [], 'unavailable'))

    def release(self, answer):
        """Make the row of an answer idle; its keys and values stay until it is used again.

        Running rows are the first ones: the last of them takes its place.
        """
        row, last = answer.row, self.running.pop()
        if last is not answer:
            self.pool.swap(row, last.row)
            self.running[row], last.row = last, row
        self.used[len(self.running)] = self.counts['steps']
        answer.row = None


def common(a, b):
    """Return the length of the common beginning of two lists."""
    most = min(len(a), len(b))
    return bisect.bisect_left(range(1, most + 1), True, key=lambda n: a[:n] != b[:n])


def controls_of(answer):
    """Return a key that answers to be drawn together share; a constraint draws alone."""
    if answer.matcher:
        return id(answer)
    sampling = answer.sampling
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
