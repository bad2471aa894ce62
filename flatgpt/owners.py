"""
Compute with whole matrices of which each process holds some rows.

A process owns every n-th matrix of a batch. One exchange brings it the other processes' rows of
its matrices. It computes with whole matrices, and returns each process's rows.
"""

import torch
import torch.distributed as dist


def local(x):
    """Return a tensor, or this process's part of a sharded one."""
    return x.to_local() if hasattr(x, 'to_local') else x


def like(parameter, whole):
    """Return the DTensor of a whole tensor, with the shards of a parameter."""
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    # every process has the whole: nothing is sent
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements,
                             src_data_rank=None)


class Owners:
    """Divide matrices of one shape, sharded by rows, among the processes of a group.

    rows: of a whole matrix. shards: one (rows of this process, columns) for each matrix.
    """

    def __init__(self, shards, rows, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.columns, self.n = shards[0].size(1), len(shards)
        height = -(-rows // self.size)  # FSDP's parts: the last ones may be smaller, or empty
        self.heights = [max(0, min(height, rows - height * i)) for i in range(self.size)]
        self.n_owned = len(range(self.rank, self.n, self.size))
        self.order = [i for owner in range(self.size) for i in range(owner, self.n, self.size)]
        # numbers that this process sends to each owner, and that it gets from each process
        height = self.heights[self.rank]
        self.sent = [len(range(owner, self.n, self.size)) * height * self.columns
                     for owner in range(self.size)]
        self.received = [self.n_owned * height * self.columns for height in self.heights]
        self.parts = torch.cat([shards[i].reshape(-1) for i in self.order])

    def gather(self):
        """Send all shards to the owners; -> (buffer, request)."""
        buffer = self.parts.new_empty(sum(self.received))
        return buffer, dist.all_to_all_single(buffer, self.parts, self.received, self.sent,
                                              self.group, async_op=True)

    def whole(self, buffer):
        """Return the matrices of this process from a buffer: (n_owned, rows, columns)."""
        pieces = buffer.split(self.received)
        return torch.cat([piece.view(self.n_owned, height, self.columns)
                          for piece, height in zip(pieces, self.heights, strict=True)], dim=1)

    def scatter(self, results):
        """Send results (n_owned, rows, columns) back; -> (buffer, request)."""
        parts = torch.cat([part.reshape(-1) for part in results.split(self.heights, dim=1)])
        buffer = parts.new_empty(sum(self.sent))
        return buffer, dist.all_to_all_single(buffer, parts, self.sent, self.received, self.group,
                                              async_op=True)

    def shards(self, buffer):
        """Return this process's rows of all results, in the input's order."""
        shards = buffer.view(self.n, self.heights[self.rank], self.columns)
        return [shards[self.order.index(i)] for i in range(self.n)]


def map_whole(function, batches, group):
    """Yield the shards of function(matrices, i) for each of [(shards, rows), ...].

    function: of whole matrices (n, rows, columns) and the number of their batch. Exchanges of the
    batches before and after run meanwhile.
    """
    gathering = scattering = None
    for i in range(len(batches) + 2):
        started = Owners(*batches[i], group) if i < len(batches) else None
        gather = started and started.gather()
        results = None
        if gathering:
            owners, (buffer, request) = gathering
            request.wait()
            results = owners, owners.scatter(function(owners.whole(buffer), i - 1))
        if scattering:
            owners, (buffer, request) = scattering
            request.wait()
            yield owners.shards(buffer)
        gathering, scattering = started and (started, gather), results
