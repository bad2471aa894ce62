"""
LoRA: finetune a model by small matrices beside its frozen ones ("LoRA: Low-Rank Adaptation of Large Language Models",
Hu et al. 2021). In place of W x it computes W x + (alpha / rank) B A x, of which A and B alone are trained.

    lora.add(model, rank=8, alpha=16, targets=['c_attn'])   # everything else is frozen
    adapters = lora.adapters(model)                         # all that a checkpoint needs beside the model it began with
    lora.merge(model)                                       # an ordinary model again, with the same logits

The optimizer then holds moments of A and B alone. Of the 16 bytes that a parameter takes in full finetuning, 4 are left
where it is frozen, and 1 where it is kept in int8 ("QLoRA", Dettmers et al. 2023, takes 4 bits).
"""

import hashlib
import math
import os

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from configurator import UserError
from flatgpt.quantize import quantize_rows


class Int8Product(torch.autograd.Function):
    """x W^T for a frozen W of int8 rows, each with a scale, which is spelt out anew for the backward pass, not kept."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, (weight * scale[:, None]).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        weight, scale = ctx.saved_tensors
        return d @ (weight * scale[:, None]).to(d.dtype), None, None


class LoRALinear(nn.Linear):
    """nn.Linear under the same names, its weight (N, K) frozen, with lora_a (rank, K) and lora_b (N, rank)."""

    def __init__(self, linear, rank, alpha, int8):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias, self.factor, scale = linear.weight, linear.bias, alpha / rank, None
        if int8:
            weight, scale = quantize_rows(linear.weight.detach().float())
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer('scale', scale)
        like = {'device': linear.weight.device, 'dtype': torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))  # the model starts as it was
        nn.init.uniform_(self.lora_a, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))

    def forward(self, x):
        if self.scale is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            y = Int8Product.apply(x, self.weight, self.scale)
            y = y if self.bias is None else y + self.bias
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.factor

    @torch.no_grad()
    def merged(self):
        """-> an nn.Linear that does the same."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device='meta')
        weight = self.weight if self.scale is None else self.weight * self.scale[:, None]
        linear.weight, linear.bias = nn.Parameter(weight + self.factor * self.lora_b @ self.lora_a), self.bias
        return linear


def add(model, rank, alpha, targets, int8=False):
    """
    Freeze a GPT and give the linear layers that `targets` name, such as 'c_attn', 'mlp.c_proj', 'lm_head' or
    'h.0.attn.c_proj', adapters of `rank`; with int8 the weights of these layers are rounded to it, see quantize.py.
    Raises ValueError for a rank below 1, or a target that names no layer.
    """
    if rank < 1:
        raise UserError(f'lora_rank={rank}: expected 1 or more')
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = set()
    for target in targets:
        found = {name for name in layers if name == target or name.endswith(f'.{target}')}
        if not found:
            short = dict.fromkeys(name.split('.')[-1] for name in layers)
            raise UserError(f'lora_targets: {target!r} names no linear layer of this model; expected some of '
                             f'{", ".join(short)}, or longer names such as attn.c_proj')
        chosen |= found
    if 'lm_head' in chosen and model.config.tie_embeddings:
        raise UserError('lora_targets: lm_head is the embedding, too (tie_embeddings), which has no adapter; leave it '
                         'out')
    model.requires_grad_(False)
    for name in sorted(chosen):
        owner, _, last = name.rpartition('.')
        setattr(model.get_submodule(owner), last, LoRALinear(layers[name], rank, alpha, int8))


def merge(model):
    """Put the adapters into the weights: the layers are plain nn.Linear again. -> the model"""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            owner, _, last = name.rpartition('.')
            setattr(model.get_submodule(owner), last, module.merged())
    return model.requires_grad_(True)


def adapters(model):
    """-> {name: tensor} of the adapters alone."""
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(('.lora_a', '.lora_b'))}


def load_adapters(model, weights):
    """Put what adapters() gave back. Raises ValueError if they are of another model."""
    mine = adapters(model)
    wrong = [name for name in {*mine, *weights} if name not in mine or name not in weights
             or mine[name].shape != weights[name].shape]
    if wrong:
        raise UserError(f'the adapters are of another model: {", ".join(sorted(wrong)[:3])}')
    model.load_state_dict(weights, strict=False)


def digest(model):
    """A number of the weights, by which adapters know the model that they were trained beside: SHA-256, 1 s a GB."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


# Settings -----------------------------------------------------------------------------------------


def check_settings(config, init_from, out_dir):
    """Raise UserError for settings of train.py that cannot go with LoRA, or go with nothing else."""
    if not config['lora_rank']:
        alone = {'lora_alpha', 'lora_targets', 'lora_int8'} & config.given
        if alone and init_from != 'resume':
            raise UserError(f'{min(alone)} needs --lora_rank, such as --lora_rank=8')
        return
    if init_from in ('scratch', 'auto'):
        raise UserError(f'lora_rank={config["lora_rank"]} needs a model to adapt, and init_from={init_from!r} has '
                        f'none; name one: --init_from=FOLDER')
    if os.path.realpath(init_from) == os.path.realpath(out_dir):
        raise UserError(f'init_from={init_from!r} is out_dir, whose model the adapters need; name another --out_dir')
    if config['optimizer'] != 'adamw':
        raise UserError("optimizer='muon' does not go with LoRA: adapters are no maps from channels to channels, whose "
                        'singular values Muon equalizes. Use --optimizer=adamw')


def start(model, config, out_dir):
    """Add the adapters of the settings `config` to the model; -> their description for checkpoints."""
    targets = [target.strip() for target in config['lora_targets'].split(',')]
    config['lora_targets'], init_from = ','.join(targets), config['init_from']
    described = {'init_from': init_from,
                 'from_here': os.path.relpath(init_from, out_dir) if os.path.isdir(init_from) else None,
                 'digest': digest(model), 'rank': config['lora_rank'], 'alpha': config['lora_alpha'],
                 'targets': targets, 'int8': config['lora_int8']}
    add(model, described['rank'], described['alpha'], targets, described['int8'])
    return described


def check_resumes(described, config, path):
    """Raise UserError if a LoRA setting that was given contradicts a checkpoint, and take over the others."""
    used = {'lora_rank': 0}
    if described:
        used = {'lora_rank': described['rank'], 'lora_alpha': described['alpha'],
                'lora_targets': ','.join(described['targets']), 'lora_int8': described['int8']}
    for name, value in used.items():
        given = config[name].replace(' ', '') if name == 'lora_targets' else config[name]
        if name in config.given and given != value:
            raise UserError(f'{name}={config[name]}, but {path} was trained with {name}={value}; resume with that, or '
                            f'adapt its model in another run: --init_from={os.path.dirname(path)} and another --out_dir')
    config.update(used)
