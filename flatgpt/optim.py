"""
Build optimizers and learning-rate schedules: AdamW, cosine, WSD.

muon.py has Muon. In every parameter group, lr_scale times the rate of the schedule is the rate of
the group.
"""

import math
from dataclasses import dataclass

import torch

from configurator import UserError
from flatgpt import muon
from flatgpt.cut import stages_of


def create(model, config, precision, world):
    """Build the optimizer of `config`; Muon multiplies in bf16 if the model does."""
    if config['optimizer'] == 'muon':
        dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
        return muon.create(model, config, dtype, world)
    betas = config['beta1'], config['beta2']
    return adamw(model, config['weight_decay'], config['learning_rate'], betas)


def adamw(model, weight_decay, learning_rate, betas):
    """Build AdamW ("Decoupled Weight Decay Regularization", Loshchilov & Hutter 2019).

    In nanoGPT's two groups: tensors of two or more dimensions decay, biases and norms do not.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
    groups = [{**group, 'lr_scale': 1.0} for group in groups if group['params']]
    can_fuse = params[0].device.type in ('cuda', 'cpu')  # a fused kernel reads memory once
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=can_fuse)


def set_rates(optimizer, lr, matrix_lr=None):
    """Set the rates of the groups; matrix_lr: for Muon's matrices, None: lr."""
    for group in optimizer.param_groups:
        is_apart = matrix_lr is not None and 'momentum' in group
        group['lr'] = group['lr_scale'] * (matrix_lr if is_apart else lr)


def schedule(config):
    """Return the learning rate and that of Muon's matrices as a function of the step.

    config: train.py's settings. A step with a part of the batch has its root of the rates ("On the
    SDEs and Scaling Rules for Adaptive Gradient Algorithms", Malladi et al. 2022). Raises UserError
    for rates that would rise where they should fall, and for settings without an effect.
    """
    rate, warmup, min_lr = (config[name] for name in ('learning_rate', 'warmup_iters', 'min_lr'))
    name = 'max_iters' if config['lr_decay_iters'] is None else 'lr_decay_iters'
    end, stages = config[name], stages_of(config)
    if config['optimizer'] == 'muon' and rate == 0:
        raise UserError('learning_rate=0: expected above 0 with optimizer=muon')
    muon.check_settings(config)
    if not config['decay_lr']:
        return lambda step: [rate * stages.share(step) ** 0.5] * 2
    if min_lr > rate:
        raise UserError(f'min_lr={min_lr}: expected at most learning_rate={rate}, usually a tenth')
    if end < warmup and (name == 'lr_decay_iters' or 'warmup_iters' in config.given):
        raise UserError(f'{name}={end}: expected at least warmup_iters={warmup}; lower that')
    shares = config['decay_fraction'], config.get('muon_decay_fraction') or config['decay_fraction']
    rates = [getattr(Schedule(rate, warmup, end, min_lr, share), config['lr_schedule'])
             for share in shares]  # cosine or wsd
    return lambda step: [rate_at(step) * stages.share(step) ** 0.5 for rate_at in rates]


@dataclass
class Schedule:
    """Compute learning rates: a linear warmup, then a decay to min_lr at step `end`."""

    learning_rate: float
    warmup_iters: int
    end: int
    min_lr: float
    decay_fraction: float = 0.2  # wsd: the part of `end` in which the rate falls

    def cosine(self, step):
        """Return a rate that falls by half a cosine ("SGDR", Loshchilov & Hutter 2017)."""
        progress = (step - self.warmup_iters) / max(1, self.end - self.warmup_iters)  # 0 -> 1
        return self.rate(step, 0.5 * (1 + math.cos(math.pi * progress)) * (step < self.end))

    def wsd(self, step):
        """Return a constant rate with a linear fall at its end ("MiniCPM", Hu 2024)."""
        # until the decay it does not depend on `end`, so a run can be prolonged
        decay = max(1, min(round(self.decay_fraction * self.end), self.end - self.warmup_iters))
        return self.rate(step, min(1.0, max(0.0, (self.end - step) / decay)))

    def rate(self, step, share):
        """Return the rate of the warmup, or after it min_lr plus a share of the rest."""
        if step < self.warmup_iters:
            return self.learning_rate * (step + 1) / (self.warmup_iters + 1)
        return self.min_lr + (self.learning_rate - self.min_lr) * share
