"""Cut a training step into micro-batches that fit into memory."""

from dataclasses import dataclass

from configurator import UserError


@dataclass(frozen=True)
class Stages:
    """Grow the batch in n equal stages: a step of the k-th has k / n of it.

    Three stages are those of modded-nanogpt's record 46. end: the step where the last one ends.
    """

    n: int = 1
    end: int = 0

    def until(self, step):
        """Return the n-ths of a batch that the steps before this one take."""
        # each stage adds one n-th to all steps from its first, k end / n rounded up
        return sum(max(0, step + -k * self.end // self.n) for k in range(self.n))

    def share(self, step):
        """Return the part of the batch that a step takes, above 0 to 1."""
        return (self.until(step + 1) - self.until(step)) / self.n


def stages_of(config):
    """Return the Stages of train.py's settings, which end with its schedule."""
    end = config.get('lr_decay_iters') or config.get('max_iters', 0)
    return Stages(config.get('batch_stages', 1), end)


@dataclass
class Cut:
    """Describe a step's cut: sequences -> processes -> micro-batches of batch_size.

    With stages, that of a step of the last one. Earlier steps have fewer micro-batches.
    """

    sequences: int  # per step, over all processes
    block_size: int
    batch_size: int = 1
    micro_steps: int = 1  # per process
    stages: Stages = Stages()

    @property
    def tokens(self):
        return self.sequences * self.block_size

    def tokens_of(self, step, end):
        """Return the tokens of the steps from one to before another."""
        parts = self.stages.until(end) - self.stages.until(step)
        return parts * self.tokens // self.stages.n

    @property
    def smaller(self):
        """Return the next smaller batch_size that divides the step; 0: none."""
        return self.largest(self.batch_size - 1)

    def largest(self, most):
        """Return the largest batch_size up to `most` that divides all steps, or 0."""
        per_process = self.batch_size * self.micro_steps // self.stages.n
        return max((n for n in range(1, most + 1) if per_process % n == 0), default=0)

    def resize(self, batch_size):
        """Set batch_size, in place: the step stays the same."""
        self.micro_steps = self.micro_steps * self.batch_size // batch_size
        self.batch_size = batch_size


def cut_step(config, block_size, n_processes):
    """Cut a step into micro-batches; -> Cut.

    config: total_batch_size in tokens, 0 for nanoGPT's gradient_accumulation_steps * batch_size *
    block_size; batch_size, 'auto' for micro-batches of one sequence, until fit.choose_batch()
    resizes them. Raises UserError naming a setting that divides evenly.
    """
    stages = stages_of(config)
    tokens, unit = config['total_batch_size'], block_size * n_processes * stages.n
    is_auto = config['batch_size'] == 'auto'
    if tokens == 0:
        tokens = config['gradient_accumulation_steps'] * block_size
        if is_auto:
            raise UserError(f"batch_size='auto' needs the tokens of a step, which it must not "
                            f'change; expected, for example, --total_batch_size={12 * tokens}')
        tokens *= config['batch_size']
    if tokens % unit:
        part = f'1/{stages.n} of ' * (stages.n > 1)
        raise UserError(f'{part}a step of {tokens:,} tokens is not a whole number of sequences of '
                        f'{block_size} tokens for each of {n_processes} processes; try '
                        f'--total_batch_size={max(1, tokens // unit) * unit}')
    per_process = tokens // unit  # in the first stage
    whole = Cut(tokens // block_size, block_size, per_process, stages.n, stages)
    batch_size = 1 if is_auto else min(config['batch_size'], per_process)
    if per_process % batch_size:
        raise UserError(f'{per_process} sequences per step and process are not a whole number of '
                        f'micro-batches of batch_size={batch_size}; try '
                        f'--batch_size={whole.largest(batch_size)}, which keeps the mathematics')
    whole.resize(batch_size)
    return whole
