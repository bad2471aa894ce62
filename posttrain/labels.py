"""Read labelled texts, measure a classifier on them, and label new ones.

    {"text": "Lovely, go there.", "label": "good"}

    texts = read_labelled('train.jsonl', '', 0.1)   # Labelled: classes, items of train and val
    measures = report(probabilities, labels)        # accuracy and calibration with 95% intervals
    predict_file(classifier, 'in.jsonl', 'out.jsonl', world)
"""

import json
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from configurator import UserError, printable
from data.documents import read_records, text_hash
from flatgpt import jsonl, shares
from flatgpt.classify import encode_text
from posttrain.tasks.common import wilson

EXAMPLE = '{"text": "Lovely, go there.", "label": "good"}'
ADDED = ('predicted', 'probabilities')  # entries that predict_file() adds to a line
BINS = 15  # of confidences, as in Guo et al. 2017
RESAMPLES = 500
AT_ONCE = 16  # texts


# Reading ------------------------------------------------------------------------------------------

@dataclass
class Labelled:
    """Hold labelled texts: the classes, and {'train': [(text, class), ...], 'val': ...}."""

    classes: list[str]
    items: dict

    def digest(self):
        """Return a hash of the classes and of each text, its label and its split."""
        return tokenizers.digest({'classes': self.classes, **self.items})

    def encode(self, tokenizer, block_size):
        """Encode the texts, and print their numbers; -> {split: [(ids, class), ...]}."""
        encoded, n_cut = {split: [] for split in self.items}, 0
        for split, items in self.items.items():
            for text, label in items:
                ids, is_cut = encode_text(text, tokenizer, block_size)
                encoded[split].append((ids, label))
                n_cut += is_cut
        n_classes = len(self.classes)
        print(f'{len(encoded["train"]):,} texts to learn from, {len(encoded["val"]):,} held out, '
              f'in {n_classes} classes'
              + f'\n{n_cut:,} are longer than the context of {block_size} tokens and keep their '
                f'end' * (n_cut > 0))
        return encoded


def read_labelled(path, val_path, val_fraction):
    """Read a table of texts and labels; -> Labelled.

    The val split is val_path, or a share of `path` chosen by a hash of the text, so that copies of
    a text share a split. Classes are the labels of train, sorted. Raises UserError naming the line
    of a bad text or label, of a text in both files, and of a label that only val has; also for an
    empty split and for fewer than two classes.
    """
    rows = {'train': list(read_rows(path)), 'val': list(read_rows(val_path)) if val_path else []}
    if val_path:
        places = {text: where for where, text, _ in rows['train']}
        for where, text, _ in rows['val']:
            if text in places:
                raise UserError(f'{where} has the text of {places[text]}, {text[:40]!r}; expected '
                                f'texts that are not in {path}: remove one of the two')
    else:
        drawn = rows['train']
        rows = {'train': [row for row in drawn if text_hash(row[1]) >= val_fraction],
                'val': [row for row in drawn if text_hash(row[1]) < val_fraction]}
    if empty := [split for split in rows if not rows[split]]:
        raise UserError(f'{path}: {empty[0]} has no text; add texts, or set another '
                        f'--val_fraction than {val_fraction}')
    classes = sorted({label for _, _, label in rows['train']})
    if len(classes) < 2:
        raise UserError(f'{path}: all texts to learn from have the label {classes[0]!r}; expected '
                        f'two labels or more')
    for where, _, label in rows['val']:
        if label not in classes:
            known = ', '.join(classes[:10]) + ', ...' * (len(classes) > 10)
            raise UserError(f'{where} has the label {label!r}, which no text to learn from has; '
                            f'expected one of {known}')
    numbers = {label: number for number, label in enumerate(classes)}
    return Labelled(classes, {split: [(text, numbers[label]) for _, text, label in rows[split]]
                              for split in rows})


def read_rows(path):
    """Yield (where, text, label) of a table. Raises UserError."""
    for where, record in read_records(path):
        missing = [key for key in ('text', 'label') if record.get(key) is None]
        if missing:
            raise UserError(f'{where} has no {" and no ".join(missing)}, but {", ".join(record)}; '
                            f'expected {EXAMPLE}')
        if not isinstance(record['text'], str) or not record['text'].strip():
            shown = json.dumps(record['text'], default=str)[:40]
            raise UserError(f'{where} has {shown} as text; expected a text, such as {EXAMPLE}')
        yield where, record['text'], label_of(record['label'], where)


def label_of(label, where):
    """Return a label as text, 1 as '1'. Raises UserError for other kinds."""
    if isinstance(label, bool) or not isinstance(label, str | int) or label == '':
        raise UserError(f'{where} has {json.dumps(label, default=str)[:40]} as label; expected a '
                        f'text or a whole number, such as {EXAMPLE}')
    return str(label)


# Measures -----------------------------------------------------------------------------------------

def report(probabilities, labels):
    """Measure probabilities (n, K) of texts with labels (n,); -> {name: number}.

    The accuracy has Wilson's interval. balanced_accuracy is the mean of the classes' accuracies;
    majority the share of the most frequent class, the accuracy of a constant. ece: see
    calibration_error().
    """
    n, right = len(labels), probabilities.argmax(1) == labels
    low, high = wilson(int(right.sum()), n)
    of_classes = [right[labels == label].mean() for label in np.unique(labels)]
    ece, ece_low, ece_high, chance = calibration_error(probabilities.max(1), right)
    numbers = {'n': n, 'accuracy': right.mean(), 'low': low, 'high': high,
               'balanced_accuracy': np.mean(of_classes),
               'majority': np.bincount(labels).max() / n, 'ece': ece, 'ece_low': ece_low,
               'ece_high': ece_high, 'ece_of_calibrated': chance}
    return {name: round(float(value), 6) for name, value in numbers.items()}


