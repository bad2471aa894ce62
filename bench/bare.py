"""
Take train.py's forward, backward, clipping and update on one fixed batch.

    s = bare.settings('modern', n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)
    bare.Step(s)()                # takes a step, returns its loss
    bare.in_own_process(s)        # returns speed, parts and memory, measured in a new process

It leaves out data, logging, evaluations and checkpoints. Used by train_step.py, scaling.py and
gpu.py. As a script it is the new process: settings as JSON on stdin, figures as JSON on stdout.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, fields

import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bench import common
from config.presets import PRESETS
from configurator import UserError
from flatgpt import flops as flops_table
from flatgpt import optim, parallel, runtime
from model import GPT, GPTConfig

# train.py's defaults; the learning rates do not change the time
OPTIMIZER = {'optimizer': 'adamw', 'learning_rate': 6e-4, 'muon_lr': 0.02, 'embedding_lr': 0.02,
             'momentum': 0.95, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'grad_clip': 1.0,
             'seed': 1337}
PARTS = ('forward', 'backward', 'clip', 'optimizer')
# the profiler's names of operators; _scaled_mm multiplies fp8
PRODUCTS = ('aten::mm', 'aten::addmm', 'aten::bmm', 'aten::baddbmm', 'aten::_scaled_mm')
ATTENTION = ('flash_attention', 'efficient_attention', 'cudnn_attention')


def settings(preset, device='auto', dtype='auto', compile='auto', **changes):
    """Return settings as train.py resolves them; changes win over the preset."""
    device = runtime.choose_device(device)
    dtype, _ = runtime.choose_dtype(dtype, device)
    compile, _ = runtime.choose_compile(compile, device, flops=math.inf)
    return {**asdict(GPTConfig()), 'bias': False, **OPTIMIZER, **PRESETS[preset],
            'device': str(device), 'dtype': dtype, 'compile': compile, **changes}


def synchronize(device):
    """Wait until a GPU has done all its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


class Step:
    """A training step under settings as in config.json, and vocab_size.

    Its parts in order: forward and backward of each micro-batch, clip, update.
    """

    def __init__(self, s):
        self.s, self.device = s, torch.device(s['device'])
        runtime.use_machine(self.device)
        torch.manual_seed(s['seed'])
        architecture = {field.name: s[field.name] for field in fields(GPTConfig) if field.name in s}
        self.model = GPT(GPTConfig(**architecture)).to(self.device)
        self.optimizer = optim.create(self.model, s, s['dtype'], parallel.World(0, 0, 1))
        optim.set_rates(self.optimizer, s['learning_rate'])
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=s['dtype'] == 'float16')
        self.autocast = runtime.autocast(s['dtype'], self.device)
        self.unread = None
        shape = s['batch_size'], s['block_size']
        self.micro_steps = max(1, s.get('total_batch_size', 0) // math.prod(shape))
        self.tokens = self.micro_steps * math.prod(shape)
        self.x, self.y = torch.randint(s['vocab_size'], (2, *shape), device=self.device)
        if s['compile']:
            runtime.compile_training(self.model, lambda: self.backward(self.forward()))
            self.optimizer.zero_grad(set_to_none=True)

    def forward(self):
        with self.autocast:
            return self.model(self.x, self.y, return_logits=False)[1] / self.micro_steps

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip(self):
        self.scaler.unscale_(self.optimizer)
        if self.s['grad_clip']:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s['grad_clip'])

    def update(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self):
        """Take a step; return the loss before it, on a GPU the previous one."""
        for _ in range(self.micro_steps):
            loss = self.forward()
            self.backward(loss)
        self.clip()
        self.update()
        last, self.unread = self.unread, runtime.read_later(loss.detach() * self.micro_steps)
        return last() if last and self.device.type == 'cuda' else self.unread()

    def in_parts(self):
        """Take a step; return {part: ms}. The waits of a GPU make the sum too long."""
        times = dict.fromkeys(PARTS, 0.0)

        def timed(part, f, *arguments):
            synchronize(self.device)
            t0 = time.perf_counter()
            result = f(*arguments)
            synchronize(self.device)
            times[part] += 1e3 * (time.perf_counter() - t0)
            return result

        for _ in range(self.micro_steps):
            timed('backward', self.backward, timed('forward', self.forward))
        timed('clip', self.clip)
        timed('optimizer', self.update)
        return times


def milliseconds(f):
    t0 = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - t0)


def repeat(f, seconds, least=3):
    """Return the results of f(), called `least` times and `seconds` long or more."""
    end, results = time.perf_counter() + seconds, []
    while len(results) < least or time.perf_counter() < end:
        results.append(f())
    return results


def shares(step):
    """Return {'products', 'attention'}: shares of the time of forward and backward.

    Attention written out as products counts as products. The rest is element-wise work, copies and
    Python. On the CPU the time is that of the calling thread, on a GPU that of the kernels.
    """
    on_gpu = step.device.type == 'cuda'
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        step.backward(step.forward())
        synchronize(step.device)
    step.optimizer.zero_grad(set_to_none=True)
    events = profiler.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    operators = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]

    def microseconds(chosen):
        return sum(e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in chosen)

    total = microseconds(kernels if on_gpu else operators)
    products = microseconds(e for e in operators if e.key.startswith(PRODUCTS))
    attention = microseconds(e for e in operators if any(name in e.key for name in ATTENTION))
    attention += microseconds(e for e in kernels if 'flex_attention' in e.key)  # has no operator
    return {'products': round(products / total, 4), 'attention': round(attention / total, 4)}


