r"""Global minima of the unconstrained features models of Tirer & Bruna (2022), in closed form.

In a UFM the features of the N = K n training samples are free variables, regularised like the weights. With Y
the K x N one-hot labels and ``H``, ``H1`` of shape (d, N), the objectives are

    plain (eq. 3):              1/(2N) ||W H + b 1' - Y||^2 + lw/2 ||W||^2 + lh/2 ||H||^2 + lb/2 ||b||^2
    extended linear (eq. 23):   1/(2N) ||W2 W1 H1 - Y||^2   + lw2/2 ||W2||^2 + lw1/2 ||W1||^2 + lh1/2 ||H1||^2
    extended ReLU (eq. 24):     the same with W2 relu(W1 H1)

At a global minimum the features of a class are one point, so a minimizer is described by K class means and
the weights. Every minimizer returned here is one of a family: multiply the features by any orthogonal matrix,
and the weights by its transpose. The members chosen lie along the coordinate axes, where the features of an
orthogonal frame are non-negative and a ReLU leaves them as they are. Everything is float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Frame = Literal["of", "etf", "between", "zero"]


@dataclass(frozen=True)
class Minimum:
    """The global minimum of a UFM and one of its minimizers.

    ``frame`` names the structure of the class means and of the weight's rows, which are aligned: ``"of"`` an
    orthogonal frame, ``"etf"`` a simplex equiangular tight frame, ``"between"`` neither (their centred
    versions are a simplex ETF), ``"zero"`` the collapse of everything to the origin, which is what too strong
    a regularisation does.

    The means and the weight are multiples of one K x K matrix, ``centred (I - 11'/K) + mean 11'/K``.
    """

    objective: float
    frame: Frame
    num_classes: int
    means_factor: float
    weight_factor: float
    centred: float
    mean: float
    bias_entry: float

    def class_means(self, d: int) -> Tensor:
        """The features of each class, shape (K, d); for an extended model those of the deepest level.

        Raises:
            ValueError: if ``d`` is smaller than K.
        """
        return self.means_factor * self._embedded(d)

    def weight(self, d: int) -> Tensor:
        """The weight of the last layer, shape (K, d).

        Raises:
            ValueError: if ``d`` is smaller than K.
        """
        return self.weight_factor * self._embedded(d)

    @property
    def bias(self) -> Tensor:
        """The bias of the last layer, shape (K,); zeros for a model without one."""
        return torch.full((self.num_classes,), self.bias_entry, dtype=torch.float64)

    def _embedded(self, d: int) -> Tensor:
        if d < self.num_classes:
            raise ValueError(
                f"the theorems need at least as many features as classes, "
                f"got d = {d} for num_classes = {self.num_classes}; pass d >= {self.num_classes}"
            )
        average = torch.full((self.num_classes, self.num_classes), 1 / self.num_classes, dtype=torch.float64)
        identity = torch.eye(self.num_classes, dtype=torch.float64)
        # Written as one coefficient of I and one of the average, an orthogonal frame has exact zeros off its
        # diagonal.
        frame = self.centred * identity + (self.mean - self.centred) * average
        return torch.nn.functional.pad(frame, (0, d - self.num_classes))


@dataclass(frozen=True)
class ExtendedMinimum(Minimum):
    """The global minimum of the extended models, linear and ReLU; ``class_means`` are the columns of W1 H1.

    The whole minimizer is ``weight(d)`` = W2, ``first_weight(d)`` = W1 and ``first_class_means(d)``, the
    columns of H1. It is non-negative, so that it minimizes the ReLU model as well.
    """

    first_means_factor: float
    first_weight_factor: float
    penalty: float

    def first_class_means(self, d: int) -> Tensor:
        """The features of each class in the first layer, shape (K, d).

        Raises:
            ValueError: if ``d`` is smaller than K.
        """
        return self.first_means_factor * self._embedded(d)

    def first_weight(self, d: int) -> Tensor:
        """The weight between the two levels of features, shape (d, d).

        Raises:
            ValueError: if ``d`` is smaller than K.
        """
        weight = self.first_weight_factor * self._embedded(d)
        return torch.nn.functional.pad(weight, (0, 0, 0, d - self.num_classes))

    def level(self, dead: Sequence[float]) -> float:
        r"""The level where the ReLU model stops when a share ``dead[k]`` of class k's samples is switched
        off.

        A sample whose pre-activations are all negative receives no gradient, decays to zero and pays 1/(2N)
        for ever. The share p of class k that is alive still collapses to its own axis, and the objective is
        ``1/K sum_k [p_k min_s phi(s; a p_k^(-2/3)) + (1 - p_k)/2]`` with phi of :func:`extended_ufm`. A class
        that is wholly dead pays 1/(2K): rank r leaves ``r/K f* + (1 - r/K)/2``, which is the level of a
        rank-r stationary point of the linear model too. Not in the paper.

        Args:
            dead: one share in [0, 1] per class, the number of dead samples divided by n.

        Raises:
            ValueError: if ``dead`` does not hold K shares.
        """
        if len(dead) != self.num_classes or not all(0 <= share <= 1 for share in dead):
            raise ValueError(
                f"dead must hold {self.num_classes} shares between 0 and 1, one per class, got {list(dead)}; "
                f"divide the numbers of dead samples by samples_per_class"
            )
        alive = [1 - share for share in dead]
        cost = [p * _three_factors(self.penalty * p ** (-2 / 3))[1] if p > 0 else 0.0 for p in alive]
        return math.fsum(c + (1 - p) / 2 for c, p in zip(cost, alive, strict=True)) / self.num_classes


def plain_ufm(
    num_classes: int, samples_per_class: int, lambda_w: float, lambda_h: float, lambda_b: float = math.inf
) -> Minimum:
    r"""The global minimum of the plain UFM with MSE loss, eq. (3), for any regularisation of the bias.

    With c = K sqrt(n lambda_h lambda_w) and g(c) = c - c^2/2:

    - no bias (``lambda_b = inf``, Theorem 3.1): f* = g(c), an orthogonal frame of squared norm
      (1 - c) sqrt(lambda_w / (n lambda_h)), eq. (7), with w_k = sqrt(n lambda_h / lambda_w) h_k, eq. (9).
    - free bias (``lambda_b = 0``, Theorem 3.2): f* = (K - 1)/K g(c), a simplex ETF of squared norm
      (1 - c) (K - 1)/K sqrt(lambda_w / (n lambda_h)), eq. (18), and b = 1/K, eq. (15).
    - between the two (not in the paper): the collapsed problem is convex in (W H, b) with sqrt(n lambda_h
      lambda_w) times the nuclear norm, and splits into the K - 1 centred modes, of singular value 1 - c, and
      the mean mode. With r = lambda_b / (1 + lambda_b) the latter has singular value t = max(0, 1 - c/r),
      costs g(c/r) r / K, and b is (1 - t) / (K (1 + lambda_b)). Hence an exact simplex ETF for every lambda_b
      <= c / (1 - c), else ``"between"``.

    c >= 1 leaves ``"zero"``: features and weight vanish, and b = 1 / (K (1 + lambda_b)).

    Args:
        num_classes: K, at least 2.
        samples_per_class: n.
        lambda_w: regularisation of the weight, positive.
        lambda_h: regularisation of the features, positive.
        lambda_b: regularisation of the bias: infinity is no bias, 0 a free one.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_sizes(num_classes, samples_per_class)
    _check_positive(lambda_w=lambda_w, lambda_h=lambda_h)
    if not lambda_b >= 0:
        raise ValueError(f"lambda_b must be >= 0, got {lambda_b}; pass 0 for a free bias, math.inf for no bias")
    c = num_classes * math.sqrt(samples_per_class * lambda_h * lambda_w)
    bias_share = 1 / (1 + lambda_b)
    r = 1.0 if math.isinf(lambda_b) else lambda_b * bias_share
    centred_value, centred_cost = _two_factors(c)
    mean_value, mean_cost = _two_factors(c / r) if r > 0 else (0.0, 0.0)
    frame: Frame = "between"
    if centred_value == 0:
        frame = "zero"
    elif mean_value == 0:
        frame = "etf"
    elif math.isinf(lambda_b):
        frame = "of"
    ratio = (samples_per_class * lambda_h / lambda_w) ** 0.25
    return Minimum(
        objective=((num_classes - 1) * centred_cost + r * mean_cost) / num_classes,
        frame=frame,
        num_classes=num_classes,
        means_factor=1 / ratio,
        weight_factor=ratio,
        centred=math.sqrt(centred_value),
        mean=math.sqrt(mean_value),
        bias_entry=bias_share * (1 - mean_value) / num_classes,
    )


def extended_ufm(
    num_classes: int, samples_per_class: int, lambda_w2: float, lambda_w1: float, lambda_h1: float
) -> ExtendedMinimum:
    r"""The global minimum of the extended UFM with MSE loss, linear and ReLU.

    Equations (23) and (24), Theorems 4.1 and 4.2. With W2 W1 H1 = s Y and the three penalties balanced, each
    of the K modes costs 1/K of ``phi(s) = (1 - s)^2 / 2 + 3/2 a s^(2/3)``, ``a = K (n lambda_w2 lambda_w1
    lambda_h1)^(1/3)``, which is eq. (73) with its second variable eliminated. Where phi' = 0, x = s^(1/3)
    solves x^4 - x + a = 0; the larger root is the minimum and the smaller one a saddle. It beats s = 0, where
    phi = 1/2, if and only if s > 1/2, that is a < 2^(-4/3); otherwise the minimum is ``"zero"``. The means,
    of both levels, and the weights are orthogonal frames.

    Args:
        num_classes: K, at least 2.
        samples_per_class: n.
        lambda_w2: regularisation of the last layer's weight W2, positive.
        lambda_w1: regularisation of the weight W1 between the levels, positive.
        lambda_h1: regularisation of the first level's features H1, positive.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_sizes(num_classes, samples_per_class)
    _check_positive(lambda_w2=lambda_w2, lambda_w1=lambda_w1, lambda_h1=lambda_h1)
    product = samples_per_class * lambda_w2 * lambda_w1 * lambda_h1
    penalty = num_classes * product ** (1 / 3)
    value, cost = _three_factors(penalty)
    # Stationarity gives lambda_w2 w2^2 = lambda_w1 w1^2 = n lambda_h1 h1^2 for the singular values of the
    # three factors.
    balanced = (value * value * product) ** (1 / 3)
    w2 = math.sqrt(balanced / lambda_w2)
    w1 = math.sqrt(balanced / lambda_w1)
    h1 = math.sqrt(balanced / (samples_per_class * lambda_h1))
    return ExtendedMinimum(
        objective=cost,
        frame="of" if value > 0 else "zero",
        num_classes=num_classes,
        means_factor=w1 * h1,
        weight_factor=w2,
        centred=1.0,
        mean=1.0,
        bias_entry=0.0,
        first_means_factor=h1,
        first_weight_factor=w1,
        penalty=penalty,
    )


def attenuation(
    num_classes: int, samples_per_class: int, lambda_w: float, lambda_h: float, noise_variance: float
) -> float:
    r"""The factor by which noise on collapsed features shrinks the best weight as n grows, Theorem 5.1.

    ``W_n -> W* / (1 + noise_variance K sqrt(n lambda_h / lambda_w))`` where W_n minimizes eq. (25) for the
    features of Theorem 3.1 plus independent noise. The limit keeps n lambda_h fixed: the theorem's statement
    in the main text has lost the tilde of its lambda_H = n lambda_h, its proof (eq. 99) has it.

    Args:
        num_classes: K, at least 2.
        samples_per_class: n.
        lambda_w: regularisation of the weight, positive.
        lambda_h: regularisation of the features, positive.
        noise_variance: variance of each entry of the noise, not negative.

    Raises:
        ValueError: if an argument is out of range.
    """
    _check_sizes(num_classes, samples_per_class)
    _check_positive(lambda_w=lambda_w, lambda_h=lambda_h)
    if not 0 <= noise_variance < math.inf:
        raise ValueError(f"noise_variance must be a finite number >= 0, got {noise_variance}; pass sigma squared")
    return 1 / (1 + noise_variance * num_classes * math.sqrt(samples_per_class * lambda_h / lambda_w))


def _two_factors(c: float) -> tuple[float, float]:
    """Lemma A.1: the s >= 0 that minimizes (1 - s)^2 / 2 + c s, and the minimum."""
    return (1 - c, c - c * c / 2) if c < 1 else (0.0, 0.5)


def _three_factors(a: float) -> tuple[float, float]:
    """The s >= 0 that minimizes (1 - s)^2 / 2 + 3/2 a s^(2/3), and the minimum."""
    if a >= 2 ** (-4 / 3):
        return 0.0, 0.5
    # x^4 - x + a is convex and positive at 1, with slope >= 1 down to its larger root: Newton falls onto it
    # from above.
    x = 1.0
    while (step := (x**4 - x + a) / (4 * x**3 - 1)) > 1e-16:
        x -= step
    s = x**3
    # 1 - s = a / x at the root; written so, a small minimum keeps its digits.
    return s, a / x * (1 + 2 * s) / 2


def _check_sizes(num_classes: int, samples_per_class: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}; collapse compares classes")
    if samples_per_class < 1:
        raise ValueError(f"samples_per_class must be at least 1, got {samples_per_class}")


def _check_positive(**lambdas: float) -> None:
    for name, value in lambdas.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"{name} must be a positive, finite number, got {value}; "
                f"without regularisation the minimizers do not collapse"
            )