def calibration_error(confidences, right, seed=0):
    """Return the expected calibration error, a 95% interval, and the error by chance.

    -> (error, low, high, chance). The error is the mean distance of confidence and accuracy over
    BINS equal bins of confidence ("On Calibration of Modern Neural Networks", Guo et al. 2017).
    Noise makes it larger than 0 for any sample: `chance` is the mean of a calibrated model with
    these confidences. Resampling adds noise once more. So low reflects the resamples at the error
    (the basic bootstrap), and high is their quantile less what the resampling added. In simulations
    the interval holds a true error of 0.03 or 0.1 in 92 to 98% of samples, one of 0 in 70 to 78%.
    """
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    n, rng = len(right), np.random.default_rng(seed)

    def error_of(rows, right):
        gaps = np.bincount(bins[rows], confidences[rows] - right[rows], BINS)
        return np.abs(gaps).sum() / n

    error = error_of(slice(None), right)
    resamples = [error_of(rng.integers(n, size=n), right) for _ in range(RESAMPLES)]
    calibrated = [error_of(slice(None), rng.random(n) < confidences) for _ in range(RESAMPLES)]
    above = np.quantile(resamples, 0.975)
    return (error, max(0.0, 2 * error - above), above - (np.mean(resamples) - error),
            np.mean(calibrated))


def describe(measures):
    """Return the measures of report() as text of two lines."""
    m = measures
    return (f'accuracy {m["accuracy"]:.1%} ({m["low"]:.1%} to {m["high"]:.1%})\n'
            f'  balanced {m["balanced_accuracy"]:.1%}, majority {m["majority"]:.1%}, calibration '
            f'error {m["ece"]:.3f} ({m["ece_low"]:.3f} to {m["ece_high"]:.3f})')


# Predictions --------------------------------------------------------------------------------------

def predict_file(classifier, path, out, world):
    """Label the lines of a file, {"text": ...}, in another; -> report() or None.

    A line of `out` has in addition "predicted" and "probabilities". Where every line has a "label",
    the predictions are measured. The same call continues after a kill, with any number of
    processes. Raises UserError with file and line.
    """
    lines = jsonl.read_objects(path)
    if not lines:
        raise UserError(f'{path} has no lines; expected lines such as {{"text": "Lovely."}}')
    for number, value in lines.items():
        where = f'{path}, line {number}'
        if not isinstance(value.get('text'), str):
            raise UserError(f'{where} has no text; expected a line such as {{"text": "Lovely."}}')
        if taken := [key for key in ADDED if key in value]:
            raise UserError(f'{where}: {taken[0]!r} is a key of the results; rename this one')
        try:
            classifier.encode(value['text'])
        except UserError as error:
            raise UserError(f'{where}: {error}') from None
    labels = labels_of(lines, path)
    weights = [tensor.flatten()[:8].tolist() for tensor in classifier.model.state_dict().values()]
    digest = tokenizers.digest({'weights': weights, 'classes': classifier.classes,
                                'tokenizer': classifier.tokenizer.to_dict(),
                                'lines': list(lines.items())})
    world.check_alike({'digest': digest})
    with jsonl.writing(out, world.is_main):
        with shares.together(world):  # the main process alone writes
            results = jsonl.Results(out, digest) if world.is_main else None
        done = world.from_main(dict(results.done) if results else None)
        waiting = sorted(set(lines) - set(done), key=lambda number: -len(lines[number]['text']))
        batches = [waiting[i : i + AT_ONCE] for i in range(0, len(waiting), AT_ONCE)]
        bar = tqdm(total=len(lines), initial=len(done), unit='text', leave=False,
                   dynamic_ncols=True, disable=None if world.is_main else True)
        for first in range(0, len(batches), world.size):  # a batch for each process
            numbers = next(iter(batches[first + world.rank :]), [])
            rows = classifier.probabilities([lines[number]['text'] for number in numbers])
            for part in shares.gather([list(zip(numbers, rows, strict=True))], world):
                for number, row in part:
                    done[number] = {'predicted': max(row, key=row.get), 'probabilities': row}
                    if results:
                        results.add(number, done[number])
                    bar.update()
        bar.close()
        with shares.together(world):
            if results:
                results.finish(lines)
    return labels and measure_lines(labels, lines, done, classifier.classes)


def labels_of(lines, path):
    """Return the labels of lines that all have one, else None. Raises UserError."""
    if not all('label' in value for value in lines.values()):
        return None
    return [label_of(value['label'], f'{path}, line {number}') for number, value in lines.items()]


def measure_lines(labels, lines, done, classes):
    """Return report() of the results `done` of lines, or None for labels of no class."""
    if unknown := sorted(set(labels) - set(classes)):
        known = printable(', '.join(classes[:10]))
        print(f'not measured: the label {unknown[0]!r} is none of {known}')
        return None
    rows = np.array([list(done[number]['probabilities'].values()) for number in lines])
    return report(rows, np.array([classes.index(label) for label in labels]))
