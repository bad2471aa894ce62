"""
Thinking in tokens: a small GPT answers at once, or in steps; how often it is right, against the tokens that it spends.

    $ python -m lab.thinking                    # 71 seconds on two cores
    $ python -m lab.thinking --direct_share=1   # a model that has never seen steps

A question is eight operations, one after the other from 1 on, modulo 17: '*15 +14 *13 ...'. The same model has learnt
to answer at once ('=7') and in steps ('*15 =15 +14 =12 *13 =3 ...'). For a token it computes as much as for any other,
so at once it does one operation, hardly two, and guesses beyond (chance: 5.9%). A vote of guesses is a guess: voting
removes the noise of sampling and computes nothing. Steps give each operation a token of its own. Measured on two cores
of an AMD EPYC, % right of 500 held-out questions, +-1.7 or less: at once 5.2, a vote of 256 answers 8.0; one chain of
steps, 16 tokens, 70.2; a vote of 16 chains 81.2; the likeliest of 4 82.2; tree search, 232 tokens, 82.6. Greedy
decoding, 16 tokens, is as good, 82.4: all chains take the same route. Where the model is sure of a wrong step (here it
has always misread an operation), neither votes nor its own likelihood can help.

"State of GPT" (Karpathy 2023); chain of thought, Wei et al. 2022; self-consistency, Wang et al. 2023; tree of thoughts,
Yao et al. 2023; why depth is not enough for arithmetic, Feng et al. 2023 (arXiv 2305.15408). Needs '.[lab]'.
"""

import sys
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from bench.common import table
from config.presets import PRESETS
from configurator import explain_errors, override
from flatgpt.generate import Sampling, generate, majority
from lab import common
from model import GPT, GPTConfig

# settings ------------------------------------------------------------------------------------------------------------
length = 8  # operations of a question; the model is trained on questions of 1 to this many
modulus = 17  # results are taken modulo this, a prime
direct_share = 0.5  # of the training questions are answered at once, the others in steps
n_layer = 2
n_embd = 64
max_iters = 800  # training steps
batch_size = 256  # questions a training step
temperature = 1.0  # of the samples
questions = 500  # held out, to measure with
seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

# ids: the operations +1, ..., *2, ..., the results =0, =1, ..., and how a question is to be answered
OPERATIONS = [('+', n) for n in range(1, modulus)] + [('*', n) for n in range(2, modulus)]
VOCAB = [f'{sign}{n}' for sign, n in [*OPERATIONS, *(('=', n) for n in range(modulus))]] + ['at once:', 'in steps:']
AT_ONCE, IN_STEPS = len(VOCAB) - 2, len(VOCAB) - 1
HELD_OUT = 13  # a question is never trained on if this divides the sum of its ids' squares
SAMPLES = 16  # chains of steps drawn for a question, a power of 2
# color in the picture, and where the name stands: at which point, how far from it
METHODS = {'steps, search': (common.PURPLE, -1, (-40, 10)), 'steps, likeliest': (common.GREEN, 1, (-35, 24)),
           'steps, vote': (common.BLUE, 2, (-4, -18)), 'steps, greedy': (common.BLACK, 0, (-85, -4)),
           'at once, vote': (common.RED, 3, (-15, 9)), 'at once, greedy': (common.BLACK, 0, (-10, 9))}


def draw_questions(n, k, held_out, rng):
    """(n, k) ids, in each row k different operations: questions held out from training, or those that are not."""
    found = np.empty((0, k), dtype=np.int64)
    while len(found) < n:
        drawn = rng.random((4 * n, len(OPERATIONS))).argsort(1)[:, :k]
        found = np.concatenate((found, drawn[((drawn**2).sum(1) % HELD_OUT == 0) == held_out]))
    return torch.from_numpy(found[:n])


def steps_of(question):
    """(B, k) operations -> (B, 2 k) ids: each, and behind it the result so far; the first is done to 1."""
    is_plus, n = torch.tensor([(sign == '+', n) for sign, n in OPERATIONS])[question].unbind(2)
    steps, result = [], torch.ones(len(question), dtype=torch.long)
    for i in range(question.size(1)):
        result = torch.where(is_plus[:, i] == 1, result + n[:, i], result * n[:, i]) % modulus
        steps += [question[:, i], len(OPERATIONS) + result]
    return torch.stack(steps, 1)


