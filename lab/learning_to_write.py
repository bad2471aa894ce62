"""
Watch a model learn to write: letters, words, then lines.

    $ python data/shakespeare_char/prepare.py   # or --input=FILE without a network
    $ python -m lab.learning_to_write           # 3 minutes on two cores
    $ python sample.py --out_dir=out-lab/learning_to_write --which=40   # its model of step 40

Runs train.py with config/shakespeare_cpu.py, --sample_every=10 and --keep_every=20. The same random
numbers draw each sample, so the samples differ by the weights alone. out-lab/learning_to_write.txt
has them at chosen steps. Then 20 samples are drawn from each numbered checkpoint, and counted:

    words      share of the words of three letters or more that the training text contains
    lines      share of the whole lines of three words or more in which it contains every word
    speeches   share of the paragraphs that begin with a speaker, a line such as "ROMEO:"

The interval is 1.96 standard errors of the mean over the samples. A word is a run of letters and
apostrophes in lower case, so a name is a word. The val text is counted alike, and so is the
training text in the order of its characters alone, which is the level of chance.

Needs '.[lab]'.
"""

import math
import os
import re
import shlex
import subprocess
import sys
from typing import Annotated

import numpy as np

import tokenizer
from bench.common import table
from configurator import Count, Range, Seed, UserError, override
from data import datasets
from data import tokens as data
from flatgpt import jsonl, outdir, pretrained, runtime
from flatgpt.generate import generate_texts
from flatgpt.sampling import Sampling
from lab import common

# Settings -----------------------------------------------------------------------------------------
dataset = 'shakespeare_char'  # plays, of characters or bytes: a folder under data/
max_iters: Count = 650  # steps of training
keep_every: Count = 20  # steps between the checkpoints that are counted, 6 MB each
n_samples: Annotated[int, Range(least=2)] = 20  # samples of each checkpoint
length: Annotated[int, Range(least=100)] = 500  # characters of a sample
settings = ''  # more settings of train.py, such as '--n_embd=32 --dtype=float32'
seed: Seed = 1337  # of weights, batches and samples
out = 'out-lab'  # folder of the picture and the numbers; the run is in its learning_to_write
config = override(globals())
# --------------------------------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORD, SPEAKER = re.compile(r"[a-z']+"), re.compile(r"[A-Z][A-Za-z' ]*:")
MEASURES = {'words': common.BLUE, 'lines': common.GREEN, 'speeches': common.ORANGE}
SHOWN = 7  # samples on the picture and the page


def words_of(text):
    """Return the words of a text, in lower case."""
    return WORD.findall(text.lower())


def count(text, known):
    """Count a text by the rules above; -> {measure: share, or NaN without a case}.

    known: the words of the training text. The first and the last word, line and paragraph do not
    count, since the text may have cut them off.
    """
    lines, paragraphs = text.split('\n')[1:-1], re.split(r'\n\s*\n', text)[1:-1]
    long_words = [word for word in words_of(text)[1:-1] if len(word) >= 3]
    line_words = [words for words in map(words_of, lines) if len(words) >= 3]
    cases = {'words': [word in known for word in long_words],
             'lines': [known.issuperset(words) for words in line_words],
             'speeches': [bool(SPEAKER.fullmatch(paragraph.lstrip('\n').split('\n')[0]))
                          for paragraph in paragraphs]}
    return {name: sum(of) / len(of) if of else math.nan for name, of in cases.items()}


def mean_of(counts):
    """Return {measure: (mean, half of its 95% interval)} of count()'s results."""
    means = {}
    for name in MEASURES:
        values = np.array([each[name] for each in counts])
        values = values[~np.isnan(values)]
        enough = len(values) > 1
        spread = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if enough else math.nan
        means[name] = (float(values.mean()), float(spread)) if enough else (math.nan, math.nan)
    return means


def open_texts():
    """Return the dataset's train and val text. Raises UserError without characters."""
    folder = datasets.folder_of(dataset)
    datasets.prepare_if_missing(folder, is_first=True)
    meta = datasets.load_meta(folder)
    if (meta['tokenizer'] or {}).get('kind') not in ('char', 'byte'):
        raise UserError(f'dataset={dataset!r}: expected one of characters or bytes, such as '
                        f'shakespeare_char')
    text_tokenizer = tokenizer.from_dict(meta['tokenizer'])
    return [text_tokenizer.decode(np.asarray(data.open_tokens(folder, split, meta, 64)).tolist())
            for split in ('train', 'val')]


def train(run_dir):
    """Run train.py; an earlier run's files move aside. Raises UserError if it fails."""
    command = [sys.executable, os.path.join(ROOT, 'train.py'),
               os.path.join(ROOT, 'config', 'shakespeare_cpu.py'), f'--out_dir={run_dir}',
               f'--dataset={dataset}', f'--max_iters={max_iters}', f'--seed={seed}',
               '--eval_interval=50', '--eval_tokens=20_000', '--log_interval=10',
               '--sample_every=10', f'--sample_tokens={length}', f'--keep_every={keep_every}',
               *shlex.split(settings)]
    with open(os.path.join(out, 'learning_to_write.log'), 'w', encoding='utf-8') as log:
        print('running train.py; its output is in', log.name, flush=True)
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise UserError(f'train.py failed; its error is in {log.name}')


