"""
Optimizers and learning-rate schedules: which parameters decay, and how the rate moves.
"""

import math

import torch


def adamw(model, weight_decay, learning_rate, betas):
    """
    AdamW ("Decoupled Weight Decay Regularization", Loshchilov & Hutter 2019) in nanoGPT's two groups: tensors of two or
    more dimensions (matrices, embeddings) decay by weight_decay, the others (biases, norms) don't.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
    groups = [group for group in groups if group['params']]
    # fused: one kernel for all tensors and one pass over memory, on the CPU too
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=params[0].device.type in ('cuda', 'cpu'))


def load_optimizer(optimizer, saved):
    """
    Take the moments from a saved state_dict; the hyperparameters stay those of this run's settings. ValueError if the
    saved state belongs to other parameters.
    """
    groups = optimizer.state_dict()['param_groups']
    if [g['params'] for g in groups] != [g['params'] for g in saved['param_groups']]:
        raise ValueError('the optimizer state in the checkpoint is of another set of parameters')
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})


def cosine(step, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    """
    Linear warmup over warmup_iters steps, then half a cosine from learning_rate down to min_lr at lr_decay_iters, and
    min_lr from there on ("SGDR", Loshchilov & Hutter 2017).
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)  # 0 -> 1
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step, learning_rate, warmup_iters, lr_decay_iters, min_lr, decay_fraction):
    """
    Warmup, stable, decay: linear warmup, constant, then linear to min_lr over the last decay_fraction of lr_decay_iters
    ("MiniCPM", Hu et al. 2024; linear decay after "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations", Haegele et al. 2024). The stable part does not depend on where the run ends, so it can be prolonged.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    decay_iters = max(1, round(decay_fraction * lr_decay_iters))
    remaining = min(1.0, max(0.0, (lr_decay_iters - step) / decay_iters))  # 1 until the decay starts, 0 at its end
    return min_lr + (learning_rate - min_lr) * remaining
