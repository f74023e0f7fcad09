"""A classifier that is fixed to a simplex equiangular tight frame (ETF)."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor, nn

__all__ = ["SimplexETF"]


class SimplexETF(nn.Module):
    r"""A linear layer without bias whose weight is a simplex ETF that training does not change.

    :math:`W = \sqrt{K / (K - 1)} \, C U^\top`, where the K - 1 columns of C (K, K - 1) are an orthonormal basis of the
    vectors of zero sum, so that :math:`C C^\top = I - 11^\top / K`, and the columns of U (d, K - 1) are orthonormal and
    uniformly random. Rows have norm 1, and two rows have the cosine -1 / (K - 1).

    ``weight`` is a buffer: it is saved in ``state_dict()``, moves with the module, and is no parameter. Optimizers, weight
    decay and gradient clipping do not see it, and DistributedDataParallel gives all ranks that of rank 0. The callback and
    :func:`lightning_nc.measure` find the layer as the classifier. It is no ``nn.Linear``, so functions that initialize all
    linear layers of a model leave it alone.

    Args:
        num_features: d; ``in_features`` of the layer.
        num_classes: K, from 2 to d + 1; ``out_features`` of the layer.
        device, dtype: of ``weight``. The frame is computed in float64 on the CPU, so a seed gives the same on all devices.
        generator: a random generator on the CPU; by default torch's global one.

    Shapes: input (..., d), output (..., K).

    Raises:
        ValueError: for sizes for which there is no simplex ETF.

    Source: Papyan et al. (2020), definition of the simplex ETF; Zhu et al. (arXiv 2105.02375), as a fixed classifier.

    Example:
        >>> import torch
        >>> head = SimplexETF(8, 3, dtype=torch.float64)
        >>> gram = head.weight @ head.weight.T
        >>> torch.testing.assert_close(gram, 1.5 * torch.eye(3, dtype=torch.float64) - 0.5)
    """

    weight: Tensor

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (("num_features", num_features, 1), ("num_classes", num_classes, 2)):
            if not isinstance(size, int | numpy.integer) or size < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")
        if num_classes > num_features + 1:
            raise ValueError(
                f"no simplex ETF of {num_classes} vectors exists in {num_features} dimensions: num_classes must be at most "
                "num_features + 1; use more features"
            )
        self.in_features, self.out_features = int(num_features), int(num_classes)
        self.register_buffer("weight", torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw another rotation of the frame."""
        classes = self.out_features
        normal = torch.randn(
            self.in_features, classes - 1, dtype=torch.float64, device=torch.device("cpu"), generator=generator
        )
        basis, triangle = torch.linalg.qr(normal)
        directions = basis * triangle.diagonal().sign()  # now uniform over all rotations and reflections
        # The reflection that maps the vector of ones to the first axis, without that axis.
        contrasts = normal.new_full((classes, classes - 1), -1 / (classes - math.sqrt(classes)))
        contrasts[0] = 1 / math.sqrt(classes)
        contrasts[1:].diagonal().add_(1)
        self.weight.copy_(math.sqrt(classes / (classes - 1)) * contrasts @ directions.T)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., K) of features (..., d)."""
        return nn.functional.linear(features, self.weight)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
