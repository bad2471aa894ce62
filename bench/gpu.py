"""
Measure on a GPU what the other scripts of bench/gpu.sh do not.

    $ python -m bench.gpu speed --limit=300    # tokens/s and MFU, 124M, 350M and 1.5B
    $ python -m bench.gpu char --limit=60      # time to val 1.4697 on shakespeare_char
    $ python -m bench.gpu recipe --limit=200   # tokens to a loss, 124M: GPT-2's recipe and ours
    $ python -m bench.gpu summary              # out-gpu/*.json as one file

Each part prints a table and, as its last line, its figures as one JSON object. A
part that runs out of time keeps what it has. --limit is in seconds. --dry runs
tiny sizes on the CPU, as a check that everything runs.
"""

import json
import os
import subprocess
import sys
import time

from bench import bare, common
from configurator import UserError, explain_errors
from data.encode import make_parser
from flatgpt import logs, runtime
from flatgpt.files import replace_file
from model import GPT, GPTConfig

STARTED = time.perf_counter()
TARGET = 1.4697  # nanoGPT's best val loss at the size of config/train_shakespeare_char.py

# layers, heads, channels, and the first micro-batch to try, which is halved until it fits
SIZES = {'124M': (12, 12, 768, 64), '350M': (24, 16, 1024, 32), '1.5B': (48, 25, 1600, 16),
         'dry': (2, 2, 64, 4)}
SPEEDS = [('124M', 'gpt2'), ('124M', 'modern'), ('350M', 'modern'), ('1.5B', 'modern'),
          ('350M', 'gpt2'), ('1.5B', 'gpt2')]  # as many as there is time for
RECIPES = {'gpt2': 'config/gpt2_classic.py', 'modern': 'config/train_gpt2.py'}
STEP_TOKENS = 65536  # of a step in both recipes
STARTING = 40  # seconds of a run for importing, compiling and evaluating


def seconds_left(limit):
    return limit - (time.perf_counter() - STARTED)


# speed --------------------------------------------------------------------------------------------


def fitting(size, preset, args):
    """Return the figures of the largest micro-batch that fits, or None."""
    n_layer, n_head, n_embd, batch_size = SIZES[size]
    while batch_size:
        s = bare.settings(preset, args.device, compile=False if args.dry else 'auto',
                          n_layer=n_layer, n_head=n_head, n_embd=n_embd, batch_size=batch_size,
                          block_size=64 if args.dry else 1024)
        print(f'{size} {preset}: {batch_size} sequences', file=sys.stderr)
        figures = bare.in_own_process(s, max(1.0, seconds_left(args.limit)),
                                      seconds=0.5 if args.dry else 3.0, product_seconds=0.1)
        if figures is not None:
            return {'model': size, 'preset': preset, 'batch_size': batch_size, **figures}
        batch_size //= 2
    return None


def speed(args):
    """Measure tokens/s and MFU of the bare step, one model after the other."""
    results = []
    rows = [['model', 'preset', 'batch', 'ms a step', 'tokens/s', 'MFU', 'of products', 'optimizer',
             'GB']]
    for size, preset in [('dry', 'gpt2'), ('dry', 'modern')] if args.dry else SPEEDS:
        failure = {'model': size, 'preset': preset, 'error': 'out of memory'}
        try:
            f = fitting(size, preset, args) or failure
        except subprocess.TimeoutExpired:
            print(f'{size} {preset} and what follows: no time left', file=sys.stderr)
            break
        except UserError as error:
            f = {**failure, 'error': str(error)}
        results.append(f)
        rows.append([size, preset, *([f['error'][:13], *'-----'] if 'error' in f else [
            f['batch_size'], f'{f["ms"]["median"]:,.1f}', f'{f["tokens_per_s"]:,}',
            '-' if f['mfu'] is None else f'{f["mfu"]:.1%}', f'{f["share_of_products"]:.0%}',
            f'{f["optimizer_share"]:.1%}', f'{(f["peak_memory_mb"] or 0) / 1024:.1f}'])])
        # printed after each model, because the time may end during the next one
        common.finish('speed', 1, device=args.device, results=results)
    print(common.heading('speed'))
    print(common.table(rows))
    common.finish('speed', 1, device=args.device, results=results)
    return sum('error' in f for f in results)


# training -----------------------------------------------------------------------------------------


