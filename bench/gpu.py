"""
The parts of bench/gpu.sh that are not scripts of their own. Each prints a table and, as its last line, its figures as
one JSON object; a part that runs out of time keeps what it has.

    $ python -m bench.gpu check --limit=60     # does the GPU compute what the CPU does?
    $ python -m bench.gpu speed --limit=300    # tokens/s and MFU of 124M, 350M and 1.5B, presets gpt2 and modern
    $ python -m bench.gpu char --limit=60      # time to val 1.4697 on shakespeare_char
    $ python -m bench.gpu recipe --limit=200   # tokens to a loss, 124M: GPT-2's recipe and ours
    $ python -m bench.gpu summary              # out-gpu/*.json as one file

--limit is in seconds. --dry takes tiny sizes on the CPU, to see that all of it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial

import torch

from bench import bare, common, plot
from flatgpt import runtime
from flatgpt.files import replace_file
from flatgpt.generate import KVCache
from model import GPT, GPTConfig

STARTED = time.perf_counter()
TARGET = 1.4697  # nanoGPT's best val loss at the size of config/train_shakespeare_char.py

# layers, heads, channels, and the micro-batch to try first, halved until it fits
SIZES = {'124M': (12, 12, 768, 64), '350M': (24, 16, 1024, 32), '1.5B': (48, 25, 1600, 16), 'dry': (2, 2, 64, 4)}
SPEEDS = [('124M', 'gpt2'), ('124M', 'modern'), ('350M', 'modern'), ('1.5B', 'modern'), ('350M', 'gpt2'),
          ('1.5B', 'gpt2')]  # as long as there is time
OPTIONS = {  # check: what differs in the kernels it takes
    'gpt2': ('gpt2', {}), 'llama': ('llama', {'n_kv_head': 2}), 'modern': ('modern', {}),
    'modern, windows': ('modern', {'window': 32, 'window_pattern': 'SL', 'value_embeddings': True,
                                   'residual_lambdas': True})}

# recipe: with the same sizes, corpus, tokens and batch over them, and a warmup in proportion
RECIPES = {'gpt2': 'config/gpt2_classic.py', 'modern': 'config/train_gpt2.py'}
STEP_TOKENS = 65536
STARTING = 40  # seconds of a run that are not training: importing, compiling, evaluating


def seconds_left(limit):
    return limit - (time.perf_counter() - STARTED)


# check ---------------------------------------------------------------------------------------------------------------


def randomize(model):
    """No weight stays 0, or what is behind it would not be checked."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))


def pair(preset, device, dtype, compile, **options):
    """-> (step on the CPU in fp32, uncompiled; the same step with the same weights and batch as asked for)."""
    plain = bare.Step(bare.settings(preset, 'cpu', 'float32', False, **options))
    other = bare.Step(bare.settings(preset, device, dtype, compile, **options))
    randomize(plain.model)
    other.model.load_state_dict(plain.model.state_dict())
    other.x, other.y = plain.x.to(other.device), plain.y.to(other.device)
    return plain, other


def gradient(step):
    return torch.cat([p.grad.float().cpu().flatten() for p in step.model.parameters()])


def relative(a, b):
    """How far a is from b, as a share of b."""
    return ((a - b).norm() / b.norm()).item()


def check_training(preset, device, size, **options):
    """-> (difference of the losses in nats, relative difference of the gradients)."""
    plain, fast = pair(preset, device, 'auto', True, **size, **options)
    losses = []
    for step in (plain, fast):
        loss = step.forward()
        loss.backward()
        losses.append(loss.item())
    return abs(losses[0] - losses[1]), relative(gradient(fast), gradient(plain))


def check_cache(preset, device, size, **options):
    """-> the largest difference of the last logits, decoded from a cache and computed anew, in fp32."""
    _, step = pair(preset, device, 'float32', False, **size, **options)
    model, x = step.model.eval(), step.x
    torch.set_float32_matmul_precision('highest')  # TF32 would round the two ways differently
    cache = KVCache(model.config, len(x), step.device, torch.float32)
    with torch.no_grad():
        model(x[:, :-1], cache=cache)
        return (model(x[:, -1:], cache=cache)[0] - model(x)[0]).abs().max().item()


