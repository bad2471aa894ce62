"""
Train adapters beside frozen weights: W x becomes W x + (alpha / rank) B A x.

    lora.add(model, rank=8, alpha=16, targets=['c_attn'])  # freezes everything else
    weights = lora.adapters(model)  # a checkpoint needs these, and the base model
    lora.merge(model)  # a plain model with the same logits

A parameter takes 16 bytes in full finetuning. A frozen one takes 4 in fp32, 1 in int8 and 0.56 in
NF4 ("QLoRA", Dettmers et al. 2023). Source: "LoRA: Low-Rank Adaptation of Large Language Models",
Hu et al. 2021.
"""

import hashlib
import math
import os
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from configurator import UserError
from flatgpt.quantize import quantize_nf4, quantize_rows, weights_of_nf4


class RoundedProduct(torch.autograd.Function):
    """Multiply x (..., K) by a frozen weight of few bits, see rounded()."""

    @staticmethod
    def forward(ctx, x, weight, scale, shape):
        ctx.save_for_backward(weight, scale)
        ctx.shape = shape
        return F.linear(x, restored(weight, scale, ctx.shape).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        weight, scale = ctx.saved_tensors  # the product is formed again, not kept
        return d @ restored(weight, scale, ctx.shape).to(d.dtype), None, None, None


def rounded(weight, bits):
    """Round a weight (N, K) to 8 bits, a scale per row, or 4 -> (weight, scale)."""
    return (quantize_rows if bits == 8 else quantize_nf4)(weight.detach().float())


def restored(weight, scale, shape):
    """Return the matrix in fp32 of what rounded() returned. shape: (N, K)."""
    if weight.dtype == torch.int8:
        return weight * scale[:, None]
    return weights_of_nf4(weight, scale, math.prod(shape)).view(shape)


class LoRALinear(nn.Linear):
    """Add lora_a (rank, K) and lora_b (N, rank) to a linear layer; its names stay."""

    def __init__(self, linear, rank, alpha, bits=32):
        nn.Module.__init__(self)
        self.shape = self.out_features, self.in_features = linear.weight.shape
        self.is_on = True  # see switched_off()
        self.weight, self.bias, self.factor, scale = linear.weight, linear.bias, alpha / rank, None
        if bits < 32:
            weight, scale = rounded(linear.weight, bits)
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer('scale', scale)
        like = {'device': linear.weight.device, 'dtype': torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **like))  # changes nothing
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x):
        if self.scale is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            y = RoundedProduct.apply(x, self.weight, self.scale, self.shape)
            y = y if self.bias is None else y + self.bias
        if not self.is_on:
            return y
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.factor

    @torch.no_grad()
    def merged(self):
        """Return an nn.Linear that computes the same."""
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device='meta')
        weight = self.weight
        if self.scale is not None:
            weight = restored(weight, self.scale, self.shape)
        linear.weight = nn.Parameter(weight + self.factor * self.lora_b @ self.lora_a)
        linear.bias = self.bias
        return linear


def add(model, rank, alpha, targets, bits=32):
    """Freeze a GPT, and add adapters to the linear layers that `targets` name.

    targets: ends of layer names, such as 'c_attn', 'mlp.c_proj', 'lm_head' or 'h.0.attn.c_proj'.
    bits: 8 or 4 round the weights of these layers. Raises UserError for a target without a layer.
    """
    if rank < 1:
        raise UserError(f'lora_rank={rank}: expected 1 or more')
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name != 'value_head'}  # it learns whole
    chosen = set()
    for target in targets:
        matching = {name for name in layers if f'.{name}'.endswith(f'.{target}')}
        if not matching:
            names = dict.fromkeys(name.split('.')[-1] for name in layers)
            raise UserError(f'lora_targets: {target!r} names no linear layer of this model; '
                            f'expected some of {", ".join(names)}, or a longer name: attn.c_proj')
        chosen |= matching
    if 'lm_head' in chosen and model.config.tie_embeddings:
        raise UserError('lora_targets: lm_head is also the token embedding (tie_embeddings), which '
                        'takes no adapters; leave it out')
    model.requires_grad_(False)
    for name in sorted(chosen):
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, LoRALinear(layers[name], rank, alpha, bits))


