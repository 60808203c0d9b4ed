"""Divide work on whole matrices over the processes, for sharded and replicated matrices.

Shapes: M matrices, R rows, C columns, P processes. Each process works on K = ceil(M / P) matrices.
Matrices of zeros are appended if M is not a multiple of P.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from common.watchdog import waiting_for_processes

WAIT_DESCRIPTION = "the matrices of the other processes"


class MatrixExchange:
    """Base class, and the exchange of a single process: all matrices without communication."""

    def gather_share(self, rows: Tensor, num_rows: int) -> Tensor:
        """Return the share of whole matrices that this process works on, (K, R, C).

        Args:
            rows: The rows of all matrices that this process holds, (M, r, C).
            num_rows: Number of rows of a whole matrix, R.
        """
        return rows

    def return_rows(self, matrices: Tensor, count: int) -> Tensor:
        """Send the results to the processes that need them.

        Args:
            matrices: Results of this process, (K, R, C).
            count: Number of matrices, M.

        Returns:
            The rows of all results that this process holds, (M, r, C).
        """
        return matrices


class ReplicatedExchange(MatrixExchange):
    """For matrices that every process holds (DDP). The results are all-gathered."""

    def __init__(self) -> None:
        self.num_processes = dist.get_world_size()
        self.rank = dist.get_rank()

    def gather_share(self, rows: Tensor, num_rows: int) -> Tensor:
        """Return the share of this process; all processes hold whole matrices already."""
        return pad_matrices(rows, self.num_processes).chunk(self.num_processes)[self.rank]

    def return_rows(self, matrices: Tensor, count: int) -> Tensor:
        """Return the results of all processes."""
        results = matrices.new_empty(self.num_processes * len(matrices), *matrices.shape[1:])
        with waiting_for_processes(WAIT_DESCRIPTION):
            dist.all_gather_into_tensor(results, matrices.contiguous())
        return results[:count]


class ShardedExchange(MatrixExchange):
    """For matrices whose rows are divided over the processes (FSDP2). Uses two all-to-alls.

    Args:
        group: The processes that share the rows.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.num_processes = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def gather_share(self, rows: Tensor, num_rows: int) -> Tensor:
        """Send the local rows to the processes that work on them, and assemble the local share."""
        padded = pad_matrices(rows, self.num_processes)
        share = len(padded) // self.num_processes
        row_counts = count_rows(num_rows, self.num_processes)
        sent_sizes = [padded[:share].numel()] * self.num_processes
        received_sizes = [share * count * rows.shape[2] for count in row_counts]
        received = self._exchange(padded, sent_sizes, received_sizes)
        parts = [
            part.view(share, count, rows.shape[2])
            for part, count in zip(received.split(received_sizes), row_counts)
        ]
        return torch.cat(parts, dim=1)

    def return_rows(self, matrices: Tensor, count: int) -> Tensor:
        """Send each process its rows of the results of this process."""
        row_counts = count_rows(matrices.shape[1], self.num_processes)
        parts = matrices.split(row_counts, dim=1)
        local_size = parts[self.rank].numel()
        received = self._exchange(
            torch.cat([part.flatten() for part in parts]),
            [part.numel() for part in parts],
            [local_size] * self.num_processes,
        )
        num_padded = self.num_processes * len(matrices)
        return received.view(num_padded, -1, matrices.shape[2])[:count]

    def _exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Exchange parts of a tensor with all processes.

        Args:
            values: The parts for all processes, in the order of the processes.
            sent: Number of values to send to each process.
            received: Number of values to receive from each process.

        Returns:
            The received parts, concatenated in the order of the processes.
        """
        result = values.new_empty(sum(received))
        with waiting_for_processes(WAIT_DESCRIPTION):
            dist.all_to_all_single(result, values.flatten(), received, sent, group=self.group)
        return result


def pad_matrices(matrices: Tensor, multiple: int) -> Tensor:
    """Append matrices of zeros until their number is a multiple of `multiple`."""
    num_missing = -len(matrices) % multiple
    if num_missing == 0:
        return matrices
    return torch.cat([matrices, matrices.new_zeros(num_missing, *matrices.shape[1:])])


def count_rows(num_rows: int, num_shards: int) -> list[int]:
    """Return the number of rows that FSDP2 gives to each shard."""
    per_shard = math.ceil(num_rows / num_shards)
    return [min(per_shard, max(0, num_rows - i * per_shard)) for i in range(num_shards)]