def peak_memory(device):
    """Return the most bytes of tensors on a GPU, or of this process; None if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss of getrusage() would start at the size of the parent process
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status', encoding='utf-8') as f:
            return next((1024 * int(line.split()[1]) for line in f if line.startswith('VmHWM:')),
                        None)
    if sys.platform == 'darwin':
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def measure_memory(s):
    """Take a step on the CPU; -> the most bytes of its tensors, and of this process.

    torch's profiler counts the tensors inside of operators too.
    """
    torch.set_num_threads(1)  # the memory is the same, and others may use the cores
    step = Step(s)
    step.model.recompute = s.get('recompute', False)
    step(), step()  # from the second on there are moments
    held = [*step.model.parameters(), step.x, step.y]
    held += [t for state in step.optimizer.state.values() for t in state.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == '[memory]']
    n_bytes = most = sum(t.nbytes for t in held)
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        n_bytes += change
        most = max(most, n_bytes)
    return {'tensors': most, 'process': peak_memory(step.device)}


def product_speed(s, model, seconds=0.7):
    """Return the FLOP/s of the model's linear layers alone, and {'inxout': FLOP/s}.

    Measures forward and backward of each shape for about `seconds`, with the rows of a micro-batch
    and in the step's dtype. The first number weights each shape by its frequency.
    """
    device, dtype = torch.device(s['device']), runtime.DTYPES[s['dtype']]
    rows = s['batch_size'] * s['block_size']
    shapes = [(m.in_features, m.out_features) for m in model.modules()
              if isinstance(m, torch.nn.Linear)]
    calls = 10 if device.type == 'cuda' else 1  # per synchronization, which costs time
    total, speeds = 0.0, {}
    for n_in, n_out in sorted(set(shapes)):
        x = torch.randn(rows, n_in, device=device, dtype=dtype, requires_grad=True)
        w = torch.randn(n_out, n_in, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(rows, n_out, device=device, dtype=dtype)

        def products(x=x, w=w, dy=dy):
            for _ in range(calls):
                torch.autograd.grad(F.linear(x, w), (x, w), dy)
            synchronize(device)

        # the minimum, since noise only adds
        best = min(repeat(lambda f=products: milliseconds(f), seconds, least=5)) / 1e3 / calls
        flops = 6 * rows * n_in * n_out  # one product each for y, dx and dw
        speeds[f'{n_in}x{n_out}'] = flops / best
        total += shapes.count((n_in, n_out)) * best
    return sum(6 * rows * n_in * n_out for n_in, n_out in shapes) / total, speeds


def exponent(sizes, costs):
    """Return p of the best fit cost = a size^p, the slope of the logarithms."""
    logs = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(*logs).slope


def measure(s, seconds=2.0, product_seconds=0.7):
    """Measure whole steps for about `seconds`, then their parts; return figures."""
    device = torch.device(s['device'])
    step = Step(s)
    t0 = time.perf_counter()
    step(), step()  # compiles; the second has the optimizer's state, as the later ones have
    first = time.perf_counter() - t0
    ms = repeat(lambda: milliseconds(step), seconds)
    parts = repeat(step.in_parts, seconds / 2)
    memory = peak_memory(device)
    split = {part: statistics.median(times[part] for times in parts) for part in PARTS}
    share = shares(step)
    speed, by_shape = product_speed(s, step.model, product_seconds)
    median = statistics.median(ms)
    flops = step.model.flops_per_token() * step.tokens
    achieved, peak = flops / median * 1e3, flops_table.peak_flops(device)
    return {'parameters': step.model.get_num_params(), 'tokens_per_step': step.tokens,
            'ms': common.spread(ms), 'tokens_per_s': round(1e3 * step.tokens / median),
            'step_flops': flops, 'gflops': round(achieved / 1e9, 1),
            'mfu': round(achieved / peak, 4) if peak else None,
            'product_gflops': round(speed / 1e9, 1),
            'share_of_products': round(achieved / speed, 4),
            'product_gflops_by_shape': {shape: round(v / 1e9, 1) for shape, v in by_shape.items()},
            'parts_ms': {part: round(value, 3) for part, value in split.items()},
            'optimizer_share': round(split['optimizer'] / sum(split.values()), 4),
            'forward_backward_shares': share, 'peak_memory_mb': memory and round(memory / 2**20),
            'first_two_steps_s': round(first, 1)}


def in_own_process(s, limit=None, **how):
    """Return measure(s, **how) of a new process, or None if memory runs out.

    only_memory=True returns measure_memory(s) instead.

    A new process has its own peak memory, and torch's limit of compilations starts anew. Raises
    subprocess.TimeoutExpired after `limit` seconds, UserError if the process fails otherwise.
    """
    done = subprocess.run([sys.executable, '-m', 'bench.bare'], cwd=common.ROOT, text=True,
                          env=common.environment(KINETO_LOG_LEVEL='99'),  # a quiet profiler
                          input=json.dumps({'s': s, **how}), stdout=subprocess.PIPE, timeout=limit)
    if done.returncode:
        raise UserError(f'the step failed with exit status {done.returncode}; its error is above. '
                        f'Settings: {s}')
    return json.loads(done.stdout.splitlines()[-1])


def main():
    try:
        how = json.load(sys.stdin)
        figures = measure_memory(how['s']) if how.pop('only_memory', False) else measure(**how)
    except RuntimeError as error:
        if not runtime.out_of_memory(error):
            raise
        figures = None
    print(json.dumps(figures))


if __name__ == '__main__':
    main()