def get_batch(step):
    """-> x, y (B, 3 k): questions of k operations, answered in both ways; targets only where the model has to write."""
    k, n, rng = 1 + step % length, round(direct_share * batch_size), np.random.default_rng([seed, step])
    question = draw_questions(batch_size, k, False, rng)
    steps = steps_of(question)
    document = torch.cat((F.pad(question, (0, 1), value=IN_STEPS), steps), 1)
    document[:n, k], document[:n, k + 1] = AT_ONCE, steps[:n, -1]  # the rest of these rows is of no meaning
    x, y = document[:, :-1], document[:, 1:].clone()
    y[:, :k] = -1
    y[:n, k + 1 :] = -1
    return x, y


def sample(model, prompts, n, max_new_tokens, temperature, rng):
    """-> ids (N, n, max_new_tokens) that go on with the prompts (N, L), and the log-probabilities (N, n) of each row"""
    rows = prompts.repeat_interleave(n, 0)
    u = torch.from_numpy(rng.random((len(rows), max_new_tokens), dtype=np.float32))
    drawn = [(ids, logprobs) for ids, logprobs, _ in generate(
        model, rows, Sampling(max_new_tokens, temperature), u)]
    ids, logprobs = (torch.cat(tokens, 1).view(-1, n, max_new_tokens) for tokens in zip(*drawn, strict=True))
    return ids, logprobs.sum(2)


def search(propose, prompts, depth, beam):
    """
    Tree search, breadth first: after each of `depth` steps the `beam` chains of a question that the model finds
    likeliest as a whole are kept. propose(chains (R, L)) -> k ways to go on with each, ids (R, k, tokens), and their
    log-probabilities (R, k). -> chains (N, beam, ...), the likeliest first, and the tokens spent on a question
    """
    N, L = prompts.shape
    chains, scores, spent = prompts[:, None], torch.zeros(N, 1), 0
    for _ in range(depth):
        ids, logprobs = propose(chains.flatten(0, 1))
        spent += ids.numel() // N
        scores = (scores[:, :, None] + logprobs.view(N, -1, ids.size(1))).flatten(1)
        chains = torch.cat((chains.repeat_interleave(ids.size(1), 1), ids.reshape(N, -1, ids.size(2))), 2)
        again = (chains[:, :, None] == chains[:, None]).all(3).tril(-1).any(2)  # drawn before
        scores, best = scores.masked_fill(again, -torch.inf).topk(min(beam, scores.size(1)))
        chains = chains.gather(1, best[:, :, None].expand(-1, -1, chains.size(2)))
    return chains[:, :, L:], spent


def vote(answers):
    """(N, n) ids -> (N,), the result that most of the n come to; -1 where none is a result."""
    votes = [majority([VOCAB[i] for i in row], r'=\d+') for row in answers.tolist()]
    return torch.tensor([VOCAB.index(results[0][0]) if results else -1 for results in votes])


def measure(model, question, rng):
    """-> {method: [(its size, tokens spent on a question, % right, standard error)]}, and what was drawn"""
    truth, spent, draw = steps_of(question)[:, -1], 2 * length, partial(sample, model, rng=rng)  # spent: on a chain
    at_once_prompts, prompts = (F.pad(question, (0, 1), value=marker) for marker in (AT_ONCE, IN_STEPS))
    in_steps, logprobs = draw(prompts, SAMPLES, spent, temperature)
    at_once = torch.cat([draw(at_once_prompts, SAMPLES, 1, temperature)[0] for _ in range(spent)], 1)  # as many tokens
    found = {name: [] for name in METHODS}

    def add(name, size, tokens, answers):  # (N,), or (N * repetitions,), which make the error smaller
        right = 100 * (answers.view(questions, -1) == truth[:, None]).float().mean(1)
        found[name].append((size, tokens, right.mean().item(), right.std().item() / questions**0.5))

    for beam, k in ((1, 2), (2, 2), (2, 4), (4, 4)):
        chains, tokens = search(partial(draw, n=k, max_new_tokens=2, temperature=temperature), prompts, length, beam)
        add('steps, search', f'{beam} x {k}', tokens, chains[:, 0, -1])
    sizes = [2**i for i in range(SAMPLES.bit_length())]
    for n in sizes:
        answers, best = in_steps[:, :, -1].reshape(-1, n), logprobs.view(-1, n).argmax(1, keepdim=True)
        add('steps, likeliest', n, n * spent, answers.gather(1, best))
        add('steps, vote', n, n * spent, vote(answers))
    for n in [1, *(n * spent for n in sizes)]:
        add('at once, vote', n, n, vote(at_once.reshape(-1, n)))
    add('steps, greedy', 1, spent, draw(prompts, 1, spent, 0.0)[0][:, 0, -1])
    add('at once, greedy', 1, 1, draw(at_once_prompts, 1, 1, 0.0)[0][:, 0, -1])
    return found, at_once[:, :, 0], in_steps


