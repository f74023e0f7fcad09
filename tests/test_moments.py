import contextlib
from dataclasses import replace

import pytest
import reference
import torch
from conftest import clusters
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nc.functional import MEASURES, evaluate
from lightning_nc.moments import ClassMoments, state_dtype

WEIGHTLESS = [name for name, measure in MEASURES.items() if not measure.needs]


def gather(features, target, classes, sizes=(64,), fold_every=4):
    moments = ClassMoments.zeros(classes, features.shape[1])
    start, step = 0, 0
    while start < len(features):
        size = sizes[step % len(sizes)]
        moments.update(features[start : start + size], target[start : start + size])
        start, step = start + size, step + 1
        if step % fold_every == 0:
            moments.fold()
    return moments


@pytest.mark.parametrize(("level", "tolerance"), [(1e-2, 1e-6), (1e-6, 1e-5), (1e-10, 1e-3)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_streaming_nc1_of_float32_features_is_exact(level, tolerance, offset):
    features, target = clusters(10, 300, 64, (level / 64 * 640) ** 0.5)
    features = features + offset
    expected = reference.nc1_by_axes(features.numpy(), target.numpy())
    assert level / 20 < expected < level * 20
    value = evaluate(("nc1",), gather(features, target, 10))["nc1"].item()
    assert value == pytest.approx(expected, rel=tolerance)
    assert value >= 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_other_measures_are_exact_in_every_precision_of_the_features(dtype):
    features, target = clusters(6, 50, 16, 0.2, dtype=dtype)
    weight, bias = torch.randn(6, 16).double(), torch.randn(6).double()
    args = features.double().numpy(), target.numpy(), weight.numpy(), bias.numpy()
    expected = reference.all_measures(*args)
    values = evaluate(list(MEASURES), gather(features, target.int(), 6), weight, bias)
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, rel=1e-6)


def scatter_of(moments):
    return moments.scatter + moments.recent


def values_of(moments):
    return {name: value.item() for name, value in evaluate(WEIGHTLESS, moments).items()}


problem = st.fixed_dictionaries(
    {
        "classes": st.integers(2, 7),
        "per_class": st.integers(1, 9),
        "features": st.integers(1, 9),
        "sizes": st.lists(st.integers(1, 20), min_size=1, max_size=5),
        "seed": st.integers(0, 10**6),
    }
)


@settings(max_examples=40, deadline=None)
@given(problem)
def test_any_split_and_order_and_merge_gives_the_same_values(case):
    features, target = clusters(case["classes"], case["per_class"], case["features"], 0.4, case["seed"], torch.float64)
    whole = values_of(gather(features, target, case["classes"], (10**6,)))
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(case["seed"]))
    batched = gather(features[order], target[order], case["classes"], tuple(case["sizes"]))
    cut = len(target) // 3
    first, second = (
        gather(features[:cut], target[:cut], case["classes"]),
        gather(features[cut:], target[cut:], case["classes"]),
    )
    for other in (batched, first.merge(second), second.merge(first)):
        assert values_of(other) == pytest.approx(whole, rel=1e-7, abs=1e-9, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(problem, st.floats(1e-3, 1e3))
def test_rotation_and_scale_of_the_features_change_nothing(case, scale):
    features, target = clusters(case["classes"], case["per_class"], case["features"], 0.4, case["seed"], torch.float64)
    generator = torch.Generator().manual_seed(case["seed"])
    size = case["features"]
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    expected = values_of(gather(features, target, case["classes"]))
    turned = values_of(gather(scale * features @ rotation, target, case["classes"]))
    assert turned == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(problem, st.sets(st.integers(0, 6), max_size=4))
def test_nc1_agrees_with_the_reference_with_classes_missing_and_more_classes_than_features(case, missing):
    features, target = clusters(case["classes"], case["per_class"], case["features"], 0.4, case["seed"], torch.float64)
    kept = ~torch.isin(target, torch.tensor(sorted(missing), dtype=torch.long))
    features, target = features[kept], target[kept]
    seen = len(target.unique())
    if seen < 2:
        return
    context = pytest.warns(UserWarning, match="no sample") if seen < case["classes"] else contextlib.nullcontext()
    with context:
        value = evaluate(("nc1",), gather(features, target, case["classes"]))["nc1"].item()
    assert value == pytest.approx(reference.nc1_by_axes(features.numpy(), target.numpy()), rel=1e-6, abs=1e-12)


def test_an_update_is_safe_in_autocast_inference_mode_and_reduced_precision():
    features, target = clusters(5, 100, 32, 0.3)
    expected = scatter_of(gather(features, target, 5))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            moments = gather(features, target, 5)
        reduced = replace(
            moments, counts=moments.counts.clone(), scatter=moments.scatter.clone(), recent=moments.recent.clone()
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    moments.update(features, target)  # outside of inference mode again
    assert torch.allclose(scatter_of(reduced), expected, rtol=1e-6)
    assert moments.counts.tolist() == [200] * 5


def test_features_that_require_gradients_leave_none_in_the_moments():
    features, target = clusters(3, 5, 4, 0.3)
    moments = gather(features.requires_grad_(), target, 3)
    assert not moments.scatter.requires_grad
    assert not moments.means.requires_grad


def test_an_update_with_no_sample_and_a_merge_with_nothing_change_nothing():
    features, target = clusters(3, 5, 4, 0.3)
    moments = gather(features, target, 3)
    expected = values_of(moments)
    moments.update(features[:0], target[:0])
    assert values_of(moments) == expected
    merged = ClassMoments.zeros(3, 4).merge(moments)
    assert values_of(merged) == pytest.approx(expected, rel=1e-12)


def test_the_state_is_float64_but_on_a_device_without_it():
    assert state_dtype("cpu") == torch.float64
    assert state_dtype("mps") == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_labels_of_any_integer_type_reach_as_far_as_they_can(dtype):
    features, target = clusters(100, 2, 4, 0.3)
    moments = gather(features, target.to(dtype), 300)
    assert moments.mislabelled == 0
    assert moments.counts[:100].tolist() == [2] * 100


def test_squares_that_overflow_are_said_and_give_nan():
    features, target = clusters(4, 100, 12, 1.0)
    with pytest.warns(UserWarning, match="squares overflow"):
        assert evaluate(("nc1",), gather(features * 1e19, target, 4))["nc1"].isnan()
