"""
The bare training step, which train_step.py, scaling.py and gpu.py measure: forward, backward, clipping and update of
train.py's model on one fixed batch, without data, logging, evaluations and checkpoints.

    s = bare.settings('modern', n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, vocab_size=65)
    bare.Step(s)()                # takes a step, -> its loss
    bare.in_own_process(s)        # -> speed, parts, memory, measured in a process that does nothing else

As a script, which nobody starts by hand, it is that process: settings as JSON on stdin, figures as JSON on stdout.
"""

import copy
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
from flatgpt import optim, parallel, runtime
from flatgpt.flops import peak_flops
from model import GPT, GPTConfig

# train.py's, beside the architecture; no preset's, so that any can come over them. Rates do not change the time
OPTIMIZER = {'optimizer': 'adamw', 'learning_rate': 6e-4, 'muon_lr': 0.02, 'embedding_lr': 0.02, 'momentum': 0.95,
             'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'grad_clip': 1.0, 'average_decay': 0.0,
             'seed': 1337}
COMPILE = {'dynamic': False, 'options': {'fallback_random': True}}  # train.py's, of a block on the CPU
PARTS = ('forward', 'backward', 'clip', 'optimizer')
# as the profiler names the operators, compiled or not; _scaled_mm multiplies fp8
PRODUCTS = ('aten::mm', 'aten::addmm', 'aten::bmm', 'aten::baddbmm', 'aten::_scaled_mm')
ATTENTION = ('flash_attention', 'efficient_attention', 'cudnn_attention')


def settings(preset, device='auto', dtype='auto', compile='auto', **changes):
    """Settings as train.py resolves them, for a long run; changes: of the preset's, and batch_size, vocab_size."""
    device = runtime.choose_device(device)
    dtype, _ = runtime.choose_dtype(dtype, device)
    compile, _ = runtime.choose_compile(compile, device, flops=math.inf)
    return {**asdict(GPTConfig()), 'bias': False, **OPTIMIZER, **PRESETS[preset], **optim.PRESETS[preset],
            'device': str(device), 'dtype': dtype, 'compile': compile, **changes}


def synchronize(device):
    """Wait for what a GPU still has to do; the time of what was only queued means nothing."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


class Step:
    """
    A training step under settings as train.py writes them to config.json, and vocab_size. Its parts, in this order:
    forward and backward for each micro-batch, clip, update.
    """

    def __init__(self, s):
        self.s, self.device = s, torch.device(s['device'])
        runtime.use_cores()
        if self.device.type == 'cuda':
            torch.set_float32_matmul_precision('high')
        torch.manual_seed(s['seed'])
        architecture = {field.name: s[field.name] for field in fields(GPTConfig) if field.name in s}
        self.model = GPT(GPTConfig(**architecture)).to(self.device)
        rate, betas = s['learning_rate'], (s['beta1'], s['beta2'])
        if s['optimizer'] == 'muon':
            ns_dtype = torch.bfloat16 if s['dtype'] == 'bfloat16' else torch.float32
            self.optimizer = optim.muon(self.model, s['weight_decay'], rate, s['muon_lr'], s['embedding_lr'], betas,
                                        s['momentum'], ns_dtype, parallel.World(0, 0, 1))
        else:
            self.optimizer = optim.adamw(self.model, s['weight_decay'], rate, betas)
        for group in self.optimizer.param_groups:
            group['lr'] = rate * group['lr_scale']
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=s['dtype'] == 'float16')
        self.autocast = runtime.autocast(s['dtype'], self.device)
        self.average = copy.deepcopy(self.model) if s['average_decay'] else None
        self.steps, self.unread = 0, None
        if self.device.type == 'cpu':
            runtime.keep_freed_memory()
        self.compiled = self.model
        if s['compile'] and self.device.type == 'cpu':
            for block in self.model.transformer.h:
                block.compile(**COMPILE)
        elif s['compile']:
            self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.tokens = s['batch_size'] * s['block_size']
        self.micro_steps = max(1, s.get('total_batch_size', 0) // self.tokens)
        self.tokens *= self.micro_steps
        self.x, self.y = torch.randint(s['vocab_size'], (2, s['batch_size'], s['block_size']), device=self.device)

    def forward(self):
        with self.autocast:
            return self.compiled(self.x, self.y, return_logits=False)[1] / self.micro_steps

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip(self):
        self.scaler.unscale_(self.optimizer)
        if self.s['grad_clip']:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s['grad_clip'])

    def update(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            optim.average_into(self.average, self.model, self.s['average_decay'], self.steps)
        self.steps += 1
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self):
        """-> the loss before the update; on a GPU that of the last step, as train.py reads it, which waits for less."""
        for _ in range(self.micro_steps):
            loss = self.forward()
            self.backward(loss)
        self.clip()
        self.update()
        last, self.unread = self.unread, runtime.read_later(loss.detach() * self.micro_steps)
        return last() if last and self.device.type == 'cuda' else self.unread()

    def in_parts(self):
        """Take a step, -> {part: ms}. On a GPU each part is waited for, so they add up to more than a step."""
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
    """-> what f() returns, called at least `least` times and until `seconds` are over."""
    end, results = time.perf_counter() + seconds, []
    while len(results) < least or time.perf_counter() < end:
        results.append(f())
    return results


def shares(step):
    """
    -> {'products', 'attention'}: the shares of the time of forward and backward that matrix products take, and torch's
    attention kernels; attention that is written out counts as products. The rest is element-wise work, copies and
    Python. On the CPU shares of the thread that calls, on a GPU of the kernels' time.
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
    attention += microseconds(e for e in kernels if 'flex_attention' in e.key)  # which no operator launches
    return {'products': round(products / total, 4), 'attention': round(attention / total, 4)}


