"""Fast gradient descent for `ufm.py`: gradients in closed form, several models together, no allocation inside the loop.

Shapes are the paper's, with the models in front: W2 (S, K, d), W1 (S, d, d), H (S, d, N), labels Y and errors E (S, K, N).
E is the derivative of the loss with respect to the outputs, times N. Each product is fused with the decay that the
regularization causes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ufm import UFM, Configuration


@torch.no_grad()
def descend(models: list[UFM], steps: int) -> None:
    """Update several models of one configuration in place; only ``lambda_b`` and the start may differ between them."""
    c = models[0].c
    Y = nn.functional.one_hot(models[0].labels, c.num_classes).T.to(torch.float64).expand(len(models), -1, -1)
    W2 = torch.stack([m.classifier.weight for m in models])
    H = torch.stack([m.features.T for m in models])
    W1 = None if c.model == "plain" else torch.stack([m.hidden.weight for m in models])
    b = None if c.lambda_b == math.inf else torch.stack([m.classifier.bias[:, None] for m in models])
    decay_b = 1 - c.step * torch.tensor([m.c.lambda_b for m in models], dtype=torch.float64)[:, None, None]
    if c.model == "relu":
        descend_relu(c, W2, W1, H, Y, steps)
    elif c.loss == "mse":
        samples = Compressed(H, Y)
        descend_linear(c, W2, W1, b, decay_b, samples.H, samples.Y, samples.ones, steps)
        H = samples.expand()
    else:
        descend_linear(c, W2, W1, b, decay_b, H, Y, torch.ones_like(Y[:, :1]), steps)
    for i, m in enumerate(models):
        m.classifier.weight.copy_(W2[i])
        m.features.copy_(H[i].T)
        if W1 is not None:
            m.hidden.weight.copy_(W1[i])
        if b is not None:
            m.classifier.bias.copy_(b[i, :, 0])


class Compressed:
    """The N samples of a linear model with MSE loss, represented exactly by K + d columns.

    Objective and descent do not change if H, Y and the ones that multiply the bias are multiplied from the right by the
    same orthogonal matrix. The matrix used here starts with Y'/sqrt(n), followed by the right factor of the deviations from
    the class means. It leaves K + d nonzero columns, and the other columns stay zero during descent.
    """

    def __init__(self, H: Tensor, Y: Tensor) -> None:
        classes, samples = Y.shape[1:]
        self.labels, self.root = Y, math.sqrt(samples / classes)
        means = H @ Y.mT * (classes / samples)
        # With at least as many features as samples this saves nothing, but it remains exact.
        self.basis, triangle = torch.linalg.qr((H - means @ Y).mT)
        self.H = torch.cat([self.root * means, triangle.mT], dim=2)
        rest = Y.new_zeros(len(Y), classes, triangle.shape[1])
        self.Y = torch.cat([self.root * torch.eye(classes).to(Y).expand(len(Y), -1, -1), rest], dim=2)
        self.ones = self.Y.sum(dim=1, keepdim=True)

    def expand(self) -> Tensor:
        """The features of all samples."""
        classes = self.labels.shape[1]
        return self.H[:, :, :classes] / self.root @ self.labels + self.H[:, :, classes:] @ self.basis.mT


def descend_linear(
    c: Configuration,
    W2: Tensor,
    W1: Tensor | None,
    b: Tensor | None,
    decay_b: Tensor,
    H: Tensor,
    Y: Tensor,
    ones: Tensor,
    steps: int,
) -> None:
    """The plain and the extended linear model. With P = W2 W1 no product is larger than K d times the samples."""
    rate = -c.step / (c.num_classes * c.samples_per_class)
    decay_w2, decay_w1, decay_h = (1 - c.step * x for x in (c.lambda_w, c.lambda_w1, c.lambda_h))
    offset, E, P, gradient = -Y, torch.empty(Y.shape, dtype=Y.dtype), torch.empty_like(W2), torch.empty_like(W2)
    # Each update needs the other factor as it was before the step, so W2 alternates between two tensors.
    new, old = W2.clone(), W2
    new_T, old_T, P_T, H_T, ones_T = new.mT, old.mT, P.mT, H.mT, ones.mT
    for _ in range(steps):
        if W1 is None:
            P, P_T = old, old_T
        else:
            torch.bmm(old, W1, out=P)
        if b is not None:
            torch.baddbmm(Y, b, ones, beta=-1, out=offset)
        if c.loss == "mse":
            torch.baddbmm(offset, P, H, out=E)
        else:
            torch.bmm(P, H, out=E) if b is None else torch.baddbmm(offset.add_(Y), P, H, out=E)
            torch.softmax(E, dim=1, out=E).sub_(Y)
        if W1 is None:
            torch.baddbmm(old, E, H_T, beta=decay_w2, alpha=rate, out=new)
        else:
            torch.bmm(E, H_T, out=gradient)
            torch.baddbmm(old, gradient, W1.mT, beta=decay_w2, alpha=rate, out=new)
            W1.baddbmm_(old_T, gradient, beta=decay_w1, alpha=rate)
        if b is not None:
            b.mul_(decay_b).baddbmm_(E, ones_T, alpha=rate)
        H.baddbmm_(P_T, E, beta=decay_h, alpha=rate)
        new, old, new_T, old_T = old, new, old_T, new_T
    W2.copy_(old)


def descend_relu(c: Configuration, W2: Tensor, W1: Tensor, H: Tensor, Y: Tensor, steps: int) -> None:
    """The extended ReLU model."""
    rate = -c.step / (c.num_classes * c.samples_per_class)
    decay_w2, decay_w1, decay_h = (1 - c.step * x for x in (c.lambda_w, c.lambda_w1, c.lambda_h))
    E, H2, G = torch.empty(Y.shape, dtype=Y.dtype), torch.empty_like(H), torch.empty_like(H)
    minus_Y, H_T, H2_T = -Y, H.mT, H2.mT
    new2, old2, new1, old1 = W2.clone(), W2, W1.clone(), W1
    new2_T, old2_T, new1_T, old1_T = new2.mT, old2.mT, new1.mT, old1.mT
    for _ in range(steps):
        torch.bmm(old1, H, out=H2).clamp_min_(0)
        if c.loss == "mse":
            torch.baddbmm(minus_Y, old2, H2, out=E)
        else:
            torch.softmax(torch.bmm(old2, H2, out=E), dim=1, out=E).sub_(Y)
        torch.bmm(old2_T, E, out=G)
        torch.ops.aten.threshold_backward.grad_input(G, H2, 0, grad_input=G)
        torch.baddbmm(old2, E, H2_T, beta=decay_w2, alpha=rate, out=new2)
        torch.baddbmm(old1, G, H_T, beta=decay_w1, alpha=rate, out=new1)
        H.baddbmm_(old1_T, G, beta=decay_h, alpha=rate)
        new2, old2, new2_T, old2_T = old2, new2, old2_T, new2_T
        new1, old1, new1_T, old1_T = old1, new1, old1_T, new1_T
    W2.copy_(old2)
    W1.copy_(old1)