@contextmanager
def switched_off(model):
    """Let a model compute without its adapters, as its frozen base."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    try:
        for layer in layers:
            layer.is_on = False
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def merge(model):
    """Add the adapters to the weights of plain nn.Linear layers again; -> the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, module.merged())
    return model.requires_grad_(True)


def adapters(model):
    """Return {name: tensor} of the adapters, and of a value_head."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if name.endswith(('.lora_a', '.lora_b')) or name.startswith('value_head.')}


def check_rank(weights, rank):
    """Raise UserError unless adapters have a rank; add() takes memory for it."""
    if wrong := [name for name, tensor in weights.items()
                 if name.endswith('.lora_a') and tensor.shape[:1] != (rank,)]:
        raise UserError(f'rank={rank}, but {wrong[0]} has another; train the adapters again')


def load_adapters(model, weights):
    """Load the result of adapters(). Raises UserError for another model's."""
    expected = {name: tensor.shape for name, tensor in adapters(model).items()}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    if shapes != expected:
        wrong = sorted({name for name, _ in shapes.items() ^ expected.items()})
        raise UserError(f'the adapters are of another model: {", ".join(wrong[:3])} differ; '
                        f'expected those of this model')
    model.load_state_dict(weights, strict=False)


def restore(model, settings, weights):
    """Add the adapters that start() described to their base, with their weights."""
    check_rank(weights, settings['rank'])
    add(model, settings['rank'], settings['alpha'], settings['targets'], bits_of(settings))
    load_adapters(model, weights)


def bits_of(settings):
    """Return the bits of a frozen weight, also where a checkpoint names int8 instead."""
    return settings.get('bits', 8 if settings.get('int8') else 32)


def digest(model):
    """Return the SHA-256 of the weights, to identify adapters' base; 1 s per GB."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def check_settings(config, init_from, out_dir):
    """Raise UserError for settings that contradict LoRA, or need it."""
    if not config['lora_rank']:
        unused = {'lora_alpha', 'lora_targets', 'lora_bits'} & config.given
        if unused and init_from != 'resume':
            raise UserError(f'{min(unused)} needs --lora_rank, such as --lora_rank=8')
        return
    if init_from in ('scratch', 'auto'):
        raise UserError(f'lora_rank={config["lora_rank"]} needs a model to adapt, but '
                        f'init_from={init_from!r}; name a model: --init_from=FOLDER')
    if os.path.realpath(init_from) == os.path.realpath(out_dir):
        raise UserError(f'init_from={init_from!r} is out_dir, but adapters need its model later; '
                        f'name another --out_dir')
    if config.get('optimizer', 'adamw') != 'adamw':
        raise UserError("optimizer='muon' does not fit LoRA: Muon is for maps between channels, "
                        'which adapters are not; use --optimizer=adamw')


def start(base, config, out_dir, model=None):
    """Add adapters by the settings `config`; -> their description for checkpoints.

    model: gets them in place of the base, whose layers it has too.
    """
    targets = [target.strip() for target in config['lora_targets'].split(',')]
    init_from = config['init_from']
    relative = os.path.relpath(init_from, out_dir) if os.path.isdir(init_from) else None
    described = {'init_from': init_from, 'from_here': relative, 'digest': digest(base),
                 'rank': config['lora_rank'], 'alpha': config['lora_alpha'], 'targets': targets,
                 'bits': config['lora_bits']}
    add(model or base, described['rank'], described['alpha'], targets, described['bits'])
    return described


def check_resumes(described, config, path):
    """Take over a checkpoint's LoRA settings. Raises UserError if a given one differs."""
    saved = {'lora_rank': 0}
    if described:
        saved = {'lora_rank': described['rank'], 'lora_alpha': described['alpha'],
                 'lora_targets': ','.join(described['targets']), 'lora_bits': bits_of(described)}
    for name, value in saved.items():
        given = config[name].replace(' ', '') if name == 'lora_targets' else config[name]
        if name in config.given and given != value:
            raise UserError(f'{name}={config[name]}, but {path} was trained with {name}={value}; '
                            f'resume with that, or adapt its model in another run: '
                            f'--init_from={os.path.dirname(path)} and another --out_dir')
    config.update(saved)