def check_muon(device, size):
    """-> relative difference of what one Muon step, given one gradient, adds to the weights here and on the CPU."""
    plain, other = pair('modern', device, 'float32', False, **size)
    torch.set_float32_matmul_precision('highest')
    before = torch.cat([p.detach().flatten() for p in plain.model.parameters()])
    plain.forward().backward()
    for p, q in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        q.grad = p.grad.to(other.device)
    changes = []
    for step in (other, plain):
        step.update()
        changes.append(torch.cat([p.detach().cpu().flatten() for p in step.model.parameters()]) - before)
    return relative(*changes)


def check(args):
    """Compiled in bf16 against fp32 on the CPU: the loss in nats, the gradient; caches against none; Muon, here and
    on the CPU."""
    size = {'n_layer': 4, 'n_head': 4, 'n_embd': 256, 'block_size': 256, 'batch_size': 8, 'vocab_size': 512}
    if args.dry:
        size.update(n_layer=2, n_embd=64, block_size=64, batch_size=2, vocab_size=65)
    checks = []
    for name in ('gpt2', 'modern, windows') if args.dry else OPTIONS:
        preset, options = OPTIONS[name]
        checks.append((f'{name}: loss, gradient', (1e-2, 0.1),
                       partial(check_training, preset, args.device, size, **options)))
        checks.append((f'{name}: cached logits', (1e-3,), partial(check_cache, preset, args.device, size, **options)))
    checks.append(('one step of Muon', (1e-2,), partial(check_muon, args.device, size)))
    rows, figures, failed = [['check', 'differences', 'at most', '']], [], 0
    for name, bars, differences in checks:
        torch.compiler.reset()  # it compiles a function only a few times over
        try:
            values, error = differences(), None
            values = values if isinstance(values, tuple) else (values,)
        except Exception as raised:  # the other checks go on
            values, error = (), f'{type(raised).__name__}: {(str(raised).splitlines() or [""])[0]}'
            print(f'{name}: {error}', file=sys.stderr)
        good = error is None and all(value <= bar for value, bar in zip(values, bars, strict=True))
        failed += not good
        rows.append([name, ', '.join(f'{value:.1e}' for value in values) or 'error',
                     ', '.join(f'{bar:.0e}' for bar in bars), 'good' if good else 'BAD'])
        figures.append({'check': name, 'differences': values, 'bars': bars, 'good': good, 'error': error})
    print(common.heading('check'))
    print(common.table(rows))
    common.finish('check', 1, device=args.device, failed=failed, checks=figures)
    return failed


# speed ---------------------------------------------------------------------------------------------------------------


def fitting(size, preset, args):
    """-> figures of the largest micro-batch that fits, or None. Raises as bare.in_own_process does."""
    n_layer, n_head, n_embd, batch_size = SIZES[size]
    while batch_size:
        s = bare.settings(preset, args.device, compile=False if args.dry else 'auto', n_layer=n_layer, n_head=n_head,
                          n_embd=n_embd, batch_size=batch_size, block_size=64 if args.dry else 1024)
        print(f'{size} {preset}: {batch_size} sequences', file=sys.stderr)
        figures = bare.in_own_process(s, max(1.0, seconds_left(args.limit)), seconds=0.5 if args.dry else 3.0,
                                      product_seconds=0.1)
        if figures is not None:
            return {'model': size, 'preset': preset, 'batch_size': batch_size, **figures}
        batch_size //= 2
    return None


def speed(args):
    """Tokens/s and MFU of the bare step, a model at a time."""
    results = []
    rows = [['model', 'preset', 'batch', 'ms a step', 'tokens/s', 'MFU', 'of products', 'optimizer', 'GB']]
    for size, preset in [('dry', 'gpt2'), ('dry', 'modern')] if args.dry else SPEEDS:
        try:
            f = fitting(size, preset, args) or {'model': size, 'preset': preset, 'error': 'out of memory'}
        except subprocess.TimeoutExpired:
            print(f'{size} {preset} and what follows: no time left', file=sys.stderr)
            break
        except SystemExit as error:
            f = {'model': size, 'preset': preset, 'error': str(error)}
        results.append(f)
        rows.append([size, preset, *([f['error'][:13], *'-----'] if 'error' in f else [
            f['batch_size'], f'{f["ms"]["median"]:,.1f}', f'{f["tokens_per_s"]:,}',
            '-' if f['mfu'] is None else f'{f["mfu"]:.1%}', f'{f["share_of_products"]:.0%}',
            f'{f["optimizer_share"]:.1%}', f'{(f["peak_memory_mb"] or 0) / 1024:.1f}'])])
        common.finish('speed', 1, device=args.device, results=results)  # in case the time ends with the next one
    print(common.heading('speed'))
    print(common.table(rows))
    common.finish('speed', 1, device=args.device, results=results)
    return sum('error' in f for f in results)


