"""
Optimize the matrices of blocks by Muon, the rest by AdamW.

A step is the momentum of a matrix with all singular values brought to about 1. So rare directions
of the gradient count as much as frequent ones. Source: Keller Jordan et al. 2024
(kellerjordan.github.io/posts/muon, github.com/KellerJordan/Muon). In every
parameter group, lr_scale times the rate of the schedule is the rate of the group.
"""

import torch
import torch.distributed as dist

from configurator import UserError
from flatgpt.owners import local, map_whole

BATCH = 2**26  # numbers that a process orthogonalizes at once: 128 MB in bf16
# odd polynomials a x + b x^3 + c x^5, one after the other: each has the least error from 1 in the
# interval that the one before leaves of [0.01, 1], which is widened by 1% for rounding errors.
# "The Polar Express", Amsel et al. 2025, theorem 3.1
QUINTICS = ((8.0211, -22.956, 16.623), (3.6231, -2.6621, 0.5141), (2.687, -1.9711, 0.4406))
gather = getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)  # before torch 2.13


def create(model, config, dtype, world):
    """Build Muon for the matrices of blocks, and AdamW without decay for the rest.

    Matrices learn at muon_lr, embeddings that are only looked up at embedding_lr, the rest at
    learning_rate, above 0. weight_decay is that of the matrices. dtype: of the orthogonalization.
    """
    lr, no_decay = config['learning_rate'], {'weight_decay': 0.0}
    head = {model.lm_head.weight} if hasattr(model, 'lm_head') else set()  # not in a reward model
    tables = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)} - head
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items()
                if '.h.' in name and p.dim() == 2 and not name.endswith('_gate')}
    embeddings = [p for name, p in named.items() if p in tables]
    rest = [p for name, p in named.items() if name not in matrices and p not in tables]
    groups = [{'params': list(matrices.values()), 'lr_scale': config['muon_lr'] / lr,
               'parts': [parts_of(name, model.config) for name in matrices],
               'weight_decay': config['weight_decay'], 'momentum': config.get('momentum', 0.95),
               'cautious': config.get('cautious_decay', False), 'highest': config['muon_lr'] or 1.0,
               'fused': False},  # fused, loading would move step counts to the GPU, slow to read
              {'params': embeddings, 'lr_scale': config['embedding_lr'] / lr, **no_decay},
              {'params': rest, 'lr_scale': 1.0, **no_decay}]
    groups = [group for group in groups if group['params']]
    return Muon(groups, lr, (config['beta1'], config['beta2']), dtype, world)


def check_settings(config):
    """Raise UserError for a setting of Muon that has no effect beside the others."""
    optimizer, schedule = config['optimizer'], config['lr_schedule']
    if config.get('cautious_decay') and (optimizer != 'muon' or not config['weight_decay']):
        raise UserError(f"cautious_decay=True: expected optimizer='muon' and weight_decay above 0, "
                        f'not {optimizer!r} and {config["weight_decay"]}')
    share = config.get('muon_decay_fraction')
    if share is not None and (optimizer != 'muon' or schedule != 'wsd'):
        raise UserError(f"muon_decay_fraction={share}: expected optimizer='muon' and "
                        f"lr_schedule='wsd', not {optimizer!r} and {schedule!r}")


def parts_of(name, c):
    """Return the rows of each matrix that a layer computes at once: q, k, v; gate, up."""
    if name.endswith('c_attn.weight'):
        return [heads * c.head_size for heads in (c.n_head, c.kv_heads, c.kv_heads)]
    if name.endswith('c_fc.weight'):
        return [c.mlp_width] * (2 if c.mlp == 'swiglu' else 1)
    return [c.n_embd]  # c_proj


