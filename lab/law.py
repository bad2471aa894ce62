"""
The scaling law L(N, D) = E + A / N^alpha + B / D^beta: loss, fit, bootstrap, the best size for a budget, and tables of
runs. scaling_laws.py makes runs for it.

    best = law.fit(N, D, loss)              # arrays: parameters, tokens, loss in nats; -> (E, A, B, alpha, beta)
    samples = law.bootstrap(N, D, loss, best, 400, seed=0)
    N, D = law.best_size(best, C)           # of C = 6 N D FLOPs

E is the entropy of the text, A / N^alpha what a model too small adds to it, B / D^beta what too few tokens add.
Source: "Training Compute-Optimal Large Language Models", Hoffmann et al. 2022, its approaches 2 and 3.
"""

import csv
import math
import re
from itertools import product

import numpy as np

NAMES = ('E', 'A', 'B', 'alpha', 'beta')
# Hoffmann et al. 2022, appendix D.3; and "Chinchilla Scaling: A replication attempt", Besiroglu et al. 2024, with their
# standard errors: a fit of the points of the former's figure 4 without the five highest losses
HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)
BESIROGLU, BESIROGLU_ERRORS = (1.8172, 482.01, 2085.43, 0.3478, 0.3658), (0.03, 124.58, 1293.23, 0.02, 0.02)
COLUMNS = {'N': ('n', 'params', 'parameters', 'modelsize', 'nparams', 'size'),  # their names in small letters
           'D': ('d', 'tokens', 'trainingtokens', 'ntokens', 'data'),
           'C': ('c', 'flops', 'flop', 'trainingflop', 'trainingflops', 'compute'),
           'loss': ('loss', 'l', 'finalloss', 'valloss', 'testloss')}


def loss_of(coefficients, N, D):
    """-> loss of a model of size N after D tokens, nats a token."""
    E, A, B, alpha, beta = coefficients
    return E + A / N**alpha + B / D**beta


def fit(N, D, loss, start=None, delta=1e-3):
    """
    -> (E, A, B, alpha, beta) with the least sum of Huber losses of log predicted - log measured loss, so that a run
    that is far off pulls no more than one that is a little off. L-BFGS from a grid of starts, or from one alone.
    """
    from scipy.optimize import minimize

    # logarithms from their means: else A and alpha move along a valley so narrow that the search ends on its way
    n0, d0 = np.log(N).mean(), np.log(D).mean()
    n, d, target = np.log(N) - n0, np.log(D) - d0, np.log(loss)

    def objective(p):
        e, a, b, alpha, beta = p  # the logarithms of E, and of the other two terms at the means
        terms = np.stack((np.full(len(n), e), a - alpha * n, b - beta * d))
        predicted = np.logaddexp.reduce(terms)
        r = (predicted - target) / delta
        slope = np.exp(terms - predicted) * np.clip(r, -1, 1) / delta
        gradient = [*slope.sum(1), -(slope[1] * n).sum(), -(slope[2] * d).sum()]
        return np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5).sum(), np.array(gradient)

    if start is None:  # E is a share of the lowest loss; the other two terms have half of the rest each
        low = math.log(loss.min())
        starts = [(low + math.log(share), *[low + math.log((1 - share) / 2)] * 2, alpha, beta)
                  for share, alpha, beta in product((0.2, 0.5, 0.9), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0))]
    else:
        E, A, B, alpha, beta = start
        starts = [(math.log(E), math.log(A) - alpha * n0, math.log(B) - beta * d0, alpha, beta)]
    limits = [(-10, 10)] * 3 + [(0.05, 5)] * 2  # wide, and nothing overflows in them
    found = [minimize(objective, p, jac=True, method='L-BFGS-B', bounds=limits,
                      options={'maxiter': 2000, 'maxfun': 5000, 'ftol': 1e-12, 'gtol': 1e-7}) for p in starts]
    e, a, b, alpha, beta = min(found, key=lambda result: result.fun).x.tolist()
    return math.exp(e), math.exp(a + alpha * n0), math.exp(b + beta * d0), alpha, beta


def bootstrap(N, D, loss, best, n, seed):
    """-> (n, 5): the coefficients of fits to as many runs as there are, drawn with replacement."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(N), size=len(N)) for _ in range(n)]
    return np.array([fit(N[i], D[i], loss[i], best) for i in draws])


def best_size(coefficients, C):
    """-> N, D of the least loss that C = 6 N D FLOPs buy: where the law's slope along that curve is 0."""
    _, A, B, alpha, beta = coefficients
    N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))
    return N, C / 6 / N


def valley(N, loss):
    """
    Approach 2: -> N and loss at the bottom of the parabola in log N that fits the runs of one budget best. None where
    the bottom is not between the sizes that were tried.
    """
    c2, c1, c0 = np.polyfit(np.log(N), loss, 2) if len(N) > 2 else (0, 0, 0)
    if c2 <= 0 or not np.log(N).min() < -c1 / (2 * c2) < np.log(N).max():
        return None
    return math.exp(-c1 / (2 * c2)), float(c0 - c1**2 / (4 * c2))


def read_table(path, leave_out=0):
    """
    -> N, D, loss, arrays, of the runs in a CSV but the leave_out with the highest losses. Columns are known by many
    names; where there are no tokens, they are FLOPs / 6 N. SystemExit says what is missing, or which line is no run.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            rows = list(csv.reader(f))
    except (OSError, ValueError, csv.Error) as error:
        raise SystemExit(f'{path} can not be read as a CSV: {error}') from None
    header = [re.sub(r'\(.*\)|[^a-z]', '', name.lower()) for name in rows[0]] if rows else []  # units in brackets
    place = {key: next((header.index(name) for name in names if name in header), None)
             for key, names in COLUMNS.items()}
    missing = [key for key in ('N', 'loss') if place[key] is None]
    missing += ['D or C'] * (place['D'] is None and place['C'] is None)
    if missing:
        raise SystemExit(f'{path}: no column {", ".join(missing)} among {", ".join(rows[0]) if rows else "none"}; '
                         f'expected N (parameters), loss, and D (tokens) or C (FLOPs)')
    runs = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        try:
            run = {key: float(row[i]) for key, i in place.items() if i is not None}
        except (ValueError, IndexError):
            raise SystemExit(f'{path}, line {number}: {",".join(row)[:60]!r} has no number in each of the columns '
                             f'{", ".join(rows[0][i] for i in place.values() if i is not None)}') from None
        if not all(0 < value < math.inf for value in run.values()):
            raise SystemExit(f'{path}, line {number}: {run}; expected numbers above 0')
        runs.append((run['loss'], run['N'], run.get('D') or run['C'] / 6 / run['N']))
    kept = sorted(runs)[: max(0, len(runs) - leave_out)]
    if len(kept) < 10:
        raise SystemExit(f'{path}: {len(kept)} runs are left; five coefficients need at least 10')
    loss, N, D = np.array(kept).T
    return N, D, loss
