"""Score texts by their words, for data.clean --quality and --toxic.

    python -m data.clean train-quality --good=books/ --bad=spam.jsonl \\
        --out=quality.json
    python -m data.clean --input=crawl/ --out=clean.jsonl --quality=quality.json \\
        --quality_min=0.5
    python -m data.clean train-quality --good=talks.jsonl --bad=toxic.jsonl \\
        --out=toxic.json
    python -m data.clean --input=crawl/ --out=clean.jsonl --toxic=toxic.json \\
        --toxic_max=0.5

A score is the probability that a text is from --good, of equally many good and
bad texts. Logistic regression on hashed words and pairs of words; of each class
the 20,000 texts with the smallest hashes. A tenth chooses the penalty of large
weights and scales the scores. Another tenth is held out to measure accuracy and calibration. The
model is a JSON file, checked when read.

In place of the file, FOLDER:LABEL names a classifier of posttrain.classify: its
score is the probability of the label, to keep with --quality and to drop with
--toxic. It reads word order, and costs a forward pass a document.
"""

import base64
import functools
import heapq
import json
import os
import time
from dataclasses import dataclass

import numpy as np

from configurator import UserError
from data.documents import find_files, read_documents, text_hash
from data.encode import make_parser, paths_of
from data.minhash import FACTORS, hash_words
from flatgpt import files

BITS = 18                 # 2^18 weights, 1 MB
MOST_WORDS = 1000         # of a text that count, from its start
MOST_TEXTS = 20_000       # of a class; training takes 24 bytes per word and pair, 1 GB or less
LEAST_TEXTS = 20          # of a class
PENALTIES = (1e-3, 1e-4, 1e-5, 1e-6)  # of the squared weights; the best one is taken
SCALES = [2**(i / 8) for i in range(-16, 25)]
STEPS = 60                # most steps of L-BFGS
BINS = 10                 # of scores, to measure calibration
MODEL_BYTES = 1 << 24     # most bytes of a model file
KEYS = {'version', 'kind', 'bits', 'bias', 'weights', 'training'}


def features(text: str, bits: int = BITS) -> np.ndarray:
    """Return the hashes of a text's words and pairs of words, each once, below 2^bits."""
    hashes = hash_words(text[:16 * MOST_WORDS])[:MOST_WORDS]
    shift = np.uint64(64 - bits)
    pairs = hashes[:-1] * FACTORS[1] + hashes[1:] * FACTORS[2]
    return np.unique(np.concatenate([hashes * FACTORS[0], pairs]) >> shift).astype(np.uint32)


@dataclass
class Classifier:
    """Hold a linear model: one weight per feature."""

    weights: np.ndarray  # (2^bits,) float32
    bias: float
    training: dict       # facts for people: files, counts, measures

    def score(self, text: str) -> float:
        """Return the probability that a text is good; 0.5 for a text without words."""
        indices = features(text, len(self.weights).bit_length() - 1)
        if not len(indices):
            return 0.5
        logit = self.weights[indices].sum(dtype=float) / np.sqrt(len(indices)) + self.bias
        return float(1 / (1 + np.exp(-np.clip(logit, -50, 50))))


# Training ---------------------------------------------------------------------------------------

def sample(paths, text_key) -> list[np.ndarray]:
    """Return the features of the MOST_TEXTS different texts with the smallest hashes.

    So the choice depends neither on the order of the texts nor on their copies.
    """
    chosen, known = [], set()
    for text in read_documents(paths, text_key):
        key = text_hash(text)
        if key in known or len(chosen) == MOST_TEXTS and -key < chosen[0][0]:
            continue
        known.add(key)
        # the heap's first has the largest hash; hashes differ, so arrays are not compared
        entry = (-key, features(text))
        if len(chosen) < MOST_TEXTS:
            heapq.heappush(chosen, entry)
        else:
            known.remove(-heapq.heappushpop(chosen, entry)[0])
    return [indices for _, indices in sorted(chosen, key=lambda entry: entry[0])
            if len(indices)]


class Rows:
    """Hold texts as rows of a sparse matrix; a row's values are 1 / sqrt(features)."""

    def __init__(self, rows):
        self.indices = np.concatenate(rows).astype(np.int64)
        self.starts = np.cumsum([0] + [len(row) for row in rows[:-1]])
        self.scales = 1 / np.sqrt([len(row) for row in rows])
        self.lengths = [len(row) for row in rows]

    def logits(self, weights, bias) -> np.ndarray:
        return np.add.reduceat(weights[self.indices], self.starts) * self.scales + bias

    def gradient(self, errors) -> np.ndarray:
        """Return the gradient of the weights for those of the logits."""
        return np.bincount(self.indices, np.repeat(errors * self.scales, self.lengths), 1 << BITS)


