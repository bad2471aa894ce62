"""
Optimizers and learning-rate schedules: AdamW, Muon, which parameters decay, and how the rate moves.

In every parameter group, lr_scale says how many times the rate of the schedule the group learns at.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configurator import UserError


def create(model, config, precision, world):
    """
    Make the optimizer of the settings `config`: AdamW, or Muon with AdamW.

    precision: 'bfloat16' lets Muon orthogonalize in it. world: the processes that share Muon's work.
    """
    if config['optimizer'] == 'adamw':
        return adamw(model, config['weight_decay'], config['learning_rate'], (config['beta1'], config['beta2']))
    dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
    return muon(model, config, dtype, world)


def adamw(model, weight_decay, learning_rate, betas):
    """
    AdamW ("Decoupled Weight Decay Regularization", Loshchilov & Hutter 2019) in nanoGPT's two groups: tensors of two or
    more dimensions (matrices, embeddings) decay by weight_decay, the others (biases, norms) don't.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay, 'lr_scale': 1.0},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0, 'lr_scale': 1.0}]
    groups = [group for group in groups if group['params']]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=can_fuse(params))


def can_fuse(params):
    """Whether AdamW has one kernel for all tensors and one pass over memory; on the CPU it has too."""
    return params[0].device.type in ('cuda', 'cpu')


# Muon ----------------------------------------------------------------------------------------------------------------
# Keller Jordan et al. 2024 (kellerjordan.github.io/posts/muon, github.com/KellerJordan/Muon): the momentum of a matrix,
# all of its singular values brought to about 1, is the step. What the gradient says rarely counts as much as what it
# says all the time.

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # x -> a x + b x^3 + c x^5 on singular values, as steep at 0 as it can be
FIRST_MOMENTUM, MOMENTUM_WARMUP = 0.85, 300  # the speedruns': early gradients are soon out of date


def muon(model, config, dtype, world):
    """
    Muon for the matrices of the blocks, at muon_lr and with weight_decay; AdamW without decay for the rest: tables that
    are looked up at embedding_lr; the head, a tied one too, norms, biases and scalars at learning_rate, above 0.
    config: these settings, beta1, beta2, and momentum (default 0.95). dtype: in which to orthogonalize; bf16 is enough.
    """
    learning_rate = config['learning_rate']
    head = {model.lm_head.weight} if hasattr(model, 'lm_head') else set()  # a reward model has another one
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)} - head
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items() if '.h.' in name and p.dim() == 2}
    rest = [p for name, p in named.items() if name not in matrices]
    groups = [{'params': list(matrices.values()), 'parts': [parts_of(name, model.config) for name in matrices],
               'weight_decay': config['weight_decay'], 'momentum': config.get('momentum', 0.95),
               'lr_scale': config['muon_lr'] / learning_rate,
               'fused': False},  # or loading would move the counts of steps to the GPU, and reading them wait for it
              {'params': [p for p in rest if p in tables], 'weight_decay': 0.0,
               'lr_scale': config['embedding_lr'] / learning_rate},
              {'params': [p for p in rest if p not in tables], 'weight_decay': 0.0, 'lr_scale': 1.0}]
    groups = [group for group in groups if group['params']]
    return Muon(groups, learning_rate, (config['beta1'], config['beta2']), dtype, world)


def parts_of(name, config):
    """Rows of the matrices that a layer computes side by side, and that mean different things: q, k, v; gate, up."""
    c = config
    if name.endswith('c_attn.weight'):
        return [c.n_head * c.head_size, c.kv_heads * c.head_size, c.kv_heads * c.head_size]
    if name.endswith('c_fc.weight'):
        return [c.mlp_width, c.mlp_width] if c.mlp == 'swiglu' else [c.mlp_width]
    return [c.n_embd]  # c_proj


