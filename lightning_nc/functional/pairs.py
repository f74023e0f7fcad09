"""All pairs of classes, or random ones, in blocks that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

__all__ = ["Pairs", "check_pairs", "deviation_over_pairs", "log_mean_exp_over_pairs", "mean_over_pairs"]

_BLOCK = 2**20
"""Numbers that are processed together: with 50,000 classes a matrix of all pairs would take 20 GB."""


class Pairs(NamedTuple):
    """Pairs of classes. Of slices: each class of ``left`` with each of ``right``, once; of tensors: one by one."""

    left: slice | Tensor
    right: slice | Tensor

    def products(self, rows: Tensor) -> Tensor:
        """Inner products of the two rows of each pair."""
        left, right = rows[self.left], rows[self.right]
        return self._once(left @ right.T) if isinstance(self.left, slice) else torch.linalg.vecdot(left, right)

    def sums(self, values: Tensor) -> Tensor:
        """Sums of the two values of each pair."""
        left, right = values[self.left], values[self.right]
        return self._once(left.unsqueeze(1) + right) if isinstance(self.left, slice) else left + right

    def squared_distances(self, rows: Tensor) -> Tensor:
        """Squared distances between the two rows of each pair."""
        left, right = rows[self.left], rows[self.right]
        if not isinstance(self.left, slice):
            return (left - right).square().sum(dim=1)
        norms = self._once(left.square().sum(dim=1, keepdim=True) + right.square().sum(dim=1))
        squares = norms - 2 * self.products(rows)
        # A matrix product is much faster than differences, but cancels where rows are near to each other.
        near = (squares.detach() <= 0.01 * norms.detach()).nonzero().flatten()
        if len(near):
            index = self._once(torch.arange(len(left) * len(right), device=rows.device).view(len(left), -1))
            for part in near.split(max(1, _BLOCK // rows.shape[1])):
                difference = left[index[part] // len(right)] - right[index[part] % len(right)]
                squares[part] = difference.square().sum(dim=1)
        return squares

    def _once(self, matrix: Tensor) -> Tensor:
        """The entries of a matrix of all pairs, each pair once."""
        if self.left != self.right:
            return matrix.flatten()
        i, j = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
        return matrix[i, j]


def _all_pairs(classes: int, size: int) -> Iterator[Pairs]:
    blocks = [slice(start, min(start + size, classes)) for start in range(0, classes, size)]
    return (Pairs(left, right) for i, left in enumerate(blocks) for right in blocks[i:])


def _random_pairs(classes: int, count: int, size: int, device: torch.device) -> Iterator[Pairs]:
    """Independent pairs of two classes, the same ones on every device and rank; no other random stream moves."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, size):
        drawn = torch.randint(classes * (classes - 1), (min(size, count - start),), generator=generator).to(device)
        left, right = drawn // (classes - 1), drawn % (classes - 1)
        yield Pairs(left, right + (right >= left))


def _walk(rows: Tensor, values: Callable[[Pairs], Tensor], pairs: int | None) -> tuple[int, bool, Iterator[Tensor]]:
    """How many pairs there are, whether they are sampled, and the values of each block of them."""
    (classes, width), device = rows.shape, rows.device
    total = math.comb(classes, 2)
    sampled = pairs is not None and pairs < total
    count = min(pairs or total, total)
    numbers = 2**18 if device.type == "cpu" else 2**22  # of a block; fits the cache of the CPU
    size = max(1, numbers // width) if sampled else math.isqrt(numbers)
    blocks = _random_pairs(classes, count, size, device) if sampled else _all_pairs(classes, size)
    quiet = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0

    def found() -> Iterator[Tensor]:
        with tqdm(total=count, desc="Pairs of classes", unit_scale=True, leave=False, delay=5, disable=quiet) as bar:
            for block in blocks:
                yield (block_values := values(block))
                bar.update(block_values.numel())

    return count, sampled, found()


def mean_over_pairs(rows: Tensor, values: Callable[[Pairs], Tensor], pairs: int | None) -> tuple[Tensor, Tensor]:
    """The mean over the pairs of classes of ``values``, which gives one value a pair, and its standard error.

    The standard error is zero if the mean is over all pairs.

    Args:
        rows: what the classes have, (K, d).
        values: called with blocks of pairs.
        pairs: number of pairs to sample if there are more; None for all of them.
    """
    count, sampled, blocks = _walk(rows, values, pairs)
    center: Tensor | None = None
    summed = squares = rows.new_zeros(())  # not a list, whose small tensors would fragment the memory
    for found in blocks:
        center = found.detach().mean() if center is None else center  # near the mean, so that nothing cancels
        squares = squares + (found.detach() - center).square().sum() if sampled else squares
        summed = summed + found.sum()
    mean = summed / count
    if not sampled or center is None:
        return mean, torch.zeros_like(mean)
    variance = squares / count - (mean.detach() - center).square()
    return mean, (variance.clamp(min=0) / (count - 1)).sqrt()


def deviation_over_pairs(rows: Tensor, values: Callable[[Pairs], Tensor], pairs: int | None) -> tuple[Tensor, Tensor]:
    """The population standard deviation over the pairs, and its standard error; see :func:`mean_over_pairs`."""
    mean, _ = mean_over_pairs(rows, values, pairs)
    variance, error = mean_over_pairs(rows, lambda block: (values(block) - mean).square(), pairs)
    # To first order the mean, an estimate too, adds no error; that of the root is d sqrt(v) = dv / (2 sqrt(v)).
    zero = variance == 0  # where the root has no gradient
    deviation = variance.where(~zero, 1).sqrt() * ~zero
    return deviation, (error / (2 * deviation)).where(~zero, 0)


def log_mean_exp_over_pairs(rows: Tensor, logs: Callable[[Pairs], Tensor]) -> Tensor:
    """The logarithm of the mean over all pairs of exp(``logs``), which may leave the floating range."""
    count, _, blocks = _walk(rows, logs, None)
    summed = rows.new_full((), -math.inf)
    for found in blocks:
        summed = torch.logaddexp(summed, found.logsumexp(dim=0))
    return summed - math.log(count)


def check_pairs(pairs: float | None) -> int | None:
    """The number of pairs of classes to sample as an integer: 1e6 is accepted."""
    if pairs is None:
        return None
    if not isinstance(pairs, Real) or pairs < 2 or not float(pairs).is_integer():
        raise ValueError(
            f"pairs must be a whole number of at least 2, such as 1e6, or None for all pairs of classes; got {pairs!r}"
        )
    return int(pairs)