def picture(found):
    """Accuracy against tokens spent, a line for each method."""
    figure, ax = common.pyplot().subplots(figsize=(9, 5))
    for name, (color, i, offset) in METHODS.items():
        _, spent, shares, errors = zip(*found[name], strict=True)
        ax.errorbar(spent, shares, errors, color=color, marker='o', markersize=5, capsize=3)
        ax.annotate(name, (spent[i], shares[i]), offset, textcoords='offset points', color=color)
    ticks = [point[1] for point in found['at once, vote']]
    ax.axhline(100 / modulus, color='gray', linestyle=':')
    ax.annotate('by chance', (4, 100 / modulus), (0, -13), textcoords='offset points', color='gray')
    ax.set(xscale='log', xticks=ticks, xticklabels=ticks, xlabel='tokens generated for a question', ylim=(0, 103),
           ylabel='right answers, %')
    ax.minorticks_off()
    return figure


def main():
    for name, low, high in (('length', 2, 9), ('max_iters', 1, 10**6), ('batch_size', 2, 10**5), ('seed', 0, 2**32),
                            ('direct_share', 0, 1), ('temperature', 0.01, 100), ('questions', 2, 10**4)):
        if not low <= config[name] <= high:
            raise SystemExit(f'--{name}={config[name]}: expected {low} to {high}')
    if modulus not in (11, 13, 17, 19, 23, 29, 31):
        raise SystemExit(f'--modulus={modulus}: expected a prime from 11 to 31')
    common.start(out, seed)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**PRESETS['modern'], 'n_layer': n_layer, 'n_head': 2, 'n_embd': n_embd,
                             'vocab_size': len(VOCAB), 'block_size': 3 * length + 1}))
    print(f'{model.get_num_params():,} parameters learn 1 to {length} operations modulo {modulus}')
    for step, loss in common.train(model, get_batch, max_iters):
        if (step + 1) % 100 == 0:
            print(f'step {step + 1:4} of {max_iters}: loss {loss:.3f}')
    model.eval()

    rng, by_length = np.random.default_rng([seed, max_iters]), []
    for k in range(1, length + 1):
        question = draw_questions(questions, k, k > 1, rng)  # of one operation there are too few to hold some out
        answers = [sample(model, F.pad(question, (0, 1), value=marker), 1, n, 0.0, rng)[0][:, 0, -1]
                   for marker, n in ((AT_ONCE, 1), (IN_STEPS, 2 * k))]
        truth = steps_of(question)[:, -1]
        by_length.append([k, *(100 * (answer == truth).float().mean().item() for answer in answers)])
    print(f'\n% right of {questions} held-out questions of each length, greedily (by chance {100 / modulus:.1f};\n'
          f'those of one operation were trained on)\n')
    print(table([('operations', 'at once', 'in steps'), *((k, f'{a:.1f}', f'{b:.1f}') for k, a, b in by_length)]))
    found, at_once, in_steps = measure(model, question, rng)
    print(f'\nquestions of {length} operations, temperature {temperature}\n')
    print(table([('method', 'size', 'tokens', '% right'),
                 *((name, size, spent, f'{share:.1f} ± {error:.1f}')
                   for name, points in found.items() for size, spent, share, error in points)]))

    answers = in_steps[:, :, -1]
    is_telling = (at_once[:, 0] != truth) & (answers[:, 0] != truth) & (vote(answers) == truth)
    i = int(is_telling.int().argmax())  # the first such question, if there is one
    print('\nfor example, from 1 on:', *(VOCAB[j] for j in question[i]), VOCAB[truth[i]])
    for marker, chain in ((AT_ONCE, at_once[i, :1]), *((IN_STEPS, chain) for chain in in_steps[i, :4])):
        print(VOCAB[marker], *(VOCAB[j] for j in chain))
    votes = majority([VOCAB[j] for j in answers[i]], r'=\d+')
    print(f'{SAMPLES} chains vote:', ', '.join(f'{n} for {answer}' for answer, n in votes))
    common.save(picture(found), out, 'thinking')
    common.record(out, 'thinking', by_length=by_length, methods=found)


if __name__ == '__main__':
    sys.excepthook = explain_errors
    main()