def peak_memory(device):
    """Bytes: the most that a GPU held in tensors, or this process in memory. None where the system doesn't tell."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    # not getrusage(), whose ru_maxrss starts at that of the process which started this one
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status', encoding='utf-8') as f:
            return next((1024 * int(line.split()[1]) for line in f if line.startswith('VmHWM:')), None)
    if sys.platform == 'darwin':
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def product_speed(s, model, seconds=0.7):
    """
    -> (FLOP/s of the model's linear layers alone, forward and backward, weighted by how often each occurs,
    {'inxout': FLOP/s}), with as many rows as a micro-batch has tokens, in the step's dtype; about `seconds` a shape.
    """
    device, dtype, rows = torch.device(s['device']), runtime.DTYPES[s['dtype']], s['batch_size'] * s['block_size']
    shapes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    calls = 10 if device.type == 'cuda' else 1  # between two waits, or launching would be what is measured
    total, speeds = 0.0, {}
    for n_in, n_out in sorted(set(shapes)):
        x = torch.randn(rows, n_in, device=device, dtype=dtype, requires_grad=True)
        w = torch.randn(n_out, n_in, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(rows, n_out, device=device, dtype=dtype)

        def products(x=x, w=w, dy=dy):
            for _ in range(calls):
                torch.autograd.grad(F.linear(x, w), (x, w), dy)
            synchronize(device)

        best = min(repeat(lambda f=products: milliseconds(f), seconds, least=5)) / 1e3 / calls  # noise can only add
        flops = 6 * rows * n_in * n_out  # a product each for y, dx and dw
        speeds[f'{n_in}x{n_out}'] = flops / best
        total += shapes.count((n_in, n_out)) * best
    return sum(6 * rows * n_in * n_out for n_in, n_out in shapes) / total, speeds


def exponent(sizes, costs):
    """p of the power law cost = a size^p that fits best: the slope of log cost over log size."""
    return statistics.linear_regression([math.log(v) for v in sizes], [math.log(v) for v in costs]).slope


def measure(s, seconds=2.0, product_seconds=0.7):
    """-> figures of the bare step under settings s; whole steps are taken for about `seconds`, and once more split."""
    device = torch.device(s['device'])
    step = Step(s)
    t0 = time.perf_counter()
    step(), step()  # compiles; the second meets the state of the optimizer as the others do
    first = time.perf_counter() - t0
    ms = repeat(lambda: milliseconds(step), seconds)
    parts = repeat(step.in_parts, seconds / 2)
    memory = peak_memory(device)
    split = {part: statistics.median(times[part] for times in parts) for part in PARTS}
    share = shares(step)
    speed, by_shape = product_speed(s, step.model, product_seconds)
    median = statistics.median(ms)
    flops = step.model.flops_per_token() * step.tokens
    achieved, peak = flops / median * 1e3, peak_flops(device)
    return {'parameters': step.model.get_num_params(), 'tokens_per_step': step.tokens, 'ms': common.spread(ms),
            'tokens_per_s': round(1e3 * step.tokens / median), 'step_flops': flops,
            'gflops': round(achieved / 1e9, 1), 'mfu': round(achieved / peak, 4) if peak else None,
            'product_gflops': round(speed / 1e9, 1), 'share_of_products': round(achieved / speed, 4),
            'product_gflops_by_shape': {shape: round(value / 1e9, 1) for shape, value in by_shape.items()},
            'parts_ms': {part: round(value, 3) for part, value in split.items()},
            'optimizer_share': round(split['optimizer'] / sum(split.values()), 4), 'forward_backward_shares': share,
            'peak_memory_mb': memory and round(memory / 2**20), 'first_two_steps_s': round(first, 1)}


def in_own_process(s, limit=None, **how):
    """
    measure(s, **how) in a process of its own: peak memory is its own, and torch compiles a function only a few times
    over in one process. -> None if memory ran out. Raises subprocess.TimeoutExpired after `limit` seconds, SystemExit
    if it failed otherwise; its error is on stderr.
    """
    done = subprocess.run([sys.executable, '-m', 'bench.bare'], input=json.dumps({'s': s, **how}),
                          env=common.environment(KINETO_LOG_LEVEL='99'),  # the profiler reports its every start
                          stdout=subprocess.PIPE, text=True, timeout=limit)
    if done.returncode:
        raise SystemExit(f'the step failed with exit status {done.returncode}; what it said is above. Settings: {s}')
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == '__main__':
    try:
        figures = measure(**json.load(sys.stdin))
    except RuntimeError as error:
        if not runtime.out_of_memory(error):
            raise
        figures = None
    print(json.dumps(figures))
