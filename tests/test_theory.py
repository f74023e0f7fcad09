"""The closed forms against term-by-term objectives, autograd gradients, descents and the paper's numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_nc import theory

FIGURE_MINIMA = [
    (theory.plain_ufm(4, 50, 0.005, 0.005), 0.131421356237),
    (theory.plain_ufm(4, 50, 0.005, 0.005, 0.0), 0.098566017178),
    (theory.extended_ufm(4, 50, 0.005, 0.005, 0.005), 0.107735715649),
    (theory.plain_ufm(5, 100, 0.005, 0.001), 0.105553398875),
    (theory.plain_ufm(5, 100, 0.005, 0.001, 0.0), 0.084442719100),
    (theory.extended_ufm(5, 100, 0.005, 0.0025, 0.001), 0.079313605819),
]


def one_hot(K: int, n: int) -> Tensor:
    return torch.eye(K, dtype=torch.float64).repeat_interleave(n, dim=1)


def plain_objective(W: Tensor, H: Tensor, b: Tensor, lw: float, lh: float, lb: float) -> Tensor:
    """Eq. (3), written down term by term; an infinite lb stands for a bias that stays zero."""
    K = len(W)
    error = W @ H + b[:, None] - one_hot(K, H.shape[1] // K)
    bias_penalty = 0.0 if math.isinf(lb) else lb / 2 * b.square().sum()
    return (
        error.square().sum() / (2 * H.shape[1]) + lw / 2 * W.square().sum() + lh / 2 * H.square().sum() + bias_penalty
    )


def extended_objective(W2: Tensor, W1: Tensor, H1: Tensor, l2: float, l1: float, lh: float, relu: bool) -> Tensor:
    """Eqs. (23) and (24), written down term by term."""
    K = len(W2)
    H2 = (W1 @ H1).relu() if relu else W1 @ H1
    fit = (W2 @ H2 - one_hot(K, H1.shape[1] // K)).square().sum() / (2 * H1.shape[1])
    return fit + l2 / 2 * W2.square().sum() + l1 / 2 * W1.square().sum() + lh / 2 * H1.square().sum()


def spread(class_means: Tensor, n: int) -> Tensor:
    """(K, d) class means -> (d, K n) features."""
    return class_means.repeat_interleave(n, dim=0).T


def descend(objective, *starts: Tensor) -> float:
    """The value an L-BFGS run ends at: an optimizer that knows nothing of the closed forms."""
    variables = [start.clone().requires_grad_() for start in starts]
    optimizer = torch.optim.LBFGS(
        variables,
        max_iter=3000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(*variables)
        value.backward()
        return value

    optimizer.step(closure)
    return objective(*variables).item()


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("minimum", "published"), FIGURE_MINIMA)
def test_the_minima_of_the_papers_figures_have_their_known_values(minimum, published):
    assert minimum.objective == pytest.approx(published, abs=6e-13)


@pytest.mark.parametrize("lb", [0.0, 1e-3, 0.05, 0.165, 0.166, 0.3, 1.0, 50.0, math.inf])
@pytest.mark.parametrize(("K", "n", "lw", "lh"), [(4, 3, 0.02, 0.0425), (2, 5, 0.001, 0.1), (7, 2, 0.03, 0.001)])
def test_the_plain_minimizer_attains_the_objective_and_has_no_gradient(K, n, lw, lh, lb):
    minimum = theory.plain_ufm(K, n, lw, lh, lb)
    W = minimum.weight(9).requires_grad_()
    H = spread(minimum.class_means(9), n).contiguous().requires_grad_()
    b = minimum.bias.requires_grad_()
    value = plain_objective(W, H, b, lw, lh, lb)
    assert value.item() == pytest.approx(minimum.objective, rel=1e-13)
    gradients = torch.autograd.grad(value, (W, H, b))
    for gradient in gradients[: 2 if math.isinf(lb) else 3]:
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("lb", [0.0, 0.1, 0.4, 2.0, math.inf])
def test_descent_from_random_starts_ends_at_the_plain_minimum_and_never_below(lb):
    K, d, n, lw, lh = 4, 6, 3, 0.02, 0.02
    minimum = theory.plain_ufm(K, n, lw, lh, lb)
    for seed in range(3):
        W, H, b = normal(seed, (K, d), (d, K * n), (K,))
        if math.isinf(lb):
            zero = torch.zeros(K, dtype=torch.float64)
            reached = descend(lambda W, H: plain_objective(W, H, zero, lw, lh, lb), W, H)  # noqa: B023
        else:
            reached = descend(lambda W, H, b: plain_objective(W, H, b, lw, lh, lb), W, H, b)
        assert reached == pytest.approx(minimum.objective, rel=1e-9)
        assert reached >= minimum.objective * (1 - 1e-14)


def test_the_orthogonal_frame_of_theorem_31_satisfies_equations_7_to_12():
    K, n, lw, lh = 4, 50, 0.005, 0.003
    c = K * math.sqrt(n * lh * lw)
    minimum = theory.plain_ufm(K, n, lw, lh)
    H, W = minimum.class_means(20), minimum.weight(20)
    eye = torch.eye(K, dtype=torch.float64)
    assert minimum.frame == "of"
    torch.testing.assert_close(H @ H.T, (1 - c) * math.sqrt(lw / (n * lh)) * eye)
    torch.testing.assert_close(W, math.sqrt(n * lh / lw) * H)
    torch.testing.assert_close(W @ H.T, (1 - c) * eye)
    assert (H >= 0).all()


def test_the_simplex_etf_of_theorem_32_satisfies_equations_15_to_20():
    K, n, lw, lh = 5, 100, 0.005, 0.001
    c = K * math.sqrt(n * lh * lw)
    minimum = theory.plain_ufm(K, n, lw, lh, 0.0)
    H, W = minimum.class_means(20), minimum.weight(20)
    rho = (1 - c) * (K - 1) / K * math.sqrt(lw / (n * lh))
    expected = rho * K / (K - 1) * (torch.eye(K, dtype=torch.float64) - 1 / K)
    assert minimum.frame == "etf"
    torch.testing.assert_close(H @ H.T, expected)
    torch.testing.assert_close(H.sum(dim=0), torch.zeros(20, dtype=torch.float64))
    torch.testing.assert_close(W, math.sqrt(n * lh / lw) * H)
    torch.testing.assert_close(minimum.bias, torch.full((K,), 1 / K, dtype=torch.float64))


def test_a_regularized_bias_keeps_the_simplex_etf_up_to_the_threshold_and_leaves_it_continuously_after():
    K, n, lw, lh = 4, 50, 0.005, 0.005
    c = K * math.sqrt(n * lh * lw)
    threshold = c / (1 - c)
    below, above = (theory.plain_ufm(K, n, lw, lh, threshold * factor) for factor in (1 - 1e-6, 1 + 1e-6))
    assert (below.frame, above.frame) == ("etf", "between")
    assert below.mean == 0 < above.mean < 2e-3
    assert above.objective == pytest.approx(below.objective, rel=1e-6)
    torch.testing.assert_close(
        below.bias, torch.full((K,), 1 / (K * (1 + threshold)), dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("lb", [0.7, 5.0])
def test_between_the_frames_the_mean_mode_has_its_own_singular_value_and_the_centered_means_are_an_etf(lb):
    K, n, lw, lh = 4, 50, 0.005, 0.005
    c = K * math.sqrt(n * lh * lw)
    minimum = theory.plain_ufm(K, n, lw, lh, lb)
    output = minimum.weight(K) @ minimum.class_means(K).T
    singular = torch.linalg.svdvals(output)
    expected = torch.tensor([1 - c] * (K - 1) + [1 - c * (1 + lb) / lb], dtype=torch.float64)
    torch.testing.assert_close(singular, expected)
    centered = minimum.class_means(K) - minimum.class_means(K).mean(dim=0)
    gram = centered @ centered.T
    torch.testing.assert_close(gram / gram[0, 0], (torch.eye(K, dtype=torch.float64) * K - 1) / (K - 1))


def test_no_bias_and_a_free_bias_are_the_limits_of_a_regularized_one():
    for lb, limit in [(1e-12, 0.0), (1e12, math.inf)]:
        near, at = theory.plain_ufm(4, 50, 0.005, 0.005, lb), theory.plain_ufm(4, 50, 0.005, 0.005, limit)
        assert near.objective == pytest.approx(at.objective, rel=1e-11)
        torch.testing.assert_close(near.class_means(4), at.class_means(4))
        torch.testing.assert_close(near.bias, at.bias)


@pytest.mark.parametrize(("lb", "objective", "bias"), [(math.inf, 0.5, 0.0), (0.0, 0.375, 0.25), (1.0, 0.4375, 0.125)])
def test_too_strong_a_regularization_collapses_the_plain_model_to_zero(lb, objective, bias):
    minimum = theory.plain_ufm(4, 50, 0.1, 0.1, lb)
    assert minimum.frame == "zero"
    assert minimum.objective == pytest.approx(objective, rel=1e-15)
    assert not minimum.class_means(5).any()
    assert not minimum.weight(5).any()
    torch.testing.assert_close(minimum.bias, torch.full((4,), bias, dtype=torch.float64))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("K", "n", "l2", "l1", "lh"),
    [(4, 50, 0.005, 0.005, 0.005), (5, 7, 0.005, 0.0025, 0.01), (2, 3, 1e-6, 1e-4, 1e-5)],
)
def test_the_whole_extended_minimizer_attains_the_objective_and_has_no_gradient(K, n, l2, l1, lh, relu):
    d = 8
    minimum = theory.extended_ufm(K, n, l2, l1, lh)
    W2 = minimum.weight(d).requires_grad_()
    W1 = minimum.first_weight(d).requires_grad_()
    H1 = spread(minimum.first_class_means(d), n).contiguous().requires_grad_()
    value = extended_objective(W2, W1, H1, l2, l1, lh, relu)
    assert value.item() == pytest.approx(minimum.objective, rel=1e-13)
    for gradient in torch.autograd.grad(value, (W2, W1, H1)):
        assert gradient.abs().max() < 1e-14
    torch.testing.assert_close((W1 @ H1).relu(), spread(minimum.class_means(d), n))
    assert torch.equal(minimum.bias, torch.zeros(K, dtype=torch.float64))  # the model has none


def test_descent_from_random_starts_ends_at_the_extended_minimum_and_never_below():
    K, d, n, lambdas = 3, 5, 4, (0.01, 0.02, 0.005)
    minimum = theory.extended_ufm(K, n, *lambdas)
    for seed in range(3):
        W2, W1, H1 = normal(seed, (K, d), (d, d), (d, K * n))
        reached = descend(lambda *x: extended_objective(*x, *lambdas, relu=False), W2, W1, H1)
        assert reached == pytest.approx(minimum.objective, rel=1e-9)
        assert reached >= minimum.objective * (1 - 1e-14)


@pytest.mark.parametrize("a", [1e-12, 1e-6, 1e-3, 0.1, 0.3, 0.39, 0.3968, 0.3969, 0.4, 0.47, 0.48, 2.0])
def test_the_extended_objective_is_the_smallest_of_a_dense_scan(a):
    minimum = theory.extended_ufm(2, 1, (a / 2) ** 3, 1.0, 1.0)
    s = torch.linspace(0, 1.2, 2_000_001, dtype=torch.float64)
    scan = ((1 - s) ** 2 / 2 + 1.5 * a * s ** (2 / 3)).min().item()
    assert minimum.objective == pytest.approx(scan, rel=1e-11, abs=4e-13)
    assert minimum.frame == ("of" if a < 2 ** (-4 / 3) else "zero")


def test_the_extended_minimum_solves_the_polynomial_of_appendix_c():
    K, n, l2, l1, lh = 5, 100, 0.005, 0.0025, 0.001
    minimum = theory.extended_ufm(K, n, l2, l1, lh)
    w = minimum.weight_factor
    root = math.sqrt(n * l1 * lh)
    assert l2 * w**4 - root * w + K * n * l1 * lh == pytest.approx(0, abs=1e-17)
    assert minimum.means_factor == pytest.approx(l2 * w**2 / root, rel=1e-13)


def test_too_strong_a_regularization_collapses_the_extended_model_to_zero():
    minimum = theory.extended_ufm(4, 50, 0.03, 0.03, 0.03)
    assert (minimum.frame, minimum.objective) == ("zero", 0.5)
    for matrix in (
        minimum.class_means(6),
        minimum.first_class_means(6),
        minimum.weight(6),
        minimum.first_weight(6),
    ):
        assert not matrix.any()


@pytest.mark.parametrize(
    ("minimum", "n", "percent"),
    [
        (theory.extended_ufm(4, 50, 0.005, 0.005, 0.005), 50, 2.14376),
        (theory.extended_ufm(5, 100, 0.005, 0.0025, 0.001), 100, 1.191383),
    ],
)
def test_one_dead_sample_lifts_the_relu_level_by_the_measured_amount(minimum, n, percent):
    level = minimum.level([1 / n] + [0.0] * (minimum.num_classes - 1))
    assert 100 * (level / minimum.objective - 1) == pytest.approx(percent, abs=5e-6)


def test_dead_samples_leave_a_stationary_point_of_the_relu_model_at_the_named_level():
    K, d, n, lambdas, dead = 3, 5, 4, (0.01, 0.02, 0.005), [2, 0, 4]
    minimum = theory.extended_ufm(K, n, *lambdas)
    alive = torch.ones(K * n, dtype=torch.float64)
    alive[:2] = alive[8:] = 0
    # Descent of the linear model on the samples that are alive; the last class is wholly dead.
    W2, W1, H1 = normal(0, (K, d), (d, d), (d, K * n))

    def objective(W2: Tensor, W1: Tensor, H1: Tensor) -> Tensor:
        return extended_objective(W2, W1, H1 * alive, *lambdas, relu=False)

    reached = descend(objective, W2, W1, H1)
    assert minimum.level([count / n for count in dead]) == pytest.approx(reached, rel=1e-9)


def test_without_dead_samples_the_level_is_the_minimum_and_dead_classes_interpolate_to_one_half():
    minimum = theory.extended_ufm(4, 50, 0.005, 0.005, 0.005)
    for rank in range(5):
        level = minimum.level([0.0] * rank + [1.0] * (4 - rank))
        assert level == pytest.approx(rank / 4 * minimum.objective + (1 - rank / 4) / 2, rel=1e-14)


def test_the_attenuation_of_theorem_51_is_the_limit_of_the_ridge_solution():
    K, d, lw, tilde_lh, sigma = 4, 6, 0.005, 0.25, 0.1
    errors = []
    for n in (2_000, 200_000):
        minimum = theory.plain_ufm(K, n, lw, tilde_lh / n)
        H = spread(minimum.class_means(d), n)
        H = H + sigma * torch.randn(H.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        # Eq. (93), the closed form of eq. (25).
        ridge = H @ H.T / (K * n) + lw * torch.eye(d, dtype=torch.float64)
        W = torch.linalg.solve(ridge, H @ one_hot(K, n).T / (K * n)).T
        limit = theory.attenuation(K, n, lw, tilde_lh / n, sigma**2) * minimum.weight(d)
        errors.append(((W - limit).norm() / limit.norm()).item())
    assert errors[1] < 0.01
    assert 3 < errors[0] / errors[1] < 30


def test_the_attenuation_keeps_the_tilde_of_the_proof():
    assert theory.attenuation(4, 50, 0.005, 0.005, 0.01) == pytest.approx(0.7795, abs=5e-5)
    assert theory.attenuation(4, 50, 0.005, 0.005, 0.0) == 1.0


def test_fewer_features_than_classes_are_refused_with_the_remedy():
    for minimum in (theory.plain_ufm(4, 5, 0.01, 0.01), theory.extended_ufm(4, 5, 0.01, 0.01, 0.01)):
        for matrix in (minimum.class_means, minimum.weight):
            with pytest.raises(ValueError, match=r"d = 3 for num_classes = 4; pass d >= 4"):
                matrix(3)
    with pytest.raises(ValueError, match=r"pass d >= 4"):
        minimum.first_weight(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.plain_ufm(4, 50, -0.1, 0.1), "lambda_w must be a positive, finite number, got -0.1"),
        (lambda: theory.plain_ufm(4, 50, 0.1, 0.0), "lambda_h must be a positive"),
        (lambda: theory.plain_ufm(4, 50, 0.1, math.nan), "lambda_h must be a positive"),
        (lambda: theory.plain_ufm(4, 50, "0.1", 0.1), "lambda_w must be a positive, finite number, got '0.1'"),
        (lambda: theory.plain_ufm(4, 50, True, 0.1), "lambda_w must be a positive, finite number, got True"),
        (lambda: theory.plain_ufm(4, 50, 1e-300, 1e-300), "got 1e-300; pass a value between 1e-90 and 1e90"),
        (lambda: theory.plain_ufm(4, 50, 0.1, 1e300), "lambda_h must be .*, got 1e[+]300"),
        (lambda: theory.extended_ufm(4, 50, 1e-120, 0.1, 0.1), "lambda_w2 must be .*, got 1e-120"),
        (lambda: theory.plain_ufm(2.5, 50, 0.1, 0.1), "num_classes must be a whole number, at least 2 .*, got 2.5"),
        (lambda: theory.plain_ufm(4.0, 50, 0.1, 0.1), "num_classes must be a whole number, at least 2 .*, got 4.0"),
        (lambda: theory.plain_ufm("4", 50, 0.1, 0.1), "num_classes must be a whole number, at least 2 .*, got '4'"),
        (lambda: theory.plain_ufm(4, True, 0.1, 0.1), "samples_per_class must be a whole number, .*, got True"),
        (lambda: theory.plain_ufm(4, 10**400, 0.1, 0.1), "samples_per_class must be a whole number"),
        (
            lambda: theory.extended_ufm(4, math.nan, 0.1, 0.1, 0.1),
            "samples_per_class must be a whole number, .*, got nan",
        ),
        (lambda: theory.plain_ufm(4, 50, 0.1, 0.1, "free"), "lambda_b must be >= 0, got 'free'"),
        (lambda: theory.attenuation(4, 50, 0.1, 0.1, math.nan), "noise_variance must be a finite number >= 0, got nan"),
        (lambda: theory.attenuation(4, 50, 0.1, 0.1, "1"), "noise_variance must be a finite number >= 0, got '1'"),
        (lambda: theory.extended_ufm(4, 50, 0.1, 0.1, 0.1).level("1111"), "dead must hold 4 shares"),
        (lambda: theory.extended_ufm(4, 50, 0.1, 0.1, 0.1).level([math.nan] * 4), "dead must hold 4 shares"),
        (lambda: theory.extended_ufm(4, 50, 0.1, 0.1, 0.1).level([1, 0, 1.5, 0]), "dead must hold 4 shares"),
        (lambda: theory.plain_ufm(4, 2**53 + 1, 0.1, 0.1), "samples_per_class must be a whole number, .* at most"),
        (lambda: theory.attenuation(4, 50, 0.1, 0.1, math.inf), "noise_variance must be a finite number"),
        (lambda: theory.plain_ufm(4, 50, 0.1, 0.1).weight(4.5), "got d = 4.5 for num_classes = 4; pass d >= 4"),
        (lambda: theory.plain_ufm(4, 50, 0.1, 0.1, -1.0), "lambda_b must be >= 0, got -1.0; pass 0"),
        (lambda: theory.plain_ufm(4, 50, 0.1, 0.1, math.nan), "lambda_b must be >= 0"),
        (lambda: theory.plain_ufm(1, 50, 0.1, 0.1), "num_classes must be a whole number, at least 2 .*, got 1"),
        (lambda: theory.plain_ufm(4, 0, 0.1, 0.1), "samples_per_class must be a whole number, at least 1 .*, got 0"),
        (lambda: theory.extended_ufm(4, 50, 0.1, -0.1, 0.1), "lambda_w1 must be a positive"),
        (lambda: theory.extended_ufm(4, 50, math.inf, 0.1, 0.1), "lambda_w2 must be a positive, finite"),
        (lambda: theory.attenuation(4, 50, 0.1, 0.1, -1.0), "noise_variance must be a finite number >= 0"),
        (lambda: theory.extended_ufm(4, 50, 0.1, 0.1, 0.1).level([1, 0]), "dead must hold 4 shares"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_numpy_give_the_same_as_those_of_python_in_double_precision():
    lambdas = [np.float32(value) for value in (0.005, 0.0025, 0.001, 0.3)]
    exact = [float(value) for value in lambdas]
    K, n = np.int8(5), np.int8(100)  # their product does not fit an int8
    assert theory.plain_ufm(K, n, lambdas[0], lambdas[2], lambdas[3]) == theory.plain_ufm(
        5, 100, exact[0], exact[2], exact[3]
    )
    assert theory.extended_ufm(K, n, *lambdas[:3]) == theory.extended_ufm(5, 100, *exact[:3])
    assert theory.attenuation(K, n, *lambdas[:3]) == theory.attenuation(5, 100, *exact[:3])
    assert theory.plain_ufm(K, n, *exact[:2]).weight(np.int64(7)).shape == (5, 7)


@pytest.mark.parametrize("small", [1e-90, 1e-60, 1e-30])
def test_at_the_limits_of_the_regularization_nothing_overflows_or_vanishes(small):
    # Where the penalty c is tiny the minimum is c, or 3/2 a, to first order.
    assert theory.plain_ufm(4, 25, small, small).objective == pytest.approx(4 * 5 * small, rel=1e-12)
    assert theory.extended_ufm(4, 27, small, small, small).objective == pytest.approx(1.5 * 4 * 3 * small, rel=1e-12)
    for minimum in (theory.plain_ufm(4, 25, small, 1 / small), theory.plain_ufm(4, 25, 1 / small, small)):
        assert minimum.objective == 0.5  # K sqrt(n) = 20 is too strong
    extreme = theory.extended_ufm(4, 2**53, 1 / small, 1 / small, 1 / small)
    assert (extreme.frame, extreme.objective) == ("zero", 0.5)
    for matrix in (extreme.class_means(4), extreme.first_class_means(4), extreme.weight(4), extreme.first_weight(4)):
        assert (matrix == 0).all()
