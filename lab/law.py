"""
Fit the scaling law L(N, D) = E + A / N^alpha + B / D^beta to runs.

    runs = law.Runs(N, D, loss)             # arrays: parameters, tokens, loss in nats
    best = law.fit(runs)                    # (E, A, B, alpha, beta)
    samples = law.bootstrap(runs, best, 400, seed=0)
    N, D = law.best_size(best, C)           # for C = 6 N D FLOPs

E is the entropy of the text; A / N^alpha is added by too small a model, B / D^beta by too few
tokens. Source: "Training Compute-Optimal Large Language Models", Hoffmann et al. 2022, approaches
2 and 3.
"""

import csv
import math
import re
from itertools import product
from typing import NamedTuple

import numpy as np

from configurator import UserError

NAMES = ('E', 'A', 'B', 'alpha', 'beta')
HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al. 2022, appendix D.3
# "Chinchilla Scaling: A replication attempt", Besiroglu et al. 2024, with standard errors: a fit to
# the points of Hoffmann's figure 4 without the five highest losses
BESIROGLU = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)
BESIROGLU_ERRORS = (0.03, 124.58, 1293.23, 0.02, 0.02)
COLUMNS = {  # accepted names, in lower case and without spaces
    'N': ('n', 'params', 'parameters', 'modelsize', 'nparams', 'size'),
    'D': ('d', 'tokens', 'trainingtokens', 'ntokens', 'data'),
    'C': ('c', 'flops', 'flop', 'trainingflop', 'trainingflops', 'compute'),
    'loss': ('loss', 'l', 'finalloss', 'valloss', 'testloss')}


class Runs(NamedTuple):
    """Arrays of one length: parameters, tokens, and loss in nats per token."""

    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray


def loss_of(coefficients, N, D):
    """Return the loss of a model of N parameters after D tokens, in nats per token."""
    E, A, B, alpha, beta = coefficients
    return E + A / N**alpha + B / D**beta


def fit(runs, start=None, delta=1e-3):
    """Return (E, A, B, alpha, beta) of the least Huber loss between log losses.

    The Huber loss bounds the influence of outliers. L-BFGS begins from a grid, or from `start`.
    """
    from scipy.optimize import minimize

    # subtract the mean logarithms: else A and alpha correlate so much that the search stops early
    n0, d0 = np.log(runs.N).mean(), np.log(runs.D).mean()
    n, d, target = np.log(runs.N) - n0, np.log(runs.D) - d0, np.log(runs.loss)

    def objective(p):
        e, a, b, alpha, beta = p  # logarithms of E, and of the other two terms at the means
        terms = np.stack((np.full(len(n), e), a - alpha * n, b - beta * d))
        predicted = np.logaddexp.reduce(terms)
        r = (predicted - target) / delta
        slope = np.exp(terms - predicted) * np.clip(r, -1, 1) / delta
        gradient = [*slope.sum(1), -(slope[1] * n).sum(), -(slope[2] * d).sum()]
        return np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5).sum(), np.array(gradient)

    if start is None:  # E is a share of the lowest loss; the other two terms halve the rest
        low, powers = math.log(runs.loss.min()), (0.2, 0.5, 1.0)
        starts = [(low + math.log(share), *[low + math.log((1 - share) / 2)] * 2, alpha, beta)
                  for share, alpha, beta in product((0.2, 0.5, 0.9), powers, powers)]
    else:
        E, A, B, alpha, beta = start
        starts = [(math.log(E), math.log(A) - alpha * n0, math.log(B) - beta * d0, alpha, beta)]
    limits = [(-10, 10)] * 3 + [(0.05, 5)] * 2  # wide, and nothing overflows within them
    options = {'maxiter': 2000, 'maxfun': 5000, 'ftol': 1e-12, 'gtol': 1e-7}
    results = [minimize(objective, p, jac=True, method='L-BFGS-B', bounds=limits, options=options)
               for p in starts]
    e, a, b, alpha, beta = min(results, key=lambda result: result.fun).x.tolist()
    return math.exp(e), math.exp(a + alpha * n0), math.exp(b + beta * d0), alpha, beta


def bootstrap(runs, best, n, seed):
    """Return (n, 5): coefficients fitted to runs drawn with replacement."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(runs.N), size=len(runs.N)) for _ in range(n)]
    return np.array([fit(Runs(*(column[i] for column in runs)), best) for i in draws])


def best_size(coefficients, C):
    """Return the N and D of the least loss for C = 6 N D FLOPs."""
    _, A, B, alpha, beta = coefficients
    N = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))
    return N, C / 6 / N


def valley(N, loss):
    """Return N and loss at the bottom of one budget's parabola in log N: approach 2.

    None if that point lies outside the sizes that were tried.
    """
    c2, c1, c0 = np.polyfit(np.log(N), loss, 2) if len(N) > 2 else (0, 0, 0)
    if c2 <= 0 or not np.log(N).min() < -c1 / (2 * c2) < np.log(N).max():
        return None
    return math.exp(-c1 / (2 * c2)), float(c0 - c1**2 / (4 * c2))


def read_table(path, leave_out=0):
    """Read the Runs of a CSV file, without the leave_out highest losses.

    COLUMNS lists the accepted names; without a column of tokens they are FLOPs / 6 N. Raises
    UserError for a missing column, or a line without a run.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as f:
            rows = list(csv.reader(f))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path} cannot be read as a CSV: {error}') from None
    header = rows[0] if rows else []
    known = [re.sub(r'\(.*\)|[^a-z]', '', name.lower()) for name in header]  # units in brackets
    place = {key: next((known.index(name) for name in names if name in known), None)
             for key, names in COLUMNS.items()}
    missing = [key for key in ('N', 'loss') if place[key] is None]
    missing += ['D or C'] * (place['D'] is None and place['C'] is None)
    if missing:
        raise UserError(f'{path}: no column {", ".join(missing)} among '
                        f'{", ".join(header) or "none"}; expected N (parameters), loss, and '
                        f'D (tokens) or C (FLOPs)')
    place = {key: i for key, i in place.items() if i is not None}
    runs = []
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        try:
            run = {key: float(row[i]) for key, i in place.items()}
        except (ValueError, IndexError):
            raise UserError(f'{path}, line {number}: {",".join(row)[:60]!r} has no number in each '
                            f'of the columns {", ".join(header[i] for i in place.values())}'
                            ) from None
        if not all(0 < value < math.inf for value in run.values()):
            raise UserError(f'{path}, line {number}: {run}; expected numbers above 0')
        runs.append((run['loss'], run['N'], run.get('D') or run['C'] / 6 / run['N']))
    kept = sorted(runs)[: max(0, len(runs) - leave_out)]
    if len(kept) < 10:
        raise UserError(f'{path}: {len(kept)} runs are left; five coefficients need at least 10')
    loss, N, D = np.array(kept).T
    return Runs(N, D, loss)
