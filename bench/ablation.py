"""
The options of a recipe one by one, at a fixed budget and with several seeds:
what each brings in loss and in time.

    $ python -m bench.ablation --table=ablation.md    # all: an hour
    $ python -m bench.ablation --variants='no qk_norm,adamw' --seeds=1,2
    $ python -m bench.ablation --jobs=4          # each on cores of its own
    $ python -m bench.ablation --config_file=config/train_shakespeare_char.py

The base is the config file as it is, for `steps` steps; its preset should be
'modern', of which the first variants each take one thing away. Every variant
and seed is a run of train.py in a process of its own, evaluated once, at its
end, over the whole val split. Under one seed all variants see the same batches,
so differences are taken seed by seed; and the runs go seed by seed over all
variants, so that a machine that slows down does so for each of them.

Prints a Markdown table, the lowest loss first: val loss and its difference to
the base's, means over the seeds with their standard errors, and the time of a
step over the base's (medians of a run, without its first tenth). Then a JSON
line. A variant that fails, as one that diverges does, is shown as such.
Finished runs are kept in `out`, and starting again does what is missing.
"""

import json
import os
import queue
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed

from bench import common, plot
from configurator import explain_errors, override
from data.download import file_sha256
from flatgpt.files import lock_folder, replace_file

# settings ------------------------------------------------------------------------------------------------------------
config_file = 'config/shakespeare_cpu.py'  # the base
steps = 250  # of the base's tokens: one epoch of Shakespeare
seeds = '1,2,3'
variants = ''  # names, with commas between them; '': all. The base always runs
extra = ''  # flags for all runs, such as --device=cuda
jobs = 1  # runs at a time; on Linux each has its share of the cores to itself
out = 'out-ablation/runs.jsonl'  # the finished runs, one a line
table = ''  # a file that the table is also written to
config = override(globals())
# ---------------------------------------------------------------------------------------------------------------------

# AdamW at the rates, betas and decay that suit it, under the schedule of preset modern
ADAMW = ('--optimizer=adamw --learning_rate=3e-3 --min_lr=0 --beta1=0.9 --beta2=0.99 --weight_decay=0.1 '
         '--warmup_iters=20 --lr_schedule=wsd --decay_fraction=0.6')
VARIANTS = {
    'base': '',
    # one thing taken away
    'learned positions': '--pos=learned',
    'layernorm': '--norm=layernorm',
    'gelu': '--mlp=gelu',
    'relu2': '--mlp=relu2',
    'no qk_norm': '--qk_norm=False',
    'tied head': '--tie_embeddings=True',
    'no logit_softcap': '--logit_softcap=0',
    'adamw': ADAMW,
    'cosine decay': '--lr_schedule=cosine',
    # one thing added
    'zero_init': '--zero_init=True',
    'n_kv_head 2': '--n_kv_head=2',
    'window 32 SL': '--window=32 --window_pattern=SL',  # in half of the layers
    'residual_lambdas': '--residual_lambdas=True',
    'value_embeddings': '--value_embeddings=True',
    'dropout 0.1': '--dropout=0.1',
    'weight_decay 0.1': '--weight_decay=0.1',
    'average_decay 0.99': '--average_decay=0.99',
    'biases': '--bias=True',
    # other recipes as a whole: nanoGPT's, and Llama's architecture
    'preset gpt2': '--preset=gpt2 --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 --warmup_iters=20',
    'preset llama': f'--preset=llama {ADAMW}',
}


def read_runs(path):
    """
    -> the finished runs in a file, a list of dicts. Half a line at its end, from a run that was cut off, is removed.
    SystemExit for a line that is damaged otherwise.
    """
    if not os.path.exists(path):
        return []
    with open(path, 'rb') as f:
        content = f.read()
    whole = content[: content.rfind(b'\n') + 1]
    if whole != content:
        replace_file(path, whole)
    runs = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            run = json.loads(line)
            key_of(run), run['val_loss'] + run['ms']  # has what is needed of it
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f'{path}, line {number} is damaged ({type(error).__name__}: {error}): {line[:60]!r}. '
                             f'Remove that line, and its run is done again') from None
        runs.append(run)
    return runs


def key_of(run):
    """What makes two runs the same measurement; not the commit, of which each run keeps its own."""
    return run['config'], run['sha256'], run['flags'], run['steps'], run['seed']


def to_do(name, seed):
    """What will be known of a run before it starts."""
    flags = shlex.join([*shlex.split(VARIANTS[name]), *shlex.split(extra)])
    return {'config': config_file, 'sha256': config_hash, 'flags': flags, 'steps': steps, 'seed': seed}


