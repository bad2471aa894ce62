"""
Measure a recipe's options one by one, at a fixed budget and with several seeds.

    $ python -m bench.ablation --table=ablation.md    # all: an hour
    $ python -m bench.ablation --variants='no qk_norm,adamw' --seeds=1,2
    $ python -m bench.ablation --config_file=config/train_shakespeare_char.py

The base is the config file for `steps` steps; its preset should be 'modern',
since the first variants take one thing away from it. Each variant and seed is a
run of train.py in its own process, evaluated once, at its end, on the whole val
split. All variants of a seed read the same batches, so differences are taken
seed by seed. The runs go seed by seed over all variants, so that a machine that
slows down affects all of them.

Prints a Markdown table, the lowest loss first: the val loss and its difference
to the base, means over the seeds with standard errors; and the time of a step
over the base's (medians of a run, without its first tenth). Then a JSON line. A
variant that fails, for example by diverging, is listed as failed. Finished runs
are kept in `out`; the next start runs only what is missing.
"""

import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile

from bench import common
from configurator import Count, UserError, override
from data.download import file_sha256
from flatgpt import jsonl, logs
from flatgpt.files import lock_folder, replace_file

# Settings -----------------------------------------------------------------------------------------
config_file = 'config/shakespeare_cpu.py'  # the base
steps: Count = 250  # with the base's batch: one epoch of Shakespeare
seeds = '1,2,3'
variants = ''  # names, separated by commas; '': all. The base always runs
extra = ''  # flags for all runs, such as --device=cuda
out = 'out-ablation/runs.jsonl'  # the finished runs
table = ''  # a file that the table is also written to
config = override(globals())
# --------------------------------------------------------------------------------------------------

# AdamW at the rates, betas and decay that suit it, under the schedule of preset modern
ADAMW = ('--optimizer=adamw --learning_rate=3e-3 --min_lr=0 --beta1=0.9 --beta2=0.99 '
         '--weight_decay=0.1 --warmup_iters=20 --lr_schedule=wsd --decay_fraction=0.6')
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
    'value_gates': '--value_embeddings=True --value_gates=True',
    'head_gates': '--head_gates=True',
    'cautious_decay 0.1': '--weight_decay=0.1 --cautious_decay=True',
    'split decay': '--decay_fraction=0.4 --muon_decay_fraction=0.8',
    # 1/2, 1, 3/2 of the base's batch: its tokens in its steps; at its batch, its rates
    'batch_stages 3': '--batch_stages=3 --total_batch_size=6144 --learning_rate=0.0049 '
                      '--muon_lr=0.0245 --embedding_lr=0.0245',
    'dropout 0.1': '--dropout=0.1',
    'weight_decay 0.1': '--weight_decay=0.1',
    'biases': '--bias=True',
    # other recipes as a whole: nanoGPT's, and Llama's architecture
    'preset gpt2': '--preset=gpt2 --learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 '
                   '--warmup_iters=20',
    'preset llama': f'--preset=llama {ADAMW}',
}
KEPT = {'config', 'sha256', 'flags', 'steps', 'seed', 'val_loss', 'ms', 'commit'}  # of a run


def read_runs(path):
    """Return the finished runs of a file. Raises UserError for a damaged line."""
    if not os.path.exists(path):
        return []
    common.cut_half_line(path)
    runs = jsonl.read_objects(path)
    for number, run in runs.items():
        lacking = sorted(KEPT - run.keys())
        if lacking:
            raise UserError(f'{path}, line {number} lacks {", ".join(lacking)}; remove the line to '
                            f'repeat its run')
    return list(runs.values())


def key_of(run):
    """Return what makes two runs the same measurement; each run keeps its own commit."""
    return run['config'], run['sha256'], run['flags'], run['steps'], run['seed']


def describe(name, seed):
    """Return what a run is known by before it starts."""
    flags = shlex.join([*shlex.split(VARIANTS[name]), *shlex.split(extra)])
    return {'config': config_file, 'sha256': file_sha256(config_file)[:16], 'flags': flags,
            'steps': steps, 'seed': seed}


