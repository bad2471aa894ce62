"""
Optimize the matrices of blocks by Muon, the rest by AdamW.

A step is the momentum of a matrix with all singular values brought to about 1. So rare directions
of the gradient count as much as frequent ones. Source: Keller Jordan et al. 2024
(kellerjordan.github.io/posts/muon, github.com/KellerJordan/Muon). In every
parameter group, lr_scale times the rate of the schedule is the rate of the group.
"""

import torch
import torch.distributed as dist

from flatgpt.owners import local, map_whole

BATCH = 2**26  # numbers that a process orthogonalizes at once: 128 MB in bf16
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
    matrices = {name: p for name, p in named.items() if '.h.' in name and p.dim() == 2}
    embeddings = [p for name, p in named.items() if p in tables]
    rest = [p for name, p in named.items() if name not in matrices and p not in tables]
    groups = [{'params': list(matrices.values()), 'lr_scale': config['muon_lr'] / lr,
               'parts': [parts_of(name, model.config) for name in matrices],
               'weight_decay': config['weight_decay'], 'momentum': config.get('momentum', 0.95),
               'fused': False},  # fused, loading would move step counts to the GPU, slow to read
              {'params': embeddings, 'lr_scale': config['embedding_lr'] / lr, **no_decay},
              {'params': rest, 'lr_scale': 1.0, **no_decay}]
    groups = [group for group in groups if group['params']]
    return Muon(groups, lr, (config['beta1'], config['beta2']), dtype, world)


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
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
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
                self.apply(waiting, group['lr'])
                waiting = started
        self.apply(waiting, group['lr'])

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
            torch._foreach_add_([params[i] for i in numbers], steps, alpha=-group['lr'])

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
    def apply(started, lr):
        """Take the steps of a batch: (parts of parameters, (K, m, n), exchange), or None."""
        if started:
            parts, directions, exchange = started
            if exchange:
                exchange.wait()
            steps = list(directions.to(parts[0].dtype))
            torch._foreach_mul_(steps, [tallness(part) for part in parts])
            torch._foreach_add_([wide(part) for part in parts], steps, alpha=-lr)


def wide(x):
    """Return a matrix, or its transposed view if it has more rows than columns."""
    return x.T if x.size(0) > x.size(1) else x


def tallness(x):
    """Return the factor of the steps of matrices, sqrt(rows / columns) of tall ones."""
    return max(1.0, x.size(-2) / x.size(-1)) ** 0.5


def orthogonalize(x, dtype, steps=5):
    """Map each U S V^T of x (K, m, n) to about U V^T: S of 0.7 to 1.2."""
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT, dtype, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315  # x -> a x + b x^3 + c x^5, the steepest at 0
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(steps):  # Newton and Schulz's iteration
        gram = x @ x.mT  # (K, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def momentum_at(step, momentum):
    """Return Muon's momentum, lower in 300 steps: early gradients age fast."""
    first = min(0.85, momentum)
    return first + (momentum - first) * min(1.0, step / 300)
