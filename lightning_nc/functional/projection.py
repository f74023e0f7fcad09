"""A few classes in the coordinates of a picture: the span of their class means, turned onto the ideal frame."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["AXES", "check_few", "simplex", "span_of_means"]

AXES = 3
"""Coordinates of a picture."""


def check_few(classes: Sequence[int]) -> tuple[int, ...]:
    """The classes of a picture; ``ValueError`` unless they are two to four different ones."""
    found = tuple(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in found)
    if not (whole and 2 <= len(set(found)) == len(found) <= AXES + 1):
        raise ValueError(f"geometry must be two to four different class indices, such as (0, 1, 2), got {classes!r}")
    return found


def simplex(classes: int) -> Tensor:
    r"""The corners of a regular simplex around the origin at distance 1, (k, 3) in float64, for k = 2, 3 or 4.

    These are the directions of the class means of a simplex ETF of k classes: a segment, a triangle in the plane of the first
    two coordinates, a tetrahedron.

    Example:
        >>> corners = simplex(3)
        >>> (corners @ corners.T).round(decimals=3)
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]], dtype=torch.float64)
    """
    third, root = 1 / 3, math.sqrt
    corners = {
        2: [[-1, 0, 0], [1, 0, 0]],
        3: [[0, 1, 0], [-root(3) / 2, -0.5, 0], [root(3) / 2, -0.5, 0]],
        4: [
            [0, 0, 1],
            [root(8) / 3, 0, -third],
            [-root(2) / 3, root(6) / 3, -third],
            [-root(2) / 3, -root(6) / 3, -third],
        ],
    }
    return torch.tensor(corners[classes], dtype=torch.float64)


def span_of_means(means: Tensor) -> Tensor:
    r"""Orthonormal axes of the span of centered class means in which these are closest to the corners of :func:`simplex`.

    .. math:: \arg\min_{Q^\top Q = I} \| (M - 1 \bar m^\top) Q - c S \|_F = U V^\top, \qquad
        (M - 1 \bar m^\top)^\top S = U \Sigma V^\top

    (orthogonal Procrustes; the scale c makes no difference). Class means of a simplex ETF come to lie on the corners, and class
    means that move come to lie where their last position was, but for their own motion.

    Args:
        means: (k, d), k = 2, 3 or 4; all finite.

    Returns:
        (d, 3) in float64, with columns of zero beyond the first k - 1.

    Source: Schönemann (1966), A generalized solution of the orthogonal Procrustes problem.
    """
    used = len(means) - 1
    # The corners sum to zero, so the mean of the class means drops out.
    left, _, right = torch.linalg.svd(means.double().T @ simplex(len(means))[:, :used], full_matrices=False)
    return torch.nn.functional.pad(left @ right, (0, AXES - used))
