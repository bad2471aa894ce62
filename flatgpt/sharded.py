"""
Shard a model: each process holds a part of every weight, gradient and moment.

    with sharded.deferred(is_sharded):
        model = GPT(config)            # shapes alone
    sharded.place(model, ...)          # this process's parts, with the weights of a single process

torch's FSDP2 gathers a block's weights when it computes. When its backward pass ends, FSDP2
averages and divides its gradients ("PyTorch FSDP", Zhao et al. 2023). Blocks are gathered in bf16
where products are in bf16; embeddings, head, gradients and moments stay in fp32.
"""

from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from configurator import UserError
from flatgpt.owners import like
from flatgpt.runtime import machine_size


class Draws(TorchFunctionMode):
    """Initialise parameters that have no memory, or a part of it, as whole ones.

    Each draw fills one whole parameter on the CPU, of which a DTensor keeps its part. So random
    numbers are those of a single process, and memory holds one whole parameter at a time.
    """

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        is_draw = getattr(func, '__module__', None) == 'torch.nn.init'
        kwargs = kwargs or {}
        if not (is_draw or func is torch.Tensor.copy_):
            return func(*args, **kwargs)
        rest = {**kwargs}
        tensor = rest.pop('tensor') if is_draw else args[0]
        if not hasattr(tensor, 'device_mesh') and not torch.is_grad_enabled():
            return tensor  # GPT.init_weights() in the constructor; place() calls it again
        whole = torch.empty(tensor.shape, device='cpu')
        func(whole, *args[1:], **rest)
        if hasattr(tensor, 'device_mesh'):
            tensor.to_local().copy_(like(tensor, whole).to_local())
        return tensor


class LayerNorm(nn.LayerNorm):
    """Normalise in the input's precision, fp32, with weights that may be in bf16."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """Normalise in the input's precision, fp32, with weights that may be in bf16."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


@contextmanager
def deferred(is_sharded):
    """Build a model without memory, if it is to be sharded, but with its draws."""
    if is_sharded:
        with torch.device('meta'), Draws():
            yield
    else:
        yield


def should_shard(config, world):
    """Return whether to shard; shard becomes 'none' for a single process.

    Raises UserError for settings that exclude it.
    """
    if world.size == 1:
        config['shard'] = 'none'
    if config['shard'] == 'none':
        return False
    if given := [name for name in ('sample_every', 'eval_tasks') if config.get(name)]:
        raise UserError(f'{" and ".join(given)}: a process has a part of the model alone; expected '
                        f'--shard=none, or --keep_every=N in place of them: sample.py and eval.py '
                        f'open what it keeps with --which=STEP')
    if config['shard'] == 'hybrid' and world.size % machine_size():
        raise UserError(f"shard='hybrid' needs equal machines; {world.size} processes are no "
                        f'multiple of {machine_size()}: use --shard=full')
    return True


def place(model, shard, world, precision, device):
    """Move a model to the device, and shard it in place.

    shard: 'none'; 'full' divides by all processes, 'hybrid' by those of a machine ("HSDP"), where
    links are fast; machines then hold equal parts. A model without memory gets initial weights.
    Raises UserError for shards in float16 or with LoRA.
    """
    if shard == 'none':
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not all(p.requires_grad for p in model.parameters()):
        raise UserError(f"shard={shard!r}: LoRA's frozen weights are not sharded; use --shard=none")
    if precision == 'float16':
        raise UserError('dtype=float16 scales gradients, which shards do not: use '
                        '--dtype=bfloat16 or --dtype=float32')
    mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=('shard',))
    if shard == 'hybrid':
        shape = world.size // machine_size(), machine_size()
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=('replicate', 'shard'))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == 'bfloat16':
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for module in model.transformer.h.modules():
            kinds = {nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm}
            module.__class__ = kinds.get(type(module), type(module))
    world.writers = dist.new_group(backend='gloo', timeout=timedelta(days=1))
    is_empty = model.lm_head.weight.is_meta
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    if is_empty:
        model.to_empty(device=device)
        with Draws():
            model.init_weights()


def restore(model, optimizer, path, state):
    """Fill a sharded model and its saved moments with this process's parts.

    state: of a checkpoint in shards, or in one file, whose moments are divided.
    """
    from flatgpt import shards  # takes a second to import

    saved = state['optimizer']['state']
    numbers = [i for group in optimizer.state_dict()['param_groups'] for i in group['params']]
    params = [p for group in optimizer.param_groups for p in group['params']]
    parameters = dict(zip(numbers, params, strict=True))
    if 'shards' not in state:
        for i, moments in saved.items():
            moments.update({name: like(parameters[i], moment) for name, moment in moments.items()
                            if i in parameters and moment.shape == parameters[i].shape})
        return
    folder = shards.folder_of(path, state, dist.get_rank(), dist.get_world_size())
    tensors = {f'model.{name}': p for name, p in model.named_parameters()}
    for name in shards.described_in(path, folder):
        kind, i, moment = name.split('.', 2)
        if kind == 'optimizer' and int(i) in parameters:
            tensors[name] = torch.zeros_like(parameters[int(i)])
            saved.setdefault(int(i), {})[moment] = tensors[name]
    shards.load(path, folder, tensors)
