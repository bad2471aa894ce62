"""
Thinking in tokens: a small GPT answers at once, or in steps; how often it is right, against the tokens that it spends.

    $ python lab/thinking.py                      # a minute on two cores
"""

import os
import sys
from functools import partial

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # Python looks only beside the script

from bench.common import table
from configurator import explain_errors, override
from generate import generate, majority
from lab import common
from model import GPT, PRESETS, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
numbers = 7  # of a question; the model is trained on questions of 2 to this many
modulus = 13  # results are taken modulo this, a prime
n_layer = 2
n_head = 2
n_embd = 64
max_iters = 800  # training steps
batch_size = 256  # questions a training step
direct_share = 0.5  # of the training questions that are answered at once; the others are in steps
temperature = 1.0  # of the samples
questions = 500  # held out, for each measurement
samples = 16  # chains of steps drawn for each of them, a power of 2
seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

# ids: the operations +1, ..., *2, ..., the results =0, =1, ..., and how a question is to be answered
OPERATIONS = [('+', n) for n in range(1, modulus)] + [('*', n) for n in range(2, modulus)]
VOCAB = [f'{sign}{n}' for sign, n in [*OPERATIONS, *(('=', n) for n in range(modulus))]] + ['at once:', 'in steps:']
AT_ONCE, IN_STEPS = len(VOCAB) - 2, len(VOCAB) - 1
HELD_OUT = 13  # a question is never trained on if this divides its sum of squares
SEARCHES = ((1, 2), (2, 2), (2, 4), (4, 4))  # chains kept after every step, ways to go on that are drawn for each


def check_settings():
    for name, low, high in (('numbers', 2, 9), ('max_iters', 1, 10**6), ('batch_size', 2, 10**5), ('seed', 0, 2**32),
                            ('direct_share', 0, 1), ('temperature', 0.01, 100), ('questions', 2, 10**4)):
        if not low <= config[name] <= high:
            raise SystemExit(f'--{name}={config[name]}: expected {low} to {high}')
    for name, choices in (('modulus', (11, 13, 17, 19, 23, 29, 31)), ('samples', (1, 2, 4, 8, 16, 32, 64))):
        if config[name] not in choices:
            raise SystemExit(f'--{name}={config[name]}: expected one of {", ".join(map(str, choices))}')


def draw_questions(n, k, held_out, rng):
    """(n, k) ids, in each row k different addends: questions held out from training, or those that are not."""
    found = np.empty((0, k), dtype=np.int64)
    while len(found) < n:
        drawn = rng.random((4 * n, len(OPERATIONS))).argsort(1)[:, :k]
        found = np.concatenate((found, drawn[((drawn**2).sum(1) % HELD_OUT == 0) == held_out]))
    return torch.from_numpy(found[:n])


def asked(question, marker):
    """(B, k) addends -> (B, k + 1) ids, what the model is given."""
    return torch.cat((question, torch.full((len(question), 1), marker)), 1)


def steps_of(question):
    """(B, k) operations -> (B, 2 k) ids: each, and behind it the result so far; the first is done to 1."""
    is_plus, n = torch.tensor([(sign == '+', n) for sign, n in OPERATIONS])[question].unbind(2)
    steps, result = [], torch.ones(len(question), dtype=torch.long)
    for i in range(question.size(1)):
        result = torch.where(is_plus[:, i] == 1, result + n[:, i], result * n[:, i]) % modulus
        steps += [question[:, i], len(OPERATIONS) + result]
    return torch.stack(steps, 1)


def get_batch(step):
    """-> x, y (B, 3 k): questions of k addends, answered in both ways; targets are only what the model has to write."""
    k, n, rng = 2 + step % (numbers - 1), round(direct_share * batch_size), np.random.default_rng([seed, step])
    question = draw_questions(batch_size, k, False, rng)
    written = steps_of(question)
    written[:n, 0] = written[:n, -1]  # at once: the total alone; the rest of these rows is of no meaning
    document = torch.cat((question, torch.full((batch_size, 1), IN_STEPS), written), 1)
    document[:n, k] = AT_ONCE
    x, y = document[:, :-1], document[:, 1:].clone()
    y[:, :k] = -1  # the question
    y[:n, k + 1 :] = -1
    return x, y