def samples_of(run_dir, step):
    """Return n_samples texts of the model of a step."""
    model, text_tokenizer, _, _ = pretrained.open_model('resume', run_dir, step)
    slide = max(1, model.config.block_size // 4)  # a quarter of the passes over the context
    sampling = Sampling(length, 0.8, top_k=200, num_samples=n_samples, seed=seed, slide=slide)
    *_, samples = generate_texts(model, text_tokenizer, ['\n'], sampling)
    return [sample.text for sample in samples]


def chosen(steps):
    """Return SHOWN of the steps, the first and the last among them, at even ratios."""
    first, last = (steps[1], steps[-1]) if len(steps) > 1 else (1, 1)
    wanted = [0, *(first * (last / first) ** (i / (SHOWN - 2)) for i in range(SHOWN - 1))]
    return sorted({min(steps, key=lambda step: abs(step - near)) for near in wanted})


def draw(log, by_step, levels, shown):
    """Draw losses and counts against steps, and the beginnings of samples.

    by_step: {step: mean_of()}; levels: of the val text and of chance; shown: {step: text}.
    """
    plt = common.pyplot()
    figure = plt.figure(figsize=(11, 7))
    loss, page, shares = figure.subplot_mosaic([['loss', 'page'], ['shares', 'page']],
                                               width_ratios=[6, 5]).values()
    for key, color, style in (('loss', common.BLUE, '-'), ('val_loss', common.BLACK, 'o')):
        points = [(line['step'], line[key]) for line in log if key in line and line['step']]
        loss.plot(*zip(*points, strict=True), style, color=color, markersize=4,
                  label={'loss': 'training', 'val_loss': 'val'}[key])
    loss.set(ylabel='loss, nats per character', title='The loss falls smoothly')
    loss.legend()
    steps = list(by_step)
    for name, color in MEASURES.items():
        mean, spread = np.array([by_step[step][name] for step in steps]).T
        shares.plot(steps, mean, color=color, label=name)
        shares.fill_between(steps, np.maximum(0, mean - spread), np.minimum(1, mean + spread),
                            color=color, alpha=0.2, lw=0)
        shares.axhline(levels['val text'][name], color=color, linestyle=':', lw=1)
    shares.set(ylim=(0, 1.03), xlabel='step', ylabel='share right (dotted: the val text)',
               title='The form comes first, then words, then lines')
    shares.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
    shares.legend(loc=(0.02, 0.5))
    for ax in (loss, shares):
        ax.set(xscale='log', xlim=(9, max(steps) * 1.05))
        ax.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
    page.axis('off')
    for i, (step, text) in enumerate(shown.items()):
        y = 1 - i / len(shown)
        lines = [line[:60] for line in text.strip('\n').split('\n') if line.strip()][:4]
        page.text(0, y, f'step {step}', weight='bold', va='top', transform=page.transAxes)
        page.text(0, y - 0.028, '\n'.join(lines).replace('$', r'\$'), family='monospace', size=8,
                  va='top', transform=page.transAxes)
    return figure


def main():
    common.start(out)
    run_dir = os.path.join(out, 'learning_to_write')
    train_text, val_text = open_texts()
    known = set(words_of(train_text))

    # train, with samples and numbered checkpoints
    train(run_dir)
    log, drawn = (list(jsonl.read_objects(os.path.join(run_dir, name)).values())
                  for name in outdir.LINES)

    # count the words, lines and speeches of each checkpoint
    runtime.use_cores()
    by_step = {step: mean_of([count(text, known) for text in samples_of(run_dir, step)])
               for step in outdir.kept_steps(run_dir) if step <= max_iters}
    parts = [val_text[i : i + length] for i in range(0, len(val_text) - length, length)]
    shuffled = np.array(list(train_text[: len(val_text)]))
    np.random.default_rng(seed).shuffle(shuffled)
    chance = ''.join(shuffled.tolist())
    levels = {'val text': mean_of([count(part, known) for part in parts]),
              'chance': mean_of([count(chance[i : i + length], known)
                                 for i in range(0, len(chance) - length, length)])}
    levels = {name: {key: mean for key, (mean, _) in of.items()} for name, of in levels.items()}

    # report
    shown = {line['step']: line['text'] for line in drawn}
    shown = {step: shown[step] for step in chosen(list(shown))}
    rows = [('step', *MEASURES)]
    for step in sorted({min(by_step, key=lambda kept: abs(kept - near)) for near in shown if near}):
        rows.append((step, *(f'{mean:.1%} +- {spread:.1%}'
                             for mean, spread in by_step[step].values())))
    rows += [(name, *(f'{level:.1%}' for level in of.values())) for name, of in levels.items()]
    print(table(rows), end='\n\n')
    page = ''.join(f'step {step}\n{"-" * 60}\n{text.strip(chr(10))}\n\n\n'
                   for step, text in shown.items())
    common.write(out, 'learning_to_write.txt', page.encode())
    common.save(draw(log, by_step, levels, shown), out, 'learning_to_write')
    common.record(out, 'learning_to_write', measured=by_step, levels=levels, n_samples=n_samples,
                  length=length, known_words=len(known))


if __name__ == '__main__':
    main()
