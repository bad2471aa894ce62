"""Test what only a GPU runs. Without a GPU these tests are skipped."""

import math

import pytest
import torch
from tiny_models import ARCHITECTURES

import ops
from config.presets import PRESETS
from data import datasets
from data import device as data_device
from data import tokens as dataloader
from flatgpt import quantize, runtime
from flatgpt.generate import Sampling, generate
from model import GPT, GPTConfig

DEVICE = torch.device('cuda', 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')


@pytest.mark.parametrize('options', [{}, {'window': 70, 'n_kv_head': 2, 'residual_lambdas': True,
                                          'value_embeddings': True}])
@pytest.mark.parametrize('preset', PRESETS)
def test_compiled_equals_eager(preset, options, monkeypatch):
    """As train.py compiles it, FlexAttention in the windows and the loss in chunks: loss and gradients of the CPU."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    here = GPT(GPTConfig(**{**ARCHITECTURES[preset], 'n_layer': 3, 'n_head': 4, 'n_embd': 128, 'block_size': 256,
                            'vocab_size': 320, 'zero_init': False, **options}))
    there = GPT(here.config).to(DEVICE)
    there.load_state_dict(here.state_dict())
    idx = torch.randint(320, (4, 256))
    expected = here(idx, idx)[1]
    expected.backward()
    monkeypatch.setattr(ops, 'CHUNK', 100_000)
    monkeypatch.setattr(ops, 'is_training_compiled', False)  # restored at the end
    losses = []

    def step():
        there.zero_grad()
        losses.append(there(idx.to(DEVICE), idx.to(DEVICE), return_logits=False)[1])
        losses[-1].backward()

    runtime.compile_training(there, step)
    assert ops.is_training_compiled
    loss = losses[-1].detach()
    torch.testing.assert_close(loss.cpu(), expected.detach(), atol=1e-3, rtol=0)
    for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
        error = (q.grad.cpu() - p.grad).norm() / p.grad.norm()
        assert error < 0.01, f'{name}: {error}'


def test_tokens_on_the_gpu_give_the_same_batches(folder):
    data_dir = str(folder.path / 'data' / 'tiny')
    tokens = dataloader.open_tokens(data_dir, 'train', datasets.load_meta(data_dir), 16)
    on_gpu = data_device.DeviceTokens(tokens, DEVICE, 100)
    starts = dataloader.whole_windows(len(tokens), 16)
    for a, b in zip(dataloader.gather(tokens, starts, 16, 100), dataloader.gather(on_gpu, starts, 16, 100),
                    strict=True):
        assert b.device == DEVICE and torch.equal(a, b.cpu())


@pytest.mark.parametrize('changes', [{}, {'optimizer': 'muon', 'grad_clip': 0.1}, {'compile': True, 'n_embd': 32}])
def test_the_same_run_as_on_the_cpu(folder, changes):
    """Every step is reported once and in order, with the losses that the CPU has, through a stop and a resume."""
    changes = {'eval_interval': 7, 'log_interval': 1, **changes}
    folder.train(out_dir='cpu', **{**changes, 'compile': False}).ok()
    run = folder.train(device='cuda', max_iters=10, **changes).ok()
    assert 'are on cuda:0' in run.out
    folder.train(device='cuda', init_from='resume', **changes).ok()
    ours, expected = ([line for line in folder.log(out_dir) if 'loss' in line] for out_dir in ('out', 'cpu'))
    assert [line['step'] for line in ours] == [line['step'] for line in expected] == list(range(20))
    assert [line['loss'] for line in ours] == pytest.approx([line['loss'] for line in expected], abs=0.05)


@pytest.mark.parametrize('eval_interval', [1, 1000])
def test_a_loss_that_is_not_finite_is_not_saved(folder, eval_interval):
    """Whether it is read before its update or, as usual on a GPU, after."""
    folder.train(device='cuda', max_iters=4).ok()
    state = folder.checkpoint()
    state['model']['transformer.h.1.mlp.c_fc.weight'][0, 0] = math.nan
    torch.save(state, folder.path / 'out' / 'ckpt.pt')
    before = (folder.path / 'out' / 'ckpt.pt').read_bytes()
    folder.train(device='cuda', init_from='resume', eval_interval=eval_interval).refused(
        'step 4: loss is nan', 'Stopped without saving; out/ckpt.pt is of step 4')
    assert (folder.path / 'out' / 'ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('options', [{}, {'window': 20, 'n_kv_head': 2}])
@pytest.mark.parametrize('preset', PRESETS)
def test_decoding_as_a_cuda_graph(preset, options):
    """Prompts of different lengths, through a full context: the tokens that a row has alone without a cache, on the
    CPU."""
    torch._dynamo.reset()
    torch.set_float32_matmul_precision('highest')
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**ARCHITECTURES[preset], 'n_layer': 3, 'n_head': 4, 'n_embd': 64, 'block_size': 48,
                             'vocab_size': 64, 'zero_init': False, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    prompts = [[1, 2, 3], [4] * 20, [5, 6]]
    expected = [model.generate(torch.tensor([prompt]), 40, temperature=0)[0, len(prompt) :] for prompt in prompts]
    quantize.for_decoding(model.to(DEVICE), torch.float32, compile=True)
    got = torch.cat([ids for ids, _, _ in generate(model, prompts, Sampling(40, 0))], dim=1).cpu()
    assert torch.equal(got, torch.stack(expected))