class Muon(torch.optim.AdamW):
    """
    Muon for the groups that have a 'momentum', AdamW for the others; with one state_dict, in which a matrix has its
    momentum and its number of steps.

    The matrices of a shape, or of its transpose, are orthogonalized in one batch: several small products at once keep
    a processor busy that each alone would not. Several processes take a share each and hand it round. A step is scaled
    by sqrt(rows / columns) for tall matrices, Jordan's rule: then muon_lr hardly depends on the size of the model.
    """

    def __init__(self, groups, lr, betas, dtype, world):
        super().__init__(groups, lr=lr, betas=betas, fused=can_fuse(groups[0]['params']))
        self._step_supports_amp_scaling = False  # a GradScaler has to leave out the steps that overflow; fused could
        self.dtype, self.world = dtype, world

    @torch.no_grad()
    def step(self):
        """Update all parameters. The gradients of the matrices are spent then: None."""
        for group in self.param_groups:
            if 'momentum' in group:
                self.step_matrices(group)
                for p in group['params']:
                    p.grad = None  # AdamW leaves alone what has none
        super().step()

    def step_matrices(self, group):
        same_shape = {}  # (rows, columns) of the wide form -> [(part of a parameter, its direction)]
        for p, rows in zip(group['params'], group['parts'], strict=True):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state['step'], state['momentum_buffer'] = torch.zeros(()), torch.zeros_like(p)
            momentum = momentum_at(int(state['step']), group['momentum'])
            state['step'] += 1
            state['momentum_buffer'].lerp_(p.grad, 1 - momentum)
            direction = p.grad.lerp(state['momentum_buffer'], momentum)  # Nesterov's: where the momentum will be
            p.mul_(1 - group['lr'] * group['weight_decay'])
            for part, part_direction in zip(p.split(rows), direction.split(rows), strict=True):
                same_shape.setdefault(tuple(sorted(part.shape)), []).append((part, part_direction))
        for pairs in same_shape.values():
            steps = self.orthogonalize_together(torch.stack([wide(direction) for _, direction in pairs]))
            for (part, _), step in zip(pairs, steps, strict=True):
                scale = max(1.0, part.size(0) / part.size(1)) ** 0.5
                wide(part).sub_(step, alpha=group['lr'] * scale)

    def orthogonalize_together(self, x):
        """orthogonalize(x), (K, m, n), of which each process does its share."""
        if self.world.size == 1:
            return orthogonalize(x, self.dtype)
        n, share = len(x), -(-len(x) // self.world.size)  # the last may find less to do
        x = torch.cat((x, x.new_zeros(share * self.world.size - n, *x.shape[1:])))
        mine = orthogonalize(x[self.world.rank * share :][:share], self.dtype)
        everyones = mine.new_empty(x.shape)
        dist.all_gather_into_tensor(everyones, mine)
        return everyones[:n]


def wide(x):
    """A matrix, or the view of its transpose that has more columns than rows."""
    return x.T if x.size(0) > x.size(1) else x


def orthogonalize(x, dtype, steps=5):
    """
    x: (K, m, n), m <= n -> for each matrix U S V^T about U V^T, in `dtype`. Newton-Schulz iterations, which need only
    products, bring singular values above a hundredth of the matrix's norm to between 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def momentum_at(step, momentum):
    """Muon's momentum rises in a line to its value at step MOMENTUM_WARMUP."""
    first = min(FIRST_MOMENTUM, momentum)
    return first + (momentum - first) * min(1.0, step / MOMENTUM_WARMUP)


def check_same(name, saved_config, ckpt_path):
    """ValueError unless the optimizer `name`, 'adamw' or 'muon', is that of the run whose settings were saved."""
    before = saved_config.get('optimizer', 'adamw')
    if name != before:
        raise UserError(f'optimizer={name!r}, but the state in {ckpt_path} is that of {before!r}; resume with '
                         f'--optimizer={before} and the rates it had (config.json beside it)')


def load_optimizer(optimizer, saved):
    """
    Take the moments from a saved state_dict; the hyperparameters stay those of this run's settings. ValueError if the
    saved state belongs to other parameters.
    """
    groups = optimizer.state_dict()['param_groups']
    if [g['params'] for g in groups] != [g['params'] for g in saved['param_groups']]:
        raise UserError('the optimizer state in the checkpoint is of another set of parameters')
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})


def crop_moments(optimizer, model, n):
    """Keep the moments of the first n position embeddings: the context of the model was cropped to n."""
    if model.config.pos == 'learned':
        moments = optimizer.state.get(model.transformer.wpe.weight, {})  # {} where LoRA leaves it frozen
        moments.update({name: m[:n].clone() for name, m in moments.items() if m.dim() == 2})


def schedule(config):
    """
    Return the learning rate as a function of the step, from the settings of train.py.

    Raises UserError for rates that would rise where they should fall, or never reach their highest.
    """
    learning_rate, min_lr, warmup_iters = (config[name] for name in ('learning_rate', 'min_lr', 'warmup_iters'))
    if config['optimizer'] == 'muon' and learning_rate == 0:
        raise UserError('learning_rate=0: expected above 0 with optimizer=muon')
    if not config['decay_lr']:
        return lambda step: learning_rate
    end = config['max_iters'] if config['lr_decay_iters'] is None else config['lr_decay_iters']
    if min_lr > learning_rate:
        raise UserError(f'min_lr={min_lr}: expected at most learning_rate={learning_rate}, usually a tenth of it')
    if config['lr_decay_iters'] is not None and end < warmup_iters:
        raise UserError(f'lr_decay_iters={end}: expected at least warmup_iters={warmup_iters}')
    if config['lr_decay_iters'] is None and end < warmup_iters and 'warmup_iters' in config.given:
        raise UserError(f'warmup_iters={warmup_iters}: expected at most max_iters={end}')
    return getattr(Schedule(learning_rate, warmup_iters, end, min_lr, config['decay_fraction']), config['lr_schedule'])


@dataclass
class Schedule:
    """
    Learning rates by step: linear warmup over warmup_iters steps, then a decay to min_lr at `end`.

    decay_fraction: of wsd alone, the part of `end` in which the rate falls.
    """

    learning_rate: float
    warmup_iters: int
    end: int
    min_lr: float
    decay_fraction: float = 0.2

    def warmup(self, step):
        return self.learning_rate * (step + 1) / (self.warmup_iters + 1)

    def cosine(self, step):
        """Return the rate of half a cosine after the warmup ("SGDR", Loshchilov & Hutter 2017)."""
        if step < self.warmup_iters:
            return self.warmup(step)
        if step >= self.end:
            return self.min_lr
        progress = (step - self.warmup_iters) / (self.end - self.warmup_iters)  # 0 -> 1
        return self.min_lr + (self.learning_rate - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def wsd(self, step):
        """
        Return the rate of warmup, stable, decay ("MiniCPM", Hu et al. 2024): constant, then linear to min_lr.

        The decay takes decay_fraction of `end`, at most what the warmup leaves of it ("Scaling Laws and Compute-Optimal
        Training Beyond Fixed Training Durations", Haegele et al. 2024). The stable part does not depend on `end`, so a
        run can be prolonged.
        """
        if step < self.warmup_iters:
            return self.warmup(step)
        decay_iters = max(1, min(round(self.decay_fraction * self.end), self.end - self.warmup_iters))
        remaining = min(1.0, max(0.0, (self.end - step) / decay_iters))  # 1 until the decay starts, 0 at its end
        return self.min_lr + (self.learning_rate - self.min_lr) * remaining