def train(arguments, folder, seconds):
    """Run train.py for at most `seconds`; return records, evaluations, wall time."""
    t0 = time.perf_counter()
    command = common.train_command([*arguments, f'--out_dir={folder}'])
    print(' '.join(command), flush=True)
    try:
        code = subprocess.run(command, cwd=common.ROOT, env=common.environment(),
                              timeout=max(1.0, seconds)).returncode
        if code:
            raise UserError(f'train.py failed with exit status {code}; its error is above')
    except subprocess.TimeoutExpired:
        print(f'stopped after {seconds:.0f} s')
    return *logs.read_log(folder), time.perf_counter() - t0


def first_below(evaluations, target):
    """Return the first evaluation with a val loss of at most `target`, or None."""
    return next((e for e in evaluations if e['val_loss'] <= target), None)


def crossing(evaluations, target):
    """Return the interpolated step at which the val loss reaches `target`, or None."""
    before = None
    for e in evaluations:
        if e['val_loss'] <= target:
            if before is None:
                return float(e['step'])
            share = (before['val_loss'] - target) / (before['val_loss'] - e['val_loss'])
            return before['step'] + share * (e['step'] - before['step'])
        before = e
    return None


def on_device(args):
    return ['--device=cpu', '--compile=False'] if args.dry else []


def char(args):
    """Measure the time to nanoGPT's best val loss on shakespeare_char."""
    data = os.path.join(common.ROOT, 'data', 'shakespeare_char')
    if not os.path.exists(os.path.join(data, 'train.bin')):
        if not args.shakespeare:
            print('skipped: data/shakespeare_char is not prepared; SHAKESPEARE=FILE is its text')
            common.finish('char', 0, skipped='data/shakespeare_char is not prepared')
            return 0
        common.run([sys.executable, os.path.join(data, 'prepare.py'),
                    f'--input={os.path.abspath(args.shakespeare)}'])
    arguments = ['config/train_shakespeare_char.py', '--eval_interval=50', '--eval_iters=1',
                 *args.flags.split(), *on_device(args)]
    if args.dry:
        arguments += ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64',
                      '--max_iters=50', '--eval_interval=25']
    steps, evaluations, wall = train(arguments, os.path.join(args.out, 'run-char'),
                                     seconds_left(args.limit) - 5)
    if not evaluations:
        raise UserError(f'no evaluation within {args.limit:.0f} s; use more time: BUDGET, '
                        f'PARTS=char')
    reached, best = first_below(evaluations, TARGET), min(evaluations, key=lambda e: e['val_loss'])
    shown = [f'{reached["train_time"]:.1f}', reached['step']] if reached else ['not reached', '-']
    print(common.heading('char'))
    print(common.table([
        ['shakespeare_char', 's of training', 'steps'], [f'val {TARGET}', *shown],
        [f'best val, {best["val_loss"]:.4f}', f'{best["train_time"]:.1f}', best['step']],
        ['whole process, s', f'{wall:.1f}', steps[-1]['step'] + 1]]))
    common.finish('char', 1, device=args.device, target=TARGET, reached=reached, best=best,
                  wall_s=round(wall, 1), flags=args.flags)
    return 0


