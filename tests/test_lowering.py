"""What the compiler makes of the code for a GPU, on a machine without one."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tiny_models import ARCHITECTURES

import ops
from bench import pretended
from flatgpt import parallel
from model import GPT, GPTConfig

# launches of a block, forward and backward, and GB moved by 12 of them: python -m bench.lowering, 2026-11-30
BLOCKS = {'gpt2': (32, 32.6), 'modern': (33, 32.7)}


@pytest.mark.slow
@pytest.mark.skipif(bool(pretended.missing()), reason=pretended.missing() or 'nothing is missing')
def test_a_step_for_an_h200():
    """Launches and bytes of the table, within 5%; head and loss of 32 x 1024 tokens hold less than 900 MB."""
    triton = os.path.dirname(os.path.dirname(importlib.util.find_spec('triton').origin))
    out = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'bench.lowering'], cwd=ROOT, capture_output=True,
                         text=True, env={**os.environ, 'PYTHONPATH': triton})
    assert out.returncode == 0, out.stderr
    figures = json.loads(out.stdout.splitlines()[-1])
    results = figures['results']
    for name, (launches, gigabytes) in BLOCKS.items():
        (kind, n, moved), *_ = results[name]['parts']
        assert kind == '12 x block' and n <= 12 * launches and moved / 1e9 == pytest.approx(gigabytes, rel=0.05)
    assert [kind for kind, *_ in results['speedrun']['parts'][:3]] == [
        '6 x window 256', '3 x window 256, value embedding', '3 x block, value embedding']
    for result in results.values():
        assert result['planned_gb'] == pytest.approx(result['step_gb'], rel=0.1)
    assert all(result['loss_mb'] < 900 for result in results.values()) and figures['int8_bytes'] < 1.1


def watched(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**options, 'vocab_size': 64, 'block_size': 32}))


@pytest.mark.parametrize('name', ['gpt2', 'modern'])
def test_steps_compile_once(name):
    """Five steps and an evaluation: blocks of one kind share a graph, and none is compiled again."""
    model = watched({**ARCHITECTURES[name], 'n_layer': 5, 'n_head': 2, 'n_embd': 16, 'window': 8,
                     'window_pattern': 'SL'})
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in model.transformer.h:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    for _ in range(5):
        idx = torch.randint(64, (2, 32))
        model(idx, idx, return_logits=False)[1].backward()
        assert len(graphs) == 2  # with the window, and without
    with torch.no_grad(), torch.compiler.set_stance('force_eager'):
        model.eval()(idx, idx)
    model.train()(idx, idx, return_logits=False)[1].backward()
    assert len(graphs) == 2


def test_gradients_are_exchanged_while_others_are_computed():
    """DDP reduces the last block's gradients before the backward pass of the blocks below it."""
    model = watched({'n_layer': 4, 'n_head': 2, 'n_embd': 256})
    for block in model.transformer.h:
        block.compile(dynamic=False, backend='aot_eager')
    events = []
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ddp = parallel.average_gradients(model, parallel.World(size=2), torch.device('cpu'))

        def exchange(state, bucket):
            events.append('bucket')
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        ddp.register_comm_hook(None, exchange)
        for layer, block in enumerate(model.transformer.h):
            block.register_full_backward_pre_hook(lambda module, gradients, layer=layer: events.append(layer))
        idx = torch.randint(64, (2, 32))
        for _ in range(2):  # DDP orders its buckets by the first backward pass
            events.clear()
            ddp(idx, idx, return_logits=False)[1].backward()
    finally:
        torch.distributed.destroy_process_group()
    assert events[0] == 3 and events.index('bucket') < events.index(1), events


def test_mask_in_window_is_the_window_on_a_cpu():
    config = GPTConfig(window=8)
    assert ops.mask_in_window(8, 32, config, torch.device('cpu')) == 8
    assert ops.mask_in_window(0, 32, config, torch.device('cpu')) == 0