def train(name, seed, folder):
    """Run a variant; return its record. Raises UserError if it fails."""
    run = {**describe(name, seed), 'variant': name, 'commit': common.commit(),
           'torch': common.torch_version()}
    out_dir = os.path.join(folder, f'{name}-{seed}'.replace(' ', '-'))
    common.run(common.train_command([
        config_file, *shlex.split(run['flags']), f'--seed={seed}', f'--max_iters={steps}',
        '--lr_decay_iters=None', f'--eval_interval={steps}', '--eval_first=False',
        '--eval_iters=1', '--log_interval=1', '--sample_tokens=0', f'--out_dir={out_dir}'],
        script=os.path.join(common.ROOT, 'train.py')), cwd=None)
    records, evaluations = logs.read_log(out_dir)
    if not evaluations or evaluations[-1]['step'] != steps:
        raise UserError(f'stopped after step {records[-1]["step"]} of {steps}')
    times = [record['ms'] for record in records]
    shutil.rmtree(out_dir)
    return {**run, 'val_loss': evaluations[-1]['val_loss'],
            'ms': statistics.median(times[len(times) // 10 :]),
            'train_time': records[-1]['train_time']}


def mean_and_error(values):
    """Return the mean and its standard error, None for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


def with_error(mean, error, form):
    return form.format(mean) + ('' if error is None else f' ± {error:.4f}')


def markdown(rows):
    """Return rows of cells as a Markdown table, the header first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['| ' + ' | '.join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width)
                               in enumerate(zip(row, widths, strict=True))) + ' |' for row in rows]
    rule = '|'.join('-' * (width + 1) + (':' if i else '-') for i, width in enumerate(widths))
    return '\n'.join([lines[0], f'|{rule}|', *lines[1:]])


def figures_of(runs, base):
    """Compare a variant's runs with the base's, seed by seed; None if one failed."""
    if None in runs:
        return None
    pairs = list(zip(runs, base, strict=True))
    loss, error = mean_and_error([run['val_loss'] for run in runs])
    difference, difference_error = mean_and_error([a['val_loss'] - b['val_loss'] for a, b in pairs])
    return {'val_loss': loss, 'error': error, 'difference': difference,
            'difference_error': difference_error,
            'ms': statistics.mean(run['ms'] for run in runs),
            'time': statistics.mean(a['ms'] / b['ms'] for a, b in pairs)}


def main():
    # read the settings
    names = [name.strip() for name in variants.split(',')] if variants else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f'variants={variants!r}: {name!r} is none of {", ".join(VARIANTS)}')
    names = list(dict.fromkeys(['base', *names]))
    try:
        seed_list = list(dict.fromkeys(int(seed) for seed in seeds.split(',')))
    except ValueError:
        raise UserError(f'seeds={seeds!r}: expected whole numbers with commas between them, '
                        f'such as 1,2,3') from None
    if not os.path.isfile(config_file):
        raise UserError(f'config_file={config_file!r}: there is no such file here')

    # run what is missing
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    lock_folder(os.path.dirname(out) or '.', 'measuring into')
    done = {key_of(run): run for run in read_runs(out)}
    wanted = {(name, seed): key_of(describe(name, seed)) for seed in seed_list for name in names}
    missing = [pair for pair, key in wanted.items() if key not in done]
    if len(missing) < len(wanted):
        commits = sorted({done[key]['commit'] for key in wanted.values() if key in done})
        print(f'{len(wanted) - len(missing)} of {len(wanted)} runs are in {out} already, done at '
              f'commit {", ".join(commits)}', file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, seed) in enumerate(missing, start=1):
            where = f'{name}, seed {seed} ({number} of {len(missing)})'
            try:
                run = train(name, seed, folder)
            except UserError as error:
                if name == 'base':  # nothing to compare with
                    raise
                print(f'{where} failed: {error}', file=sys.stderr)
                continue
            with open(out, 'a', encoding='utf-8') as f:
                f.write(json.dumps(run) + '\n')
            done[key_of(run)] = run
            print(f'{where}: val loss {run["val_loss"]:.4f}, {run["ms"]:.1f} ms a step',
                  file=sys.stderr)

    # report
    results = {name: [done.get(wanted[name, seed]) for seed in seed_list] for name in names}
    figures = {name: figures_of(runs, results['base']) for name, runs in results.items()}
    rows = [['variant', 'val loss', 'difference to base', 'time of a step']]
    for name in sorted(names, key=lambda name: figures[name]['val_loss'] if figures[name] else 1e9):
        f = figures[name]
        if f is None:
            rows.append([name, 'failed', '', ''])
            continue
        difference = with_error(f['difference'], f['difference_error'], '{:+.4f}')
        rows.append([name, with_error(f['val_loss'], f['error'], '{:.4f}'),
                     '' if name == 'base' else difference, f'{f["time"]:.2f}'])
    text = markdown(rows)
    print(common.heading('ablation')
          + f'{config_file}, {steps} steps, seeds {", ".join(map(str, seed_list))}\n\n{text}')
    if table:
        replace_file(table, (text + '\n').encode())
    rounded = {name: f and {key: value and round(value, 5) for key, value in f.items()}
               for name, f in figures.items()}
    common.finish('ablation', len(seed_list), config=config_file, steps=steps, extra=extra,
                  variants=rounded)


if __name__ == '__main__':
    main()