# training ------------------------------------------------------------------------------------------------------------


def train(arguments, folder, seconds):
    """Run train.py for at most so long; -> (training records, evaluations, wall seconds)."""
    t0 = time.perf_counter()
    command = common.train_command([*arguments, f'--out_dir={folder}'])
    print(' '.join(command), flush=True)
    try:
        code = subprocess.run(command, cwd=common.ROOT, env=common.environment(), timeout=max(1.0, seconds)).returncode
        if code:
            raise SystemExit(f'train.py failed with exit status {code}; what it said is above')
    except subprocess.TimeoutExpired:
        print(f'stopped after {seconds:.0f} s')
    return *plot.read_log(folder), time.perf_counter() - t0


def first_below(evaluations, target):
    """The first evaluation whose val loss is at most `target`, or None."""
    return next((e for e in evaluations if e['val_loss'] <= target), None)


def crossing(evaluations, target):
    """Step at which the val loss falls to `target`, on a straight line between two evaluations; None if it does not."""
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
    """Time until the val loss of config/train_shakespeare_char.py is nanoGPT's best."""
    data = os.path.join(common.ROOT, 'data', 'shakespeare_char')
    if not os.path.exists(os.path.join(data, 'train.bin')):
        if not args.shakespeare:
            print('skipped: data/shakespeare_char is not prepared; SHAKESPEARE=FILE names its text')
            common.finish('char', 0, skipped='data/shakespeare_char is not prepared')
            return 0
        common.run([sys.executable, os.path.join(data, 'prepare.py'), f'--input={os.path.abspath(args.shakespeare)}'])
    arguments = ['config/train_shakespeare_char.py', '--eval_interval=50', '--eval_iters=1', *args.flags.split(),
                 *on_device(args)]
    if args.dry:
        arguments += ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64', '--max_iters=50',
                      '--eval_interval=25']
    steps, evaluations, wall = train(arguments, os.path.join(args.out, 'run-char'), seconds_left(args.limit) - 5)
    if not evaluations:
        raise SystemExit(f'no evaluation within {args.limit:.0f} s; give it more time: BUDGET, PARTS=char')
    reached, best = first_below(evaluations, TARGET), min(evaluations, key=lambda e: e['val_loss'])
    print(common.heading('char'))
    print(common.table([
        ['shakespeare_char', 's of training', 'steps'],
        [f'val {TARGET}', *([f'{reached["train_time"]:.1f}', reached['step']] if reached else ['not reached', '-'])],
        [f'best val, {best["val_loss"]:.4f}', f'{best["train_time"]:.1f}', best['step']],
        ['whole process, s', f'{wall:.1f}', steps[-1]['step'] + 1]]))
    common.finish('char', 1, device=args.device, target=TARGET, reached=reached, best=best, wall_s=round(wall, 1),
                  flags=args.flags)
    return 0


