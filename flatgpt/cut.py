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
    smaller: int = 0  # the next smaller batch_size that divides the step; 0: none

    @property
    def tokens(self):
        return self.sequences * self.block_size


def cut_step(config, block_size, n_processes):
    """Cut a step into micro-batches; -> Cut.

    config: total_batch_size in tokens, 0 for nanoGPT's gradient_accumulation_steps * batch_size *
    block_size; batch_size. Raises UserError naming a setting that divides evenly.
    """
    tokens, unit = config['total_batch_size'], block_size * n_processes
    if tokens == 0:
        tokens = config['gradient_accumulation_steps'] * config['batch_size'] * block_size
    if tokens % unit:
        raise UserError(f'a step of {tokens:,} tokens is not a whole number of sequences of '
                        f'{block_size} tokens for each of {n_processes} processes; try '
                        f'--total_batch_size={max(1, tokens // unit) * unit}')
    per_process = tokens // unit
    batch_size = min(config['batch_size'], per_process)
    smaller = max((n for n in range(1, batch_size) if per_process % n == 0), default=0)
    if per_process % batch_size:
        raise UserError(f'{per_process} sequences per step and process are not a whole number of '
                        f'micro-batches of batch_size={batch_size}; try --batch_size={smaller}, '
                        f'which keeps the mathematics')
    return Cut(tokens // block_size, block_size, batch_size, per_process // batch_size, smaller)
