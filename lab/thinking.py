"""
Let a small GPT answer at once or in steps; compare accuracy per token.

    $ python -m lab.thinking                    # 71 seconds on two cores
    $ python -m lab.thinking --direct_share=1   # train on no steps at all

A question is eight operations, applied from 1 on, modulo 17: '*15 +14 *13 ...'. One model learns
to answer at once ('=7') and in steps ('*15 =15 +14 =12 *13 =3 ...'). The computation per token is
fixed. At once the model manages one operation, rarely two, and guesses beyond (chance: 5.9%).
Votes remove sampling noise but compute nothing, so a vote of guesses is a guess. Steps spend a
token on each operation.

Measured on two cores of an AMD EPYC, % right of 500 held-out questions, +-1.7 or less:
  - at once 5.2; a vote of 256 answers 8.0;
  - one chain of steps, 16 tokens, 70.2; a vote of 16 chains 81.2; the likeliest of 4 82.2;
  - tree search, 232 tokens, 82.6; greedy decoding, 16 tokens, 82.4.
Greedy decoding is as good as search because all chains take the same route. Where the model is sure
of a wrong step (it always misreads one operation), neither votes nor its likelihood help.

"State of GPT" (Karpathy 2023); chain of thought, Wei et al. 2022; self-consistency, Wang et al.
2023; tree of thoughts, Yao et al. 2023; why depth is not enough for arithmetic, Feng et al. 2023
(arXiv 2305.15408). Needs '.[lab]'.
"""

from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from torch.nn import functional as F

from bench.common import table
from configurator import Count, Probability, Range, Seed, override
from flatgpt.generate import Sampling, generate, majority
from lab import common
from model import GPT

# Settings -----------------------------------------------------------------------------------------
length: Annotated[int, Range(least=2, most=9)] = 8  # operations of a question; trained on 1 to this
modulus: Literal[11, 13, 17, 19, 23, 29, 31] = 17  # a prime
direct_share: Probability = 0.5  # of the training questions, answered at once; the rest in steps
n_layer: Count = 2
n_embd: Count = 64
max_iters: Count = 800  # training steps
batch_size: Annotated[int, Range(least=2)] = 256  # questions per training step
temperature: Annotated[float, Range(least=0.01, most=100)] = 1.0  # of the samples
questions: Annotated[int, Range(least=2)] = 500  # held-out questions to measure with
seed: Seed = 1337
out = 'out-lab'  # folder of the picture and the numbers
config = override(globals())
# --------------------------------------------------------------------------------------------------

# ids: operations +1, ..., *2, ..., results =0, =1, ..., and two markers
OPERATIONS = [('+', n) for n in range(1, modulus)] + [('*', n) for n in range(2, modulus)]
VOCAB = [f'{sign}{n}' for sign, n in [*OPERATIONS, *(('=', n) for n in range(modulus))]]
VOCAB += ['at once:', 'in steps:']
AT_ONCE, IN_STEPS = len(VOCAB) - 2, len(VOCAB) - 1
HELD_OUT = 13  # a question is held out if this divides the sum of its squared ids
SAMPLES = 16  # chains of steps per question, a power of 2
# color in the picture, and the place of the name: at which point, at which offset
METHODS = {'steps, search': (common.PURPLE, -1, (-40, 10)),
           'steps, likeliest': (common.GREEN, 1, (-35, 24)),
           'steps, vote': (common.BLUE, 2, (-4, -18)),
           'steps, greedy': (common.BLACK, 0, (-85, -4)),
           'at once, vote': (common.RED, 3, (-15, 9)),
           'at once, greedy': (common.BLACK, 0, (-10, 9))}


def draw_questions(n, k, held_out, rng):
    """Return (n, k) ids: questions of k different operations, held out or not."""
    rows = np.empty((0, k), dtype=np.int64)
    while len(rows) < n:
        drawn = rng.random((4 * n, len(OPERATIONS))).argsort(1)[:, :k]
        rows = np.concatenate((rows, drawn[((drawn**2).sum(1) % HELD_OUT == 0) == held_out]))
    return torch.from_numpy(rows[:n])


def steps_of(question):
    """Turn operations (B, k) into steps (B, 2 k): operation, result so far, ..."""
    operations = torch.tensor([(sign == '+', n) for sign, n in OPERATIONS])
    is_plus, n = operations[question].unbind(2)
    steps, result = [], torch.ones(len(question), dtype=torch.long)
    for i in range(question.size(1)):
        result = torch.where(is_plus[:, i] == 1, result + n[:, i], result * n[:, i]) % modulus
        steps += [question[:, i], len(OPERATIONS) + result]
    return torch.stack(steps, 1)