def train(name, seed, folder):
    """Do a run -> what is kept of it. SystemExit if it fails."""
    run = {**to_do(name, seed), 'variant': name, 'commit': common.commit(), 'torch': common.torch_version()}
    out_dir = os.path.join(folder, f'{name}-{seed}'.replace(' ', '-'))
    common.run(common.train_command([
        config_file, *shlex.split(run['flags']), f'--seed={seed}', f'--max_iters={steps}', '--lr_decay_iters=None',
        f'--eval_interval={steps}', '--eval_first=False', '--eval_iters=1', '--log_interval=1', '--sample_tokens=0',
        f'--out_dir={out_dir}'], script=os.path.join(common.ROOT, 'train.py')), cwd=None, **threads)
    records, evaluations = plot.read_log(out_dir)
    if not evaluations or evaluations[-1]['step'] != steps:
        raise SystemExit(f'stopped after step {records[-1]["step"]} of {steps}')
    times = [record['ms'] for record in records]
    shutil.rmtree(out_dir)
    return {**run, 'val_loss': evaluations[-1]['val_loss'], 'ms': statistics.median(times[len(times) // 10 :]),
            'train_time': records[-1]['train_time']}


def core_of(cpu):
    """The first of the processors that share a core with this one, so that hyperthreads sort beside each other."""
    try:
        with open(f'/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list', encoding='utf-8') as f:
            return int(re.match(r'\d+', f.read())[0])
    except OSError:
        return cpu


def take_cores():
    """Keep this thread, and the runs it starts, which inherit that, on a share of the cores of its own."""
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, shares.get())


def mean_and_error(values):
    """-> (mean, its standard error or None if there is but one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


def with_error(mean, error, form):
    return form.format(mean) + ('' if error is None else f' ± {error:.4f}')


def markdown(rows):
    """Rows of cells, the first of them the header -> a Markdown table, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['| ' + ' | '.join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))) + ' |' for row in rows]
    rule = '|' + '|'.join('-' * (width + 1) + (':' if i else '-') for i, width in enumerate(widths)) + '|'
    return '\n'.join([lines[0], rule, *lines[1:]])


sys.excepthook = explain_errors
names = [name.strip() for name in variants.split(',')] if variants else list(VARIANTS)
for name in names:
    if name not in VARIANTS:
        raise SystemExit(f'variants={variants!r}: {name!r} is none of {", ".join(VARIANTS)}')
names = list(dict.fromkeys(['base', *names]))
try:
    seed_list = list(dict.fromkeys(int(seed) for seed in seeds.split(',')))
except ValueError:
    raise SystemExit(f'seeds={seeds!r}: expected whole numbers with commas between them, such as 1,2,3') from None
if steps < 1:
    raise SystemExit(f'steps={steps}: expected 1 or more')
cpus = sorted(os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count()),
              key=lambda cpu: (core_of(cpu), cpu))
if not 1 <= jobs <= len(cpus):
    raise SystemExit(f'jobs={jobs}: expected 1 to {len(cpus)}, the processors that may be used')
n_cpus = len(cpus) // jobs
shares = queue.SimpleQueue()
for i in range(jobs):
    shares.put(cpus[i * n_cpus : (i + 1) * n_cpus])
threads = {'OMP_NUM_THREADS': str(n_cpus)} if jobs > 1 else {}

if not os.path.isfile(config_file):
    raise SystemExit(f'config_file={config_file!r}: there is no such file here')
config_hash = file_sha256(config_file)[:16]
os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
lock_folder(os.path.dirname(out) or '.', 'measuring into')
done = {key_of(run): run for run in read_runs(out)}
wanted = [(name, seed) for seed in seed_list for name in names]
missing = [(name, seed) for name, seed in wanted if key_of(to_do(name, seed)) not in done]
if len(missing) < len(wanted):
    commits = sorted({done[key_of(to_do(*one))]['commit'] for one in wanted if one not in missing})
    print(f'{len(wanted) - len(missing)} of {len(wanted)} runs are in {out} already, done at commit '
          f'{", ".join(commits)}', file=sys.stderr)
with tempfile.TemporaryDirectory() as folder:
    pool = ThreadPoolExecutor(jobs, initializer=take_cores if jobs > 1 else None)
    try:
        futures = {pool.submit(train, name, seed, folder): (name, seed) for name, seed in missing}
        for number, future in enumerate(as_completed(futures), start=1):
            name, seed = futures[future]
            where = f'{name}, seed {seed} ({number} of {len(missing)})'
            try:
                run = future.result()
            except SystemExit as error:
                if name == 'base':  # nothing to compare with
                    raise
                print(f'{where} failed: {error}', file=sys.stderr)
                continue
            with open(out, 'a', encoding='utf-8') as f:
                f.write(json.dumps(run) + '\n')
            done[key_of(run)] = run
            print(f'{where}: val loss {run["val_loss"]:.4f}, {run["ms"]:.1f} ms a step', file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)

results = {name: [done.get(key_of(to_do(name, seed))) for seed in seed_list] for name in names}
base = results['base']
figures = {}
for name, runs in results.items():
    if None in runs:
        figures[name] = None
        continue
    loss, error = mean_and_error([run['val_loss'] for run in runs])
    difference, difference_error = mean_and_error([a['val_loss'] - b['val_loss']
                                                   for a, b in zip(runs, base, strict=True)])
    figures[name] = {'val_loss': loss, 'error': error, 'difference': difference, 'difference_error': difference_error,
                     'ms': statistics.mean(run['ms'] for run in runs),
                     'time': statistics.mean(a['ms'] / b['ms'] for a, b in zip(runs, base, strict=True))}
rows = [['variant', 'val loss', 'difference to base', 'time of a step']]
for name in sorted(names, key=lambda name: figures[name]['val_loss'] if figures[name] else float('inf')):
    f = figures[name]
    if f is None:
        rows.append([name, 'failed', '', ''])
        continue
    rows.append([name, with_error(f['val_loss'], f['error'], '{:.4f}'),
                 '' if name == 'base' else with_error(f['difference'], f['difference_error'], '{:+.4f}'),
                 f'{f["time"]:.2f}'])
text = markdown(rows)
print(common.heading('ablation') + f'{config_file}, {steps} steps, seeds {", ".join(map(str, seed_list))}\n')
print(text)
if table:
    replace_file(table, (text + '\n').encode())
rounded = {name: f and {key: value if value is None else round(value, 5) for key, value in f.items()}
           for name, f in figures.items()}
common.finish('ablation', len(seed_list), config=config_file, steps=steps, extra=extra, variants=rounded)
