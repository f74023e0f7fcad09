r"""Global minima of the unconstrained features models of Tirer & Bruna (2022), in closed form.

In a UFM the features of the N = K n training samples are free variables, regularized like the weights. With Y the K x N
one-hot labels and ``H``, ``H1`` of shape (d, N), the objectives are

    plain (eq. 3):              1/(2N) ||W H + b 1' - Y||^2 + lw/2 ||W||^2 + lh/2 ||H||^2 + lb/2 ||b||^2
    extended linear (eq. 23):   1/(2N) ||W2 W1 H1 - Y||^2   + lw2/2 ||W2||^2 + lw1/2 ||W1||^2 + lh1/2 ||H1||^2
    extended ReLU (eq. 24):     the same with W2 relu(W1 H1)

At a global minimum the features of a class are one point, so K class means and the weights describe a minimizer. Every
minimizer is one of a family: multiply the features by any orthogonal matrix and the weights by its transpose. The ones
returned here lie along the coordinate axes, where the features of an orthogonal frame are non-negative and a ReLU does not
change them. Everything is float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

Frame = Literal["of", "etf", "between", "zero"]


@dataclass(frozen=True)
class Minimum:
    """The global minimum of a UFM and one of its minimizers.

    ``frame`` names the structure of the class means and of the weight's rows, which are aligned: ``"of"`` is an orthogonal
    frame, ``"etf"`` a simplex equiangular tight frame, ``"between"`` neither (after centering, a simplex ETF), and
    ``"zero"`` means that everything is zero because the regularization is too strong.

    The means and the weight are multiples of one K x K matrix, ``centered (I - 11'/K) + mean 11'/K``. The methods take the
    number of features ``d`` and raise ValueError if it is smaller than K.
    """

    objective: float
    frame: Frame
    num_classes: int
    means_factor: float
    weight_factor: float
    centered: float
    mean: float
    bias_entry: float

    def class_means(self, d: int) -> Tensor:
        """The features of each class, shape (K, d); for an extended model those of the deepest level."""
        return self.means_factor * self._embedded(d)

    def weight(self, d: int) -> Tensor:
        """The weight of the last layer, shape (K, d)."""
        return self.weight_factor * self._embedded(d)

    @property
    def bias(self) -> Tensor:
        """The bias of the last layer, shape (K,); zeros for a model without one."""
        return torch.full((self.num_classes,), self.bias_entry, dtype=torch.float64)

    def _embedded(self, d: int) -> Tensor:
        if not isinstance(d, Integral) or d < self.num_classes:
            raise ValueError(
                f"the theorems need at least as many features as classes, "
                f"got d = {d} for num_classes = {self.num_classes}; pass d >= {self.num_classes}"
            )
        average = torch.full((self.num_classes, self.num_classes), 1 / self.num_classes, dtype=torch.float64)
        identity = torch.eye(self.num_classes, dtype=torch.float64)
        # With one coefficient of I and one of the average, an orthogonal frame has exact zeros off its diagonal.
        frame = self.centered * identity + (self.mean - self.centered) * average
        return torch.nn.functional.pad(frame, (0, d - self.num_classes))


@dataclass(frozen=True)
class ExtendedMinimum(Minimum):
    """The global minimum of the extended models, linear and ReLU; ``class_means`` are the columns of W1 H1.

    The whole minimizer is ``weight(d)`` = W2, ``first_weight(d)`` = W1 and ``first_class_means(d)``, the columns of H1. It
    is non-negative, so it minimizes the ReLU model as well.
    """

    first_means_factor: float
    first_weight_factor: float
    penalty: float

    def first_class_means(self, d: int) -> Tensor:
        """The features of each class in the first layer, shape (K, d)."""
        return self.first_means_factor * self._embedded(d)

    def first_weight(self, d: int) -> Tensor:
        """The weight between the two levels of features, shape (d, d)."""
        weight = self.first_weight_factor * self._embedded(d)
        return torch.nn.functional.pad(weight, (0, 0, 0, d - self.num_classes))

    def level(self, dead: Sequence[float]) -> float:
        r"""The objective at which the ReLU model stops if a share ``dead[k]`` of the samples of class k is dead.

        A sample whose pre-activations are all negative is dead: it receives no gradient, decays to zero and costs 1/(2N)
        forever. The share p_k of class k that is alive still collapses to its own axis, and the objective is
        ``1/K sum_k [p_k min_s phi(s; a p_k^(-2/3)) + (1 - p_k)/2]`` with phi of :func:`extended_ufm`. A class without living
        samples costs 1/(2K): rank r leaves ``r/K f* + (1 - r/K)/2``, which is also the objective at a rank-r stationary
        point of the linear model. Not in the paper.

        Args:
            dead: one share in [0, 1] per class, the number of dead samples divided by n.

        Raises:
            ValueError: if ``dead`` does not hold K shares.
        """
        if len(dead) != self.num_classes or not all(_is_real(share) and 0 <= share <= 1 for share in dead):
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
    r"""The global minimum of the plain UFM with MSE loss, eq. (3), for any regularization of the bias.

    With c = K sqrt(n lambda_h lambda_w) and g(c) = c - c^2/2:

    - no bias (``lambda_b = inf``, Theorem 3.1): f* = g(c), an orthogonal frame of squared norm
      (1 - c) sqrt(lambda_w / (n lambda_h)), eq. (7), with w_k = sqrt(n lambda_h / lambda_w) h_k, eq. (9).
    - free bias (``lambda_b = 0``, Theorem 3.2): f* = (K - 1)/K g(c), a simplex ETF of squared norm
      (1 - c) (K - 1)/K sqrt(lambda_w / (n lambda_h)), eq. (18), and b = 1/K, eq. (15).
    - between the two (not in the paper): the collapsed problem is convex in (W H, b) with sqrt(n lambda_h lambda_w) times
      the nuclear norm, and splits into the K - 1 centered modes, of singular value 1 - c, and the mean mode. With
      r = lambda_b / (1 + lambda_b) the latter has singular value t = max(0, 1 - c/r), costs g(c/r) r / K, and b is
      (1 - t) / (K (1 + lambda_b)). Hence an exact simplex ETF for every lambda_b <= c / (1 - c), else ``"between"``.

    If c >= 1 the minimum is ``"zero"``: features and weight are zero, and b = 1 / (K (1 + lambda_b)).

    Args:
        num_classes: K, at least 2.
        samples_per_class: n.
        lambda_w: regularization of the weight, between 1e-90 and 1e90.
        lambda_h: regularization of the features, between 1e-90 and 1e90.
        lambda_b: regularization of the bias: infinity is no bias, 0 a free one.

    Raises:
        ValueError: if an argument is out of range.
    """
    num_classes, samples_per_class = _sizes(num_classes, samples_per_class)
    lambda_w, lambda_h = _lambdas(lambda_w=lambda_w, lambda_h=lambda_h)
    if not (_is_real(lambda_b) and lambda_b >= 0):
        raise ValueError(f"lambda_b must be >= 0, got {lambda_b!r}; pass 0 for a free bias, math.inf for no bias")
    lambda_b = float(lambda_b)
    c = num_classes * math.sqrt(samples_per_class * lambda_h * lambda_w)
    bias_share = 1 / (1 + lambda_b)
    r = 1.0 if math.isinf(lambda_b) else lambda_b * bias_share
    centered_value, centered_cost = _two_factors(c)
    mean_value, mean_cost = _two_factors(c / r) if r > 0 else (0.0, 0.0)
    frame: Frame = "of" if math.isinf(lambda_b) else "etf" if mean_value == 0 else "between"
    ratio = (samples_per_class * lambda_h / lambda_w) ** 0.25
    return Minimum(
        objective=((num_classes - 1) * centered_cost + r * mean_cost) / num_classes,
        frame=frame if centered_value > 0 else "zero",
        num_classes=num_classes,
        means_factor=1 / ratio,
        weight_factor=ratio,
        centered=math.sqrt(centered_value),
        mean=math.sqrt(mean_value),
        bias_entry=bias_share * (1 - mean_value) / num_classes,
    )


def extended_ufm(
    num_classes: int, samples_per_class: int, lambda_w2: float, lambda_w1: float, lambda_h1: float
) -> ExtendedMinimum:
    r"""The global minimum of the extended UFM with MSE loss, linear and ReLU.

    Equations (23) and (24), Theorems 4.1 and 4.2. With W2 W1 H1 = s Y and the three penalties balanced, each of the K modes
    costs 1/K of ``phi(s) = (1 - s)^2 / 2 + 3/2 a s^(2/3)``, ``a = K (n lambda_w2 lambda_w1 lambda_h1)^(1/3)``, which is
    eq. (73) with its second variable eliminated. If phi' = 0, x = s^(1/3) solves x^4 - x + a = 0; the larger root is the
    minimum and the smaller one a saddle. It is below s = 0, where phi = 1/2, if and only if s > 1/2, that is a < 2^(-4/3);
    otherwise the minimum is ``"zero"``. The class means of both levels and the weights are orthogonal frames.

    Args:
        num_classes: K, at least 2.
        samples_per_class: n.
        lambda_w2: regularization of the last layer's weight W2, between 1e-90 and 1e90.
        lambda_w1: regularization of the weight W1 between the levels, between 1e-90 and 1e90.
        lambda_h1: regularization of the first level's features H1, between 1e-90 and 1e90.

    Raises:
        ValueError: if an argument is out of range.
    """
    num_classes, samples_per_class = _sizes(num_classes, samples_per_class)
    lambda_w2, lambda_w1, lambda_h1 = _lambdas(lambda_w2=lambda_w2, lambda_w1=lambda_w1, lambda_h1=lambda_h1)
    product = samples_per_class * lambda_w2 * lambda_w1 * lambda_h1
    penalty = num_classes * product ** (1 / 3)
    value, cost = _three_factors(penalty)
    # Stationarity gives lambda_w2 w2^2 = lambda_w1 w1^2 = n lambda_h1 h1^2 for the singular values of the three factors.
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
        centered=1.0,
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

    ``W_n -> W* / (1 + noise_variance K sqrt(n lambda_h / lambda_w))`` where W_n minimizes eq. (25) for the features of
    Theorem 3.1 plus independent noise. The limit keeps n lambda_h fixed: the theorem in the main text omits the tilde of its
    lambda_H = n lambda_h; its proof (eq. 99) has it.

    Args:
        num_classes: K, at least 2.
        samples_per_class: n.
        lambda_w: regularization of the weight, between 1e-90 and 1e90.
        lambda_h: regularization of the features, between 1e-90 and 1e90.
        noise_variance: variance of each entry of the noise, not negative.

    Raises:
        ValueError: if an argument is out of range.
    """
    num_classes, samples_per_class = _sizes(num_classes, samples_per_class)
    lambda_w, lambda_h = _lambdas(lambda_w=lambda_w, lambda_h=lambda_h)
    if not (_is_real(noise_variance) and 0 <= noise_variance < math.inf):
        raise ValueError(f"noise_variance must be a finite number >= 0, got {noise_variance!r}; pass sigma squared")
    return 1 / (1 + noise_variance * num_classes * math.sqrt(samples_per_class * lambda_h / lambda_w))


def _two_factors(c: float) -> tuple[float, float]:
    """Lemma A.1: the s >= 0 that minimizes (1 - s)^2 / 2 + c s, and the minimum."""
    return (1 - c, c - c * c / 2) if c < 1 else (0.0, 0.5)


def _three_factors(a: float) -> tuple[float, float]:
    """The s >= 0 that minimizes (1 - s)^2 / 2 + 3/2 a s^(2/3), and the minimum."""
    if a >= 2 ** (-4 / 3):
        return 0.0, 0.5
    # x^4 - x + a is convex and positive at 1, with slope >= 1 down to its larger root: Newton decreases onto the root.
    x = 1.0
    while (step := (x**4 - x + a) / (4 * x**3 - 1)) > 1e-16:
        x -= step
    s = x**3
    # 1 - s = a / x at the root; this form keeps the digits of a small minimum.
    return s, a / x * (1 + 2 * s) / 2


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _sizes(num_classes: int, samples_per_class: int) -> tuple[int, int]:
    """K and n, checked, as Python integers: those of NumPy overflow."""
    for name, value, least in (("num_classes", num_classes, 2), ("samples_per_class", samples_per_class, 1)):
        if not (isinstance(value, Integral) and _is_real(value) and least <= value <= 2**53):
            raise ValueError(f"{name} must be a whole number, at least {least} and at most 2**53, got {value!r}")
    return int(num_classes), int(samples_per_class)


def _lambdas(**lambdas: float) -> list[float]:
    """Regularization parameters, checked, in double precision. Within these limits no product overflows or underflows."""
    for name, value in lambdas.items():
        if not (_is_real(value) and 1e-90 <= float(value) <= 1e90):
            raise ValueError(
                f"{name} must be a positive, finite number, got {value!r}; "
                f"pass a value between 1e-90 and 1e90, since without regularization the minimizers do not collapse"
            )
    return [float(value) for value in lambdas.values()]