def fit(rows: Rows, labels: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Fit logistic regression; -> (weights, bias). Both classes weigh the same."""
    import torch  # 2 s that other steps need not wait
    shares = shares_of(labels)
    parameters = torch.zeros((1 << BITS) + 1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([parameters], max_iter=STEPS, history_size=10,
                                  line_search_fn='strong_wolfe')

    def closure():
        weights, bias = parameters.numpy()[:-1], parameters[-1].item()
        logits = rows.logits(weights, bias)
        errors = shares * (sigmoid(logits) - labels)
        parameters.grad = torch.from_numpy(np.append(
            rows.gradient(errors) + penalty * weights, errors.sum()))
        return torch.tensor(log_loss(logits, labels) + penalty / 2 * np.square(weights).sum())

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums is that of any machine
    try:
        optimizer.step(closure)
    finally:
        torch.set_num_threads(n_threads)
    return parameters[:-1].numpy().astype(np.float32), parameters[-1].item()


def shares_of(labels) -> np.ndarray:
    """Return the weight of each text, so that both classes weigh half."""
    return np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())


def log_loss(logits, labels) -> float:
    return (shares_of(labels) * np.logaddexp(0, np.where(labels, -logits, logits))).sum()


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.clip(logits, -50, 50)))


def measure(scores: np.ndarray, labels: np.ndarray) -> dict:
    """Return the accuracy and the calibration of scores; both classes weigh the same.

    calibration error: the mean distance, over the texts, between the score of a bin and its share
    of good texts.
    """
    shares = shares_of(labels)
    bins, table = np.minimum((scores * BINS).astype(int), BINS - 1), []
    for number in range(BINS):
        inside = bins == number
        if total := shares[inside].sum():
            table.append({'score': float(shares[inside] @ scores[inside] / total),
                          'good': float(shares[inside] @ labels[inside] / total),
                          'share': float(total)})
    error = sum(entry['share'] * abs(entry['score'] - entry['good']) for entry in table)
    return {'accuracy': float(shares @ ((scores >= 0.5) == labels)),
            'calibration error': error, 'bins': table}


def train(good, bad, text_key: str = 'text') -> Classifier:
    """Train on texts of two lists of paths. Raises UserError for too few texts."""
    classes = [sample(paths, text_key) for paths in (bad, good)]
    for option, paths, rows in zip(('bad', 'good'), (bad, good), classes, strict=True):
        if len(rows) < LEAST_TEXTS:
            raise UserError(f'--{option}={",".join(map(str, paths))} has {len(rows)} different '
                            f'texts with words; expected {LEAST_TEXTS} or more, better thousands')
    rows = [row for texts in classes for row in texts]
    labels = np.repeat([False, True], [len(texts) for texts in classes])
    # sample() sorts by hash, so the choice of these texts is fixed
    places = np.concatenate([np.arange(len(texts)) % 10 for texts in classes])
    parts = {name: (Rows([row for row, chosen in zip(rows, mask, strict=True) if chosen]),
                    labels[mask])
             for name, mask in (('train', places > 1), ('tune', places == 1),
                                ('test', places == 0))}
    fits = [fit(*parts['train'], penalty) for penalty in PENALTIES]
    # a penalty makes scores too timid; a factor makes them probabilities again
    tune, tune_labels = parts['tune']
    _, factor, best = min(
        (log_loss(factor * tune.logits(*fitted), tune_labels), factor, number)
        for number, fitted in enumerate(fits) for factor in SCALES)
    weights, bias = (factor * values for values in fits[best])
    scores = sigmoid(parts['test'][0].logits(weights, bias))
    training = {name: {'files': [os.path.basename(os.path.abspath(path)) for path in paths],
                       'texts': len(texts)}
                for name, paths, texts in (('good', good, classes[1]), ('bad', bad, classes[0]))}
    return Classifier(weights, bias, {**training, 'held out': {
        'texts': len(scores), **measure(scores, parts['test'][1])}})


# Files ------------------------------------------------------------------------------------------

def save_model(model: Classifier, out):
    """Write a model as JSON, whole or not at all."""
    content = {'version': 1, 'kind': 'hashed words and pairs', 'bits': BITS, 'bias': model.bias,
               'training': model.training,
               'weights': base64.b64encode(model.weights.astype('<f4').tobytes()).decode()}
    files.replace_file(out, json.dumps(content, indent=1).encode())


def load_model(path) -> Classifier:
    """Read a model. Raises UserError for anything else."""
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist; make it: python -m data.clean train-quality '
                        f'--good=FILES --bad=FILES --out={path}')
    remedy = 'expected a file of: python -m data.clean train-quality'
    if os.path.getsize(path) > MODEL_BYTES:
        raise UserError(f'{path} has more than {MODEL_BYTES:,} bytes; {remedy}')
    try:
        with open(path, 'rb') as file:
            content = json.loads(file.read(MODEL_BYTES + 1))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not JSON ({str(error)[:80]}); {remedy}') from None
    if not isinstance(content, dict) or set(content) != KEYS or content['version'] != 1:
        raise UserError(f'{path} is not a model of version 1; {remedy}')
    bits, bias, weights = (content[key] for key in ('bits', 'bias', 'weights'))
    if type(bits) is not int or not 1 <= bits <= 20:
        raise UserError(f'{path} has {str(bits)[:20]!r} as bits; expected 1 to 20')
    try:
        weights = np.frombuffer(base64.b64decode(weights, validate=True), '<f4')
    except (TypeError, ValueError) as error:
        raise UserError(f'{path} has damaged weights: {str(error)[:80]}; {remedy}') from None
    if len(weights) != 1 << bits:
        raise UserError(f'{path} has {len(weights):,} weights; expected {1 << bits:,}')
    if type(bias) not in (int, float) or not np.isfinite(weights).all() or not abs(bias) < 1e6:
        raise UserError(f'{path} has weights that are not finite numbers; {remedy}')
    return Classifier(weights, float(bias), content['training'])


@functools.cache
def open_scorer(name, of_good=True):
    """Return the function text -> score of a model; a process opens it once.

    name: FILE, whose score is the probability of good, or of bad without of_good; or FOLDER:LABEL,
    whose score is that of the label. Raises UserError.
    """
    folder = name.rpartition(':')[0]
    if os.path.isdir(name):
        raise UserError(f'{name} is a folder; expected {name}:LABEL, of posttrain.classify, or a '
                        f'file of: python -m data.clean train-quality')
    if not os.path.isdir(folder):
        score = load_model(name).score
        return score if of_good else lambda text: 1 - score(text)
    import torch  # 2 s that other steps need not wait

    from flatgpt import classify
    torch.set_num_threads(1)  # each worker has a core
    model, label = classify.load_label(name)
    return lambda text: model.probabilities([text])[0][label]


# Scores of a run --------------------------------------------------------------------------------

class Scores:
    """Count scores in steps of 0.001, for their quantiles."""

    def __init__(self):
        self.counts = np.zeros(1001, dtype=np.int64)

    def add(self, score: float):
        self.counts[round(1000 * score)] += 1

    def quantiles(self) -> dict[str, float]:
        """Return the least scores that 1, 5, ... 99% of the texts do not exceed."""
        sums = np.cumsum(self.counts)
        return {f'{percent}%': int(np.searchsorted(sums, percent / 100 * sums[-1])) / 1000
                for percent in (1, 5, 10, 25, 50, 75, 90, 95, 99)} if sums[-1] else {}


def main(arguments):
    """Run the command train-quality."""
    parser = make_parser(__doc__)
    parser.prog = 'python -m data.clean train-quality'
    add = parser.add_argument
    add('--good', required=True, type=paths_of, help='texts to keep: files and folders, commas')
    add('--bad', required=True, type=paths_of, help='texts to drop: files and folders, commas')
    add('--out', required=True, help='the .json file to write')
    add('--text_key', default='text', help='field of a table that holds the text')
    args = parser.parse_args(arguments)

    started = time.time()
    if not args.out.endswith('.json'):
        raise UserError(f'--out={args.out}: expected a name that ends in .json, such as '
                        f'--out=quality.json')
    for path in (*args.good, *args.bad):
        find_files(path, args.text_key)
    model = train(args.good, args.bad, args.text_key)
    save_model(model, args.out)
    measures = model.training['held out']
    for name in ('good', 'bad'):
        print(f'{name:9} {model.training[name]["texts"]:>10,} different texts')
    print(f'held out  {measures["texts"]:>10,} of them: accuracy {measures["accuracy"]:.2%}, '
          f'calibration error {measures["calibration error"]:.3f}')
    for entry in measures['bins']:
        print(f'    score {entry["score"]:.2f}: {entry["good"]:>7.1%} good, in '
              f'{entry["share"]:.1%} of the texts')
    print(f'wrote  {args.out} in {time.time() - started:.1f} s')
    print(f'next:  python -m data.clean --quality={args.out} --input=FILE --out=clean.jsonl')