def sample(model, prompts, n, length, temperature, rng):
    """
    n continuations of each prompt (N, L), `length` tokens at this temperature.
    -> ids (N, n, length), and the log-probability (N, n) that the model gives each of them
    """
    rows = prompts.repeat_interleave(n, 0)
    u = torch.from_numpy(rng.random((len(rows), length), dtype=np.float32))
    drawn = [(ids, logprobs) for ids, logprobs, _ in generate(model, rows, length, temperature, u=u)]
    ids, logprobs = (torch.cat(tokens, 1).view(-1, n, length) for tokens in zip(*drawn, strict=True))
    return ids, logprobs.sum(2)


def search(propose, prompts, depth, beam):
    """
    Tree search, breadth first: after each of `depth` steps the `beam` chains of a question that the model finds
    likeliest as a whole are kept. propose(chains (R, L)) -> k ways to go on with each, ids (R, k, length), and their
    log-probabilities (R, k). -> chains (N, beam, ...), the likeliest first, and the tokens spent on a question
    """
    N, L = prompts.shape
    chains, scores, spent = prompts[:, None], torch.zeros(N, 1), 0
    for _ in range(depth):
        ids, logprobs = propose(chains.flatten(0, 1))
        k, length = ids.shape[1:]
        spent += ids.numel() // N
        scores = (scores[:, :, None] + logprobs.view(N, -1, k)).flatten(1)
        chains = torch.cat((chains.repeat_interleave(k, 1), ids.view(N, -1, length)), 2)
        again = (chains[:, :, None] == chains[:, None]).all(3).tril(-1).any(2)  # drawn before
        scores, best = scores.masked_fill(again, -torch.inf).topk(min(beam, scores.size(1)))
        chains = chains.gather(1, best[:, :, None].expand(-1, -1, chains.size(2)))
    return chains[:, :, L:], spent


def said(ids):
    return ' '.join(VOCAB[i] for i in ids)


def vote(answers):
    """(N, n) ids -> (N,), the total that most of a question's samples come to; -1 where none is a total."""
    votes = [majority(said(row).split(), r'=\d+') for row in answers.tolist()]
    return torch.tensor([VOCAB.index(totals[0][0]) if totals else -1 for totals in votes])


def accuracy(answers, truth):
    """Ids (N,), or (N, repetitions), against (N,) -> % that are right, and the standard error of N questions."""
    right = 100 * (answers.view(len(truth), -1) == truth[:, None]).float().mean(1)
    return right.mean().item(), right.std().item() / len(truth) ** 0.5


def measure(model, question, rng):
    """-> {method: [(its size, tokens spent on a question, accuracy, its error)]}, and what was drawn"""
    truth, prompts, length = steps_of(question)[:, -1], asked(question, IN_STEPS), 2 * numbers
    found = {'steps, search': [], 'steps, likeliest': [], 'steps, vote': [], 'at once, vote': []}
    for beam, branches in SEARCHES:
        propose = partial(sample, model, n=branches, length=2, temperature=temperature, rng=rng)
        leaves, spent = search(propose, prompts, numbers, beam)
        found['steps, search'].append((f'{beam} x {branches}', spent, *accuracy(leaves[:, 0, -1], truth)))
    at_once = torch.cat([sample(model, asked(question, AT_ONCE), samples, 1, temperature, rng)[0]
                         for _ in range(length)], 1)  # as many tokens as all the chains
    in_steps, logprobs = sample(model, prompts, samples, length, temperature, rng)
    sizes = [2**i for i in range(samples.bit_length())]
    for n in sizes:  # the samples beyond the first n make further groups, for a smaller error
        answers, best = in_steps[:, :, -1].reshape(-1, n), logprobs.view(-1, n).argmax(1, keepdim=True)
        found['steps, likeliest'].append((n, n * length, *accuracy(answers.gather(1, best), truth)))
        found['steps, vote'].append((n, n * length, *accuracy(vote(answers), truth)))
    for n in [1, *(n * length for n in sizes)]:
        found['at once, vote'].append((n, n, *accuracy(vote(at_once.reshape(-1, n)), truth)))
    return found, at_once, in_steps