def recipe(args):
    """Tokens until our recipe has the loss at which GPT-2's ends; the model, the corpus and the batch are the same."""
    corpus = args.corpus
    if not corpus:
        corpus = os.path.join(os.path.abspath(args.out), 'corpus')
        if not os.path.exists(os.path.join(corpus, 'train.bin')):
            kind = ['--tokenizer=byte'] if args.dry else ['--tokenizer=bpe', '--vocab_size=8192']
            common.run([sys.executable, os.path.join(common.ROOT, 'data', 'python_stdlib', 'prepare.py'),
                        f'--out_dir={corpus}', '--val_bytes=150000', *kind])
    n_layer, n_head, n_embd, batch_size = SIZES['dry' if args.dry else '124M']
    block_size, step_tokens = (64, 512) if args.dry else (1024, STEP_TOKENS)
    batch_size = min(batch_size, step_tokens // block_size, 32)
    each = seconds_left(args.limit) / 2
    if args.dry:
        steps = 20
    else:  # what a GPU does in the time at a third of the speed of its products, no great speed
        s = bare.settings('gpt2', args.device, n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=8192,
                          batch_size=batch_size, block_size=block_size)
        model = GPT(GPTConfig(vocab_size=8192))
        rate = bare.product_speed(s, model, 0.1)[0] / 3 / model.flops_per_token()
        steps = max(50, int((each - STARTING) * rate / step_tokens))
    shared = [f'--dataset={corpus}', f'--n_layer={n_layer}', f'--n_head={n_head}', f'--n_embd={n_embd}',
              f'--block_size={block_size}', f'--batch_size={batch_size}', f'--total_batch_size={step_tokens}',
              f'--max_iters={steps}', f'--lr_decay_iters={steps}', f'--warmup_iters={steps // 10}', '--log_interval=10',
              f'--eval_interval={max(1, steps // 10)}', '--eval_iters=1', *on_device(args)]
    runs = {}
    for name, config_file in RECIPES.items():
        train_log, evaluations, wall = train([config_file, *shared], os.path.join(args.out, f'run-{name}'), each - 3)
        if not evaluations:
            raise SystemExit(f'{name}: no evaluation within {each:.0f} s; give it more time: BUDGET, PARTS=recipe')
        runs[name] = {'evaluations': evaluations, 'wall_s': round(wall, 1),
                      'tokens_per_s': train_log[-1]['tokens_per_s'] if train_log else None}
    target = runs['gpt2']['evaluations'][-1]['val_loss']
    rows = [['recipe', 'val at the end', f'M tokens to {target:.3f}', 'tokens/s']]
    for name, run in runs.items():
        step = crossing(run['evaluations'], target)
        run['tokens_to_target'] = None if step is None else round(step * step_tokens)
        rows.append([name, f'{run["evaluations"][-1]["val_loss"]:.4f}',
                     'not reached' if step is None else f'{step * step_tokens / 1e6:.2f}', f'{run["tokens_per_s"]:,}'
                     if run['tokens_per_s'] else '-'])
    ours, theirs = (runs[name]['tokens_to_target'] for name in ('modern', 'gpt2'))
    is_complete = runs['gpt2']['evaluations'][-1]['step'] == steps  # or its rate has not come down yet
    ratio = round(ours / theirs, 3) if ours is not None and theirs and is_complete else None
    print(common.heading('recipe'))
    print(common.table(rows))
    print('tokens needed, of those of GPT-2\'s recipe (bar: 0.5): ' + ('-' if ratio is None else f'{ratio:.2f}')
          + ('' if is_complete else '; it ran out of time: BUDGET, PARTS=recipe'))
    common.finish('recipe', 1, device=args.device, corpus='python_stdlib' if not args.corpus else args.corpus,
                  tokens=steps * step_tokens, target=target, ratio=ratio,
                  complete=is_complete, runs=runs)
    return 0


# summary -------------------------------------------------------------------------------------------------------------


def summary(args):
    """out/parts.txt, a line 'part status seconds limit' each, and their JSON files -> out/summary.json."""
    rows, parts = [['part', 'status', 's', 'of at most']], {}
    with open(os.path.join(args.out, 'parts.txt'), encoding='utf-8') as f:
        lines = [line.split() for line in f]
    for name, status, seconds, limit in lines:
        path = os.path.join(args.out, f'{name}.json')
        result = None
        if os.path.exists(path):
            with open(path, encoding='utf-8') as f:
                result = json.load(f)
        said = {'0': 'done', '124': 'out of time', '137': 'out of time'}.get(status, f'failed ({status})')
        if result and 'skipped' in result:
            said = 'skipped'
        parts[name] = {'status': said, 'seconds': int(seconds), 'limit': int(limit), 'result': result}
        rows.append([name, said + ('' if result else ', no figures'), seconds, limit])
    path = os.path.join(args.out, 'summary.json')
    replace_file(path, json.dumps({
        'hardware': common.hardware(), 'torch': common.torch_version(), 'commit': common.commit(), 'dry': args.dry,
        'parts': parts}, indent=1).encode())
    print(common.table(rows))
    print(f'wrote {path}')
    return sum(part['status'].startswith('failed') for part in parts.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parts = {f.__name__: f for f in (check, speed, char, recipe, summary)}
    parser.add_argument('part', choices=parts)
    parser.add_argument('--limit', type=float, default=540, help='seconds it may take (540)')
    parser.add_argument('--out', default='out-gpu', help='folder of the results (out-gpu)')
    parser.add_argument('--dry', action='store_true', help='tiny sizes, on the CPU')
    parser.add_argument('--shakespeare', help='char: the text of tiny Shakespeare, if it is not prepared yet')
    parser.add_argument('--flags', default='', help='char: more flags for train.py')
    parser.add_argument('--corpus', help='recipe: name of a dataset (Python\'s standard library, 8,192 ids)')
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    os.makedirs(args.out, exist_ok=True)
    args.device = 'cpu' if args.dry else str(runtime.choose_device('auto'))
    raise SystemExit(min(1, parts[args.part](args)))


if __name__ == '__main__':
    main()