class Muon(torch.optim.AdamW):
    """Apply Muon to the groups that have a 'momentum', AdamW to the others.

    Matrices of one shape, or its transpose, are orthogonalized in one batch, shared by processes.
    Tall matrices take steps of sqrt(rows / columns), so that muon_lr suits models of any size.
    """

    def __init__(self, groups, lr, betas, dtype, world):
        can_fuse = groups[0]['params'][0].device.type in ('cuda', 'cpu')
        super().__init__(groups, lr=lr, betas=betas, fused=can_fuse)
        self._step_supports_amp_scaling = False  # a GradScaler must skip steps that overflow itself
        self.dtype, self.world = dtype, world

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters. The matrices' gradients are overwritten."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            if 'momentum' in group:
                self.step_matrices(group)
        super().step()
        return loss

    def step_matrices(self, group):
        """Update the matrices of a group, a batch of one shape at a time."""
        for p in group['params']:
            if not self.state[p]:
                self.state[p] = {'step': torch.zeros(()), 'momentum_buffer': torch.zeros_like(p)}
        states = [self.state[p] for p in group['params']]
        # all matrices have taken the same number of steps
        momentum = momentum_at(int(states[0]['step']), group['momentum'])
        params, gradients, buffers = (
            [local(x) for x in tensors] for tensors in (
                group['params'], (p.grad for p in group['params']),
                (state['momentum_buffer'] for state in states)))
        torch._foreach_add_([state['step'] for state in states], 1)
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, buffers, momentum)  # Nesterov's
        step = self.step_whole if params[0] is group['params'][0] else self.step_shards
        step(group, params, gradients)
        for p in group['params']:
            p.grad = None  # AdamW skips p

    def step_whole(self, group, params, directions):
        """Take orthogonal steps; the processes share the work and exchange results."""
        by_shape, waiting = {}, None  # the exchange of a batch overlaps with the next's products
        for p, direction, rows in zip(params, directions, group['parts'], strict=True):
            for pair in zip(p.split(rows), direction.split(rows), strict=True):
                by_shape.setdefault(tuple(sorted(pair[0].shape)), []).append(pair)
        for (m, n), pairs in by_shape.items():
            size = max(1, BATCH // (m * n)) * self.world.size
            for batch in (pairs[i : i + size] for i in range(0, len(pairs), size)):
                parts, directions = zip(*batch, strict=True)
                started = parts, *self.orthogonalize_shared(directions)
                self.apply(waiting, group)
                waiting = started
        self.apply(waiting, group)

    def step_shards(self, group, params, directions):
        """Take orthogonal steps of shards; each matrix has an owner, who has it whole."""
        by_shape, batches = {}, []
        for i, (p, rows) in enumerate(zip(group['params'], group['parts'], strict=True)):
            by_shape.setdefault((p.shape, *rows), []).append(i)
        processes = group['params'][0].device_mesh['shard'].get_group()
        for (shape, *rows), numbers in by_shape.items():
            size = max(1, BATCH // shape.numel()) * processes.size()
            batches += [(numbers[i : i + size], rows) for i in range(0, len(numbers), size)]

        def orthogonal(whole, i):
            """Return the steps (n, rows, columns) of the matrices of batch i."""
            parts = whole.split(batches[i][1], dim=1)
            return torch.cat([orthogonalize(part, self.dtype) * tallness(part)
                              for part in parts], dim=1)

        shards = [([directions[i] for i in numbers], sum(rows)) for numbers, rows in batches]
        for (numbers, _), steps in zip(batches, map_whole(orthogonal, shards, processes),
                                       strict=True):
            steps = [step.to(params[0].dtype) for step in steps]
            update([params[i] for i in numbers], steps, group)

    def orthogonalize_shared(self, directions):
        """Share matrices among processes; -> (orthogonal (K, m, n), exchange or None)."""
        n, share = len(directions), -(-len(directions) // self.world.size)
        batch = [wide(x) for x in directions[self.world.rank * share :][:share]]
        batch += [torch.zeros_like(wide(directions[0]))] * (share - len(batch))  # equal shares
        batch = orthogonalize(torch.stack(batch), self.dtype)
        if self.world.size == 1:
            return batch, None
        x = batch.new_empty(share * self.world.size, *batch.shape[1:])
        return x[:n], gather(x, batch, async_op=True)

    @staticmethod
    def apply(started, group):
        """Take the steps of a batch: (parts of parameters, (K, m, n), exchange), or None."""
        if started:
            parts, directions, exchange = started
            if exchange:
                exchange.wait()
            steps = list(directions.to(parts[0].dtype))
            torch._foreach_mul_(steps, [tallness(part) for part in parts])
            update([wide(part) for part in parts], steps, group)


def update(params, steps, group):
    """Take steps and decay weights by rate times weight_decay; cautious: see below.

    Then only weights that the step moves towards 0 decay ("Cautious Weight Decay", Chen et al.
    2025), and the decay falls with the rate over its highest, as in nanochat and modded-nanogpt.
    """
    decay = group['lr'] * group['weight_decay']
    if group['cautious']:
        decay *= group['lr'] / group['highest']
        decays = [p * (p * step >= 0) for p, step in zip(params, steps, strict=True)]
        torch._foreach_add_(params, decays, alpha=-decay)
    elif decay:
        torch._foreach_mul_(params, 1 - decay)
    torch._foreach_add_(params, steps, alpha=-group['lr'])


def wide(x):
    """Return a matrix, or its transposed view if it has more rows than columns."""
    return x.T if x.size(0) > x.size(1) else x


def tallness(x):
    """Return the factor of the steps of matrices, sqrt(rows / columns) of tall ones."""
    return max(1.0, x.size(-2) / x.size(-1)) ** 0.5


def orthogonalize(x, dtype):
    """Map each U S V^T of x (K, m, n) to about U V^T: S of 0.71 to 1.29.

    That holds for singular values from 1% of the norm |S|_8 of a matrix; smaller ones grow 78
    times. A step multiplies X by a polynomial of X X^T. In fp32, wide matrices are multiplied once,
    by the product of these polynomials; in bf16 that would lose their small singular values.
    """
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT, dtype).mT
    x, is_wide = x.to(dtype), x.size(2) > 1.3 * x.size(1) and dtype != torch.bfloat16
    gram = symmetric(x, x.mT)  # (K, m, m), with the trace |S|_2^2
    trace = gram.diagonal(dim1=1, dim2=2).float().sum(1).clamp(min=1e-14)[:, None, None]
    gram = gram.div_(trace)
    square = symmetric(gram, gram)
    # the least bound of singular values in these products is |S|_8 = |S^4|_2^(1/4)
    bound = square.float().norm(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-7)
    gram, square = gram.div_(bound), square.div_(bound.square())
    x = x * (trace * bound).rsqrt().to(dtype)
    factor = product = None
    for a, b, c in QUINTICS:
        if factor is not None:
            gram = symmetric(factor, symmetric(factor, gram)) if is_wide else symmetric(x, x.mT)
            square = symmetric(gram, gram)
        factor = (b * gram).add_(square, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        if is_wide:
            product = factor if product is None else symmetric(factor, product)
        else:
            x = factor @ x
    return product @ x if is_wide else x


def symmetric(a, b, out=None):
    """Multiply (K, m, n) by (K, n, m) to a symmetric product.

    On a CPU it takes 11/16 of the work of any product.
    """
    m = a.size(1)
    if m < 192 or a.device.type != 'cpu':  # where small products are slow
        return torch.bmm(a, b, out=out)
    out, half = a.new_empty(len(a), m, m) if out is None else out, m // 2
    torch.bmm(a[:, :half], b, out=out[:, :half])
    symmetric(a[:, half:], b[:, :, half:], out[:, half:, half:])
    out[:, half:, :half] = out[:, :half, half:].mT
    return out


def momentum_at(step, momentum):
    """Return Muon's momentum, lower in 300 steps: early gradients age fast."""
    first = min(0.85, momentum)
    return first + (momentum - first) * min(1.0, step / 300)
