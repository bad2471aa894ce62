"""Cut a training step into micro-batches that fit into memory."""

from dataclasses import dataclass

from configurator import UserError


@dataclass
class Cut:
    """Describe a step's cut: sequences -> processes -> micro-batches of batch_size."""

    sequences: int  # per step, over all processes
    block_size: int
    batch_size: int = 1
    micro_steps: int = 1  # per process

    @property
    def tokens(self):
        return self.sequences * self.block_size

    @property
    def smaller(self):
        """Return the next smaller batch_size that divides the step; 0: none."""
        return self.largest(self.batch_size - 1)

    def largest(self, most):
        """Return the largest batch_size up to `most` that divides the step, or 0."""
        per_process = self.batch_size * self.micro_steps
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
    tokens, unit = config['total_batch_size'], block_size * n_processes
    is_auto = config['batch_size'] == 'auto'
    if tokens == 0:
        tokens = config['gradient_accumulation_steps'] * block_size
        if is_auto:
            raise UserError(f"batch_size='auto' needs the tokens of a step, which it must not "
                            f'change; expected, for example, --total_batch_size={12 * tokens}')
        tokens *= config['batch_size']
    if tokens % unit:
        raise UserError(f'a step of {tokens:,} tokens is not a whole number of sequences of '
                        f'{block_size} tokens for each of {n_processes} processes; try '
                        f'--total_batch_size={max(1, tokens // unit) * unit}')
    per_process = tokens // unit
    whole = Cut(tokens // block_size, block_size, per_process)
    batch_size = 1 if is_auto else min(config['batch_size'], per_process)
    if per_process % batch_size:
        raise UserError(f'{per_process} sequences per step and process are not a whole number of '
                        f'micro-batches of batch_size={batch_size}; try '
                        f'--batch_size={whole.largest(batch_size)}, which keeps the mathematics')
    whole.resize(batch_size)
    return whole