def show_example(question, at_once, in_steps):
    """Print a question which the vote answers rightly though several chains, and the answer at once, are wrong."""
    truth, answers = steps_of(question)[:, -1], in_steps[:, :, -1]
    is_mixed = (answers == truth[:, None]).float().mean(1) < 0.7
    i = int((is_mixed & (vote(answers) == truth) & (at_once[:, 0, 0] != truth)).int().argmax())  # the first, if any
    print('\nfor example', said(question[i]), 'which is', said(truth[i : i + 1]))
    for marker, chains in (('at once:', at_once[i, :1]), ('in steps:', in_steps[i, :5])):
        for chain in chains:
            print(marker, said(chain), '' if chain[-1] == truth[i] else 'wrong')
    print('votes:', ', '.join(f'{n} for {answer}' for answer, n in majority(said(answers[i]).split(), r'=\d+')))


def draw(found):
    """Accuracy against tokens spent, a line for each method."""
    figure, ax = common.pyplot().subplots(figsize=(9, 5))
    colors = common.PURPLE, common.GREEN, common.BLUE, common.RED
    for (name, points), color in zip(found.items(), colors, strict=True):
        _, spent, shares, errors = zip(*points, strict=True)
        ax.errorbar(spent, shares, errors, color=color, marker='o', markersize=4, capsize=2)
        ax.annotate(name, (spent[-1], shares[-1]), (6, 0), textcoords='offset points', color=color, va='center')
    ax.axhline(100 / modulus, color='gray', linestyle=':')
    ax.set(xscale='log', xlabel='tokens generated for a question', ylabel='right answers, %', ylim=(0, 102))
    return figure


def main():
    check_settings()
    common.use_machine()
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**PRESETS['modern'], 'n_layer': n_layer, 'n_head': n_head, 'n_embd': n_embd,
                             'vocab_size': len(VOCAB), 'block_size': 3 * numbers + 1}))
    print(f'{model.get_num_params():,} parameters learn sums of 2 to {numbers} numbers modulo {modulus}')
    for step, loss in common.train(model, get_batch, max_iters):
        if (step + 1) % 100 == 0:
            print(f'step {step + 1:4} of {max_iters}: loss {loss:.3f}')
    model.eval()

    rng, by_length = np.random.default_rng([seed, max_iters]), []
    for k in range(2, numbers + 1):
        question = draw_questions(questions, k, True, rng)
        answers = [sample(model, asked(question, marker), 1, length, 0.0, rng)[0][:, 0, -1]
                   for marker, length in ((AT_ONCE, 1), (IN_STEPS, 2 * k))]
        by_length.append((k, *(accuracy(answer, steps_of(question)[:, -1]) for answer in answers)))
    print(f'\nright answers to held-out questions, %, greedily (chance: {100 / modulus:.1f})\n')
    print(table([('numbers', 'at once', 'in steps'),
                 *((k, *(f'{share:.1f} ± {error:.1f}' for share, error in both)) for k, *both in by_length)]))
    found, at_once, in_steps = measure(model, question, rng)
    print(f'\n{numbers} numbers, temperature {temperature}\n')
    print(table([('method', 'size', 'tokens', 'right, %'),
                 *((name, size, spent, f'{share:.1f} ± {error:.1f}')
                   for name, points in found.items() for size, spent, share, error in points)]))
    show_example(question, at_once, in_steps)
    common.save(draw(found), out, 'thinking')
    common.record(out, 'thinking', by_length=by_length, methods=found)


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