def get_batch(step):
    """Return x, y (B, 3 k): questions and their answers, at once or in steps.

    The targets cover the answers alone.
    """
    k, n = 1 + step % length, round(direct_share * batch_size)
    question = draw_questions(batch_size, k, False, np.random.default_rng([seed, step]))
    steps = steps_of(question)
    document = torch.cat((F.pad(question, (0, 1), value=IN_STEPS), steps), 1)
    document[:n, k], document[:n, k + 1] = AT_ONCE, steps[:n, -1]  # the rest is unused
    x, y = document[:, :-1], document[:, 1:].clone()
    y[:, :k] = -1
    y[:n, k + 1 :] = -1
    return x, y


def sample(model, prompts, size, temperature, rng):
    """Sample continuations of each prompt; size = (number, tokens of each).

    Returns ids (N, n, max_new_tokens) and the log-probabilities of the continuations, (N, n).
    """
    n, max_new_tokens = size
    rows = prompts.repeat_interleave(n, 0)
    u = torch.from_numpy(rng.random((len(rows), max_new_tokens), dtype=np.float32))
    drawn = [(ids, logprobs) for ids, logprobs, _ in
             generate(model, rows, Sampling(max_new_tokens, temperature), u)]
    ids, logprobs = (torch.cat(tokens, 1).view(-1, n, max_new_tokens)
                     for tokens in zip(*drawn, strict=True))
    return ids, logprobs.sum(2)


def search(propose, prompts, depth, beam):
    """Search breadth first, keeping the `beam` likeliest chains after each step.

    propose(chains (R, L)) returns k continuations of each, ids (R, k, tokens), and their
    log-probabilities (R, k). Returns chains (N, beam, ...), the likeliest first, and the number of
    tokens generated per question.
    """
    N, L = prompts.shape
    chains, scores, spent = prompts[:, None], torch.zeros(N, 1), 0
    for _ in range(depth):
        ids, logprobs = propose(chains.flatten(0, 1))
        spent += ids.numel() // N
        scores = (scores[:, :, None] + logprobs.view(N, -1, ids.size(1))).flatten(1)
        chains = chains.repeat_interleave(ids.size(1), 1)
        chains = torch.cat((chains, ids.reshape(N, -1, ids.size(2))), 2)
        is_repeated = (chains[:, :, None] == chains[:, None]).all(3).tril(-1).any(2)
        scores = scores.masked_fill(is_repeated, -torch.inf)
        scores, best = scores.topk(min(beam, scores.size(1)))
        chains = chains.gather(1, best[:, :, None].expand(-1, -1, chains.size(2)))
    return chains[:, :, L:], spent


def vote(answers):
    """Return (N,), the most frequent result of each row; -1 without a result."""
    votes = [majority([VOCAB[i] for i in row], r'=\d+') for row in answers.tolist()]
    return torch.tensor([VOCAB.index(results[0][0]) if results else -1 for results in votes])


def prompts_of(question, marker):
    """Append a marker to questions."""
    return F.pad(question, (0, 1), value=marker)


def measure(model, question, rng):
    """Return {method: [(size, tokens, % right, standard error)]}, and the samples."""
    truth, spent = steps_of(question)[:, -1], 2 * length  # tokens of a chain
    at_once_prompts, prompts = prompts_of(question, AT_ONCE), prompts_of(question, IN_STEPS)

    def draw(prompts, n, max_new_tokens, temperature=temperature):
        return sample(model, prompts, (n, max_new_tokens), temperature, rng)

    in_steps, logprobs = draw(prompts, SAMPLES, spent)
    at_once = torch.cat([draw(at_once_prompts, SAMPLES, 1)[0] for _ in range(spent)], 1)
    points = {name: [] for name in METHODS}

    def add(name, size, tokens, answers):  # (N,), or (N * repetitions,) for a smaller error
        right = 100 * (answers.view(questions, -1) == truth[:, None]).float().mean(1)
        points[name].append((size, tokens, right.mean().item(),
                             right.std().item() / questions**0.5))

    for beam, k in ((1, 2), (2, 2), (2, 4), (4, 4)):
        chains, tokens = search(partial(draw, n=k, max_new_tokens=2), prompts, length, beam)
        add('steps, search', f'{beam} x {k}', tokens, chains[:, 0, -1])
    sizes = [2**i for i in range(SAMPLES.bit_length())]
    for n in sizes:
        answers = in_steps[:, :, -1].reshape(-1, n)
        best = logprobs.view(-1, n).argmax(1, keepdim=True)
        add('steps, likeliest', n, n * spent, answers.gather(1, best))
        add('steps, vote', n, n * spent, vote(answers))
    for n in [1, *(n * spent for n in sizes)]:  # as many tokens as the steps
        add('at once, vote', n, n, vote(at_once.reshape(-1, n)))
    add('steps, greedy', 1, spent, draw(prompts, 1, spent, 0.0)[0][:, 0, -1])
    add('at once, greedy', 1, 1, draw(at_once_prompts, 1, 1, 0.0)[0][:, 0, -1])
    return points, at_once[:, :, 0], in_steps