def recipe(args):
    """Measure the tokens until our recipe reaches the final loss of GPT-2's."""
    # the corpus
    corpus = args.corpus
    if not corpus:
        corpus = os.path.join(args.out, 'corpus')
        if not os.path.exists(os.path.join(corpus, 'train.bin')):
            kind = ['--tokenizer=byte'] if args.dry else ['--tokenizer=bpe', '--vocab_size=8192']
            script = os.path.join(common.ROOT, 'data', 'python_stdlib', 'prepare.py')
            common.run([sys.executable, script, f'--out_dir={corpus}', '--val_bytes=150000', *kind])

    # the settings of both: model, tokens, batch, and a warmup in proportion
    n_layer, n_head, n_embd, batch_size = SIZES['dry' if args.dry else '124M']
    block_size, step_tokens = (64, 512) if args.dry else (1024, STEP_TOKENS)
    batch_size = min(batch_size, step_tokens // block_size, 32)
    each = seconds_left(args.limit) / 2
    if args.dry:
        steps = 20
    else:  # as many as fit into the time at a third of the speed of products
        s = bare.settings('gpt2', args.device, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                          vocab_size=8192, batch_size=batch_size, block_size=block_size)
        model = GPT(GPTConfig(vocab_size=8192))
        rate = bare.product_speed(s, model, 0.1)[0] / 3 / model.flops_per_token()
        steps = max(50, int((each - STARTING) * rate / step_tokens))
    shared = [f'--dataset={corpus}', f'--n_layer={n_layer}', f'--n_head={n_head}',
              f'--n_embd={n_embd}', f'--block_size={block_size}', f'--batch_size={batch_size}',
              f'--total_batch_size={step_tokens}', f'--max_iters={steps}',
              f'--lr_decay_iters={steps}', f'--warmup_iters={steps // 10}', '--log_interval=10',
              f'--eval_interval={max(1, steps // 10)}', '--eval_iters=1', *on_device(args)]

    # train both
    runs = {}
    for name, config_file in RECIPES.items():
        folder = os.path.join(args.out, f'run-{name}')
        train_log, evaluations, wall = train([config_file, *shared], folder, each - 3)
        if not evaluations:
            raise UserError(f'{name}: no evaluation within {each:.0f} s; use more time: BUDGET, '
                            f'PARTS=recipe')
        runs[name] = {'evaluations': evaluations, 'wall_s': round(wall, 1),
                      'tokens_per_s': train_log[-1]['tokens_per_s'] if train_log else None}

    # report
    target = runs['gpt2']['evaluations'][-1]['val_loss']
    rows = [['recipe', 'val at the end', f'M tokens to {target:.3f}', 'tokens/s']]
    for name, run in runs.items():
        step = crossing(run['evaluations'], target)
        run['tokens_to_target'] = None if step is None else round(step * step_tokens)
        rows.append([name, f'{run["evaluations"][-1]["val_loss"]:.4f}',
                     'not reached' if step is None else f'{step * step_tokens / 1e6:.2f}',
                     f'{run["tokens_per_s"]:,}' if run['tokens_per_s'] else '-'])
    ours, theirs = (runs[name]['tokens_to_target'] for name in ('modern', 'gpt2'))
    is_complete = runs['gpt2']['evaluations'][-1]['step'] == steps  # its rate has decayed
    ratio = round(ours / theirs, 3) if ours is not None and theirs and is_complete else None
    print(common.heading('recipe'))
    print(common.table(rows))
    print('tokens needed, relative to GPT-2\'s recipe (bar: 0.5): '
          + ('-' if ratio is None else f'{ratio:.2f}')
          + ('' if is_complete else '; it ran out of time: BUDGET, PARTS=recipe'))
    common.finish('recipe', 1, device=args.device, corpus=args.corpus or 'python_stdlib',
                  tokens=steps * step_tokens, target=target, ratio=ratio, complete=is_complete,
                  runs=runs)
    return 0


# summary ------------------------------------------------------------------------------------------


def summary(args):
    """Write out/summary.json from out/parts.txt and out/*.json."""
    rows, parts = [['part', 'status', 's', 'of at most']], {}
    with open(os.path.join(args.out, 'parts.txt'), encoding='utf-8') as f:
        lines = [line.split() for line in f]
    names = {'0': 'done', '124': 'out of time', '137': 'out of time'}
    for name, code, seconds, limit in lines:
        path, result = os.path.join(args.out, f'{name}.json'), None
        if os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                result = json.load(f)
        status = names.get(code, f'failed ({code})')
        if result and 'skipped' in result:
            status = 'skipped'
        parts[name] = {'status': status, 'seconds': int(seconds), 'limit': int(limit),
                       'result': result}
        rows.append([name, status + ('' if result else ', no figures'), seconds, limit])
    path = os.path.join(args.out, 'summary.json')
    replace_file(path, json.dumps({
        'hardware': common.hardware(), 'torch': common.torch_version(), 'commit': common.commit(),
        'dry': args.dry, 'parts': parts}, indent=1).encode())
    print(common.table(rows))
    print(f'wrote {path}')
    return sum(part['status'].startswith('failed') for part in parts.values())


def main():
    sys.excepthook = explain_errors
    parser = make_parser(__doc__)
    parts = {f.__name__: f for f in (speed, char, recipe, summary)}
    parser.add_argument('part', choices=parts)
    parser.add_argument('--limit', type=float, default=540, help='seconds it may take (540)')
    parser.add_argument('--out', default='out-gpu', help='folder of the results (out-gpu)')
    parser.add_argument('--dry', action='store_true', help='tiny sizes, on the CPU')
    parser.add_argument('--shakespeare', help='char: the text of tiny Shakespeare, if not prepared')
    parser.add_argument('--flags', default='', help='char: more flags for train.py')
    parser.add_argument('--corpus', help='recipe: a dataset (default: python_stdlib, 8,192 ids)')
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    os.makedirs(args.out, exist_ok=True)
    args.device = 'cpu' if args.dry else str(runtime.choose_device('auto'))
    raise SystemExit(min(1, parts[args.part](args)))


if __name__ == '__main__':
    main()