def picture(methods):
    """Draw accuracy against generated tokens, a line for each method."""
    figure, ax = common.pyplot().subplots(figsize=(9, 5))
    for name, (color, i, offset) in METHODS.items():
        _, spent, shares, errors = zip(*methods[name], strict=True)
        ax.errorbar(spent, shares, errors, color=color, marker='o', markersize=5, capsize=3)
        ax.annotate(name, (spent[i], shares[i]), offset, textcoords='offset points', color=color)
    ticks = [point[1] for point in methods['at once, vote']]
    chance = 100 / modulus
    ax.axhline(chance, color='gray', linestyle=':')
    ax.annotate('by chance', (4, chance), (0, -13), textcoords='offset points', color='gray')
    ax.set(xscale='log', xticks=ticks, xticklabels=ticks, ylim=(0, 103),
           xlabel='tokens generated for a question', ylabel='right answers, %')
    ax.minorticks_off()
    return figure


def print_example(question, truth, at_once, in_steps):
    """Print a question that only the vote answers right, or else the first question."""
    answers = in_steps[:, :, -1]
    is_telling = (at_once[:, 0] != truth) & (answers[:, 0] != truth) & (vote(answers) == truth)
    i = int(is_telling.int().argmax())
    print('\nfor example, from 1 on:', *(VOCAB[j] for j in question[i]), VOCAB[truth[i]])
    chains = ((AT_ONCE, at_once[i, :1]), *((IN_STEPS, chain) for chain in in_steps[i, :4]))
    for marker, chain in chains:
        print(VOCAB[marker], *(VOCAB[j] for j in chain))
    votes = majority([VOCAB[j] for j in answers[i]], r'=\d+')
    print(f'{SAMPLES} chains vote:', ', '.join(f'{n} for {answer}' for answer, n in votes))


def main():
    # train
    common.start(out)
    torch.manual_seed(seed)
    model = GPT(common.gpt_config(n_layer=n_layer, n_head=2, n_embd=n_embd, vocab_size=len(VOCAB),
                                  block_size=3 * length + 1))
    print(f'{model.get_num_params():,} parameters learn 1 to {length} operations modulo {modulus}')
    for step, loss in common.train(model, get_batch, max_iters):
        if (step + 1) % 100 == 0:
            print(f'step {step + 1:4} of {max_iters}: loss {loss:.3f}')
    model.eval()

    # greedy accuracy for each number of operations
    rng, by_length = np.random.default_rng([seed, max_iters]), []
    for k in range(1, length + 1):
        question = draw_questions(questions, k, k > 1, rng)  # too few of one operation to hold out
        truth = steps_of(question)[:, -1]
        answers = [sample(model, prompts_of(question, marker), (1, n), 0.0, rng)[0][:, 0, -1]
                   for marker, n in ((AT_ONCE, 1), (IN_STEPS, 2 * k))]
        shares = ((answer == truth).float().mean().item() for answer in answers)
        by_length.append([k, *(100 * share for share in shares)])
    print(f'\n% right of {questions} held-out questions of each length, greedily (by chance '
          f'{100 / modulus:.1f};\nthose of one operation were trained on)\n')
    print(table([('operations', 'at once', 'in steps'),
                 *((k, f'{a:.1f}', f'{b:.1f}') for k, a, b in by_length)]))

    # all methods on the longest questions
    methods, at_once, in_steps = measure(model, question, rng)
    print(f'\nquestions of {length} operations, temperature {temperature}\n')
    print(table([('method', 'size', 'tokens', '% right'),
                 *((name, size, spent, f'{share:.1f} ± {error:.1f}')
                   for name, points in methods.items() for size, spent, share, error in points)]))
    print_example(question, truth, at_once, in_steps)
    common.save(picture(methods), out, 'thinking')
    common.record(out, 'thinking', by_length=by_length, methods=methods)


if __name__ == '__main__':
    main()
