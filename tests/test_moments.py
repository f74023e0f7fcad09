import contextlib
import copy
import itertools
import math
import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import reference
import torch
from conftest import ONE_PASS, clusters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nc.functional import METRICS
from lightning_nc.functional.table import evaluate
from lightning_nc.moments import ClassDeviations, ClassMoments, check_batch, state_dtype

WEIGHTLESS = [name for name in ONE_PASS if not METRICS[name].needs]


def gather(features, target, classes, sizes=(64,)):
    moments = ClassMoments.zeros(classes, features.shape[1])
    start, step = 0, 0
    while start < len(features):
        size = sizes[step % len(sizes)]
        moments.update(features[start : start + size], target[start : start + size])
        start, step = start + size, step + 1
    return moments


def merged(first, *others):
    """The moments of all samples together; the parts stay as they are."""
    total = copy.deepcopy(first)
    for other in others:
        total.merge(other)
    return total


def states_of(moments):
    return {field.name: getattr(moments, field.name) for field in fields(moments)}


@pytest.mark.parametrize(("level", "tolerance"), [(1e-2, 1e-9), (1e-6, 1e-8), (1e-10, 1e-5)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_streaming_nc1_of_float32_features_is_exact(level, tolerance, offset):
    features, target = clusters(10, 300, 64, (level / 64 * 640) ** 0.5)
    features = features + offset
    expected = reference.nc1_by_axes(features.numpy(), target.numpy())
    assert level / 20 < expected < level * 20
    value = evaluate(("nc1",), gather(features, target, 10))["nc1"].item()
    assert value == pytest.approx(expected, rel=tolerance)
    assert value >= 0


@pytest.mark.parametrize("width", [255, 256, 257, 600])
def test_blocks_of_the_scatter_matrix_add_up_to_the_whole(width):
    features, target = clusters(5, 40, width, 0.5)
    expected = reference.nc1_by_axes(features.numpy(), target.numpy())
    moments = gather(features, target, 5, (7, 64))
    assert evaluate(("nc1",), moments)["nc1"].item() == pytest.approx(expected, rel=1e-9)
    axes = torch.linalg.qr(torch.randn(width, 3).double()).Q
    along = ClassDeviations.of(features, target, 5).within(axes)
    assert torch.allclose(moments.within(axes), along, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_other_metrics_are_exact_in_every_precision_of_the_features(dtype):
    features, target = clusters(6, 50, 16, 0.2, dtype=dtype)
    weight, bias = torch.randn(6, 16).double(), torch.randn(6).double()
    args = features.double().numpy(), target.numpy(), weight.numpy(), bias.numpy()
    expected = reference.all_metrics(*args)
    expected = {name: expected[name] for name in ONE_PASS}
    values = evaluate(ONE_PASS, gather(features, target.int(), 6), weight, bias)
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, rel=1e-9)


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
    for other in (batched, merged(first, second), merged(second, first)):
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
    if target.bincount().max() == 1:
        assert math.isnan(value)
        return
    assert value == pytest.approx(reference.nc1_by_axes(features.numpy(), target.numpy()), rel=1e-6, abs=1e-12)


def fp32_flags():
    """The settings of reduced precision: since torch 2.9 by backend, before that two switches and a word."""
    try:
        backends = (torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
        return [backend.fp32_precision for backend in backends]
    except AttributeError:
        switches = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return [*switches, torch.get_float32_matmul_precision()]


def test_an_update_is_exact_in_autocast_inference_mode_and_reduced_precision_and_leaves_the_flags_alone():
    features, target = clusters(5, 100, 32, 0.3)
    expected = values_of(gather(features, target, 5))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        flags = fp32_flags()
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            moments = gather(features, target, 5)
            assert values_of(moments) == pytest.approx(expected, rel=1e-12)
        assert fp32_flags() == flags
    finally:
        torch.set_float32_matmul_precision(before)
    moments.update(features, target)  # outside of inference mode again
    assert moments.counts.tolist() == [200] * 5
    assert values_of(moments) == pytest.approx(expected, rel=1e-9)


def test_the_precision_of_features_is_the_coarsest_type_that_holds_them_all():
    coarser = [(7, torch.bfloat16), (10, torch.float16), (23, torch.float32), (52, torch.float64)]
    target = torch.tensor([0, 1])
    for digits, dtype in coarser:
        rows = torch.tensor([[1.0], [1 + 2.0**-digits]], dtype=torch.float64)
        assert ClassDeviations.of(rows, target, 2).precision == dtype
        assert gather(rows.to(dtype), target, 2).precision == dtype
    for (digits, _), (_, finer) in itertools.pairwise(coarser):
        rows = torch.tensor([[1.0], [1 + 2.0 ** -(digits + 1)]], dtype=torch.float64)
        assert gather(rows, target, 2).precision == finer


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs torch 2.9")
def test_a_flag_that_inherits_goes_on_inheriting_after_an_update():
    child = torch.backends.mkldnn.matmul
    before = child.fp32_precision, torch.backends.mkldnn.fp32_precision, torch.backends.fp32_precision
    try:
        child.fp32_precision = torch.backends.mkldnn.fp32_precision = "none"
        gather(*clusters(3, 20, 8, 0.3), 3)
        for precision in ("ieee", "tf32"):
            torch.backends.fp32_precision = precision
            assert child.fp32_precision == precision
    finally:
        child.fp32_precision, torch.backends.mkldnn.fp32_precision, torch.backends.fp32_precision = before


def test_updates_in_several_threads_agree_and_leave_the_flags_alone():
    features, target = clusters(5, 200, 64, 0.3)
    expected = values_of(gather(features, target, 5))
    flags = fp32_flags()
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(values_of(gather(features, target, 5)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 3
    assert fp32_flags() == flags


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
    assert values_of(merged(ClassMoments.zeros(3, 4), moments)) == pytest.approx(expected, rel=1e-12)
    assert values_of(merged(moments, ClassMoments.zeros(3, 4))) == expected


def test_a_merge_is_exact_whatever_the_split_and_leaves_the_other_as_it_is():
    features, target = clusters(30, 40, 150, 0.5)  # several blocks of classes and of the scatter matrix
    features = features + 5
    whole = gather(features, target, 30, (10**6,))
    order = torch.randperm(len(target))
    for cuts in ([600], [1, 2, 3], [100, 101, 900], [0, 1200]):
        parts = [gather(features[i], target[i], 30) for i in order.tensor_split(cuts)]
        before = copy.deepcopy(states_of(parts[-1]))
        total = merged(*parts)
        assert all(torch.equal(state, before[name]) for name, state in states_of(parts[-1]).items())
        assert values_of(total) == pytest.approx(values_of(whole), rel=1e-12)
        for name, state in states_of(total).items():
            expected = getattr(whole, name)
            state, expected = (state.triu(), expected.triu()) if name == "scatter" else (state, expected)
            assert torch.allclose(state, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max())), name


def test_a_merge_with_itself_counts_every_sample_twice():
    features, target = clusters(4, 30, 10, 0.5)
    moments = gather(features, target, 4)
    expected = values_of(moments)
    moments.merge(moments)
    assert moments.counts.tolist() == [60] * 4
    assert values_of(moments) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("other", [(5, 10, True), (4, 11, True), (4, 10, False)])
def test_moments_of_other_sizes_are_not_merged(other):
    classes, width, scatter = other
    with pytest.raises(ValueError, match="give both the same num_classes, num_features and metrics"):
        ClassMoments.zeros(4, 10).merge(ClassMoments.zeros(classes, width, scatter=scatter))


IGNORED = [-100, 255, 0, 3]  # two of them are classes as well


@pytest.mark.parametrize("ignore_index", IGNORED)
def test_ignored_samples_are_counted_nowhere_whatever_their_features_hold(ignore_index):
    features, target = clusters(5, 30, 12, 0.3)
    features, target = torch.cat([features, features[:60]]), torch.cat([target, torch.full((60,), ignore_index)])
    order = torch.cat([torch.arange(150, 155), torch.randperm(210)])  # the first ones of the batch are ignored
    features, target = features[order], target[order]
    kept = target != ignore_index
    features[~kept] = torch.tensor([torch.nan, torch.inf, 1e30, math.pi] * 3)
    moments = ClassMoments.zeros(5, 12)
    for rows, labels in zip(features.split(50), target.split(50), strict=True):
        moments.update(rows, labels, ignore_index)
    expected = gather(features[kept].contiguous(), target[kept], 5)
    for name, state in states_of(moments).items():
        assert torch.allclose(state, getattr(expected, name), rtol=1e-12, atol=1e-12), name
    assert moments.mislabeled == moments.nonfinite == 0


def test_a_batch_of_nothing_but_ignored_samples_changes_no_bit_and_other_labels_out_of_range_are_still_counted():
    features, target = clusters(3, 5, 4, 0.3)
    moments = gather(features, target, 3)
    before = copy.deepcopy(states_of(moments))
    moments.update(torch.full((7, 4), torch.nan), torch.full((7,), -100), -100)
    assert all(torch.equal(state, before[name]) for name, state in states_of(moments).items())
    moments.update(torch.ones(4, 4), torch.tensor([-100, -1, 3, 300]), -100)
    assert moments.mislabeled == 3
    assert moments.counts.sum() == len(target)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and 0 not in result.stride():
            self.nbytes = max(self.nbytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize(("batch", "width"), [(500_000, 64), (5000, 4096), (1000, 512)])
def test_an_update_needs_no_value_on_the_host_and_no_tensor_above_64_mb_whatever_the_batch(batch, width):
    with FakeTensorMode(), LargestTensor() as largest:  # its tensors have no values, so reading one raises
        moments = ClassMoments.zeros(10, width)
        features, target = torch.zeros(1, width).expand(batch, width), torch.zeros(1, dtype=int).expand(batch)
        moments.update(features, target, -100)
    assert largest.nbytes <= max(2**26, 8 * width**2)


def test_a_merge_takes_little_memory_compared_to_the_moments():
    one, other = (ClassMoments.zeros(2000, 600) for _ in range(2))
    with LargestTensor() as largest:
        one.merge(other)
    assert largest.nbytes <= one.means.nbytes / 10


def test_a_batch_of_several_blocks_gives_the_same_values():
    features, target = clusters(4, 5000, 64, 0.5)  # a block has 8,192 rows
    whole, parts = ClassMoments.zeros(4, 64), gather(features, target, 4, (3000,))
    whole.update(features, target)
    assert values_of(whole) == pytest.approx(values_of(parts), rel=1e-10)
    assert values_of(whole)["nc1"] == pytest.approx(reference.nc1(features.numpy(), target.numpy()), rel=1e-9)


def test_moments_without_the_scatter_matrix_merge_too_and_know_all_but_nc1():
    features, target = clusters(4, 30, 10, 0.5)
    first, second = ClassMoments.zeros(4, 10, scatter=False), ClassMoments.zeros(4, 10, scatter=False)
    first.update(features[:50], target[:50])
    second.update(features[50:], target[50:])
    names = [name for name in WEIGHTLESS if not METRICS[name].scatter]
    expected = evaluate(names, gather(features, target, 4))
    values = evaluate(names, merged(first, second))
    assert {n: v.item() for n, v in values.items()} == pytest.approx({n: v.item() for n, v in expected.items()})


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_every_statistic_of_batches_is_that_of_a_computation_from_all_samples(offset):
    rows, target = clusters(6, 20, 7, 0.5, dtype=torch.float64)
    rows, order = (
        rows + offset,
        (target == 5).long().argsort(stable=True),
    )  # the last class comes in the last batch alone
    rows, target = rows[order], target[order]
    rows[::3] = rows[::3].to(torch.bfloat16)
    target = torch.where(target == 0, -100, target)  # the class to which labels below 0 are nearest has no sample
    target[5::13], target[7::13], target[9::13] = 6, 9, -3
    moments = gather_ignoring(rows, target)
    used = (target > 0) & (target < 6)
    kept, labels = rows[used].numpy(), target[used].numpy()
    means, _, deviations, within, _ = reference.moments(kept, labels)
    truth = {
        "counts": np.bincount(labels, minlength=6),
        "means": np.vstack([np.zeros(7), means]),
        "spread": np.bincount(labels, (deviations**2).sum(axis=1), minlength=6),
        "columns": (deviations**2).sum(axis=0),
        "mislabeled": (target != -100).sum() - used.sum(),
        "inexact": [(np.frexp(kept)[0] * 2.0 ** (digits + 1) % 1 != 0).sum() for digits in (7, 10, 23)],
        "nonfinite": 0,
    }
    whole = ClassDeviations.of(rows[used], target[used], 6)
    for found in (moments, whole):
        for name, value in truth.items():
            if hasattr(found, name):
                np.testing.assert_allclose(getattr(found, name), value, rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(found.pooled(), within * len(kept), rtol=1e-9, atol=1e-9)
        axes = np.linalg.qr(np.arange(14.0).reshape(7, 2) ** 2)[0]
        along = found.within(torch.tensor(axes))
        np.testing.assert_allclose(along, ((deviations @ axes) ** 2).sum(axis=0), rtol=1e-9)
    rows[used.nonzero().flatten()[[0, 60, 61]], 2:4] = torch.inf
    rows[~used] = torch.nan
    assert gather_ignoring(rows, target).nonfinite == 3  # samples, whatever those hold that are of no class
    assert ClassDeviations.of(rows[used], target[used], 6).nonfinite == 3


def gather_ignoring(rows, target):
    moments = ClassMoments.zeros(6, 7)
    for part in zip(rows.split(32), target.split(32), strict=True):
        moments.update(*part, ignore_index=-100)
    return moments


def test_moments_around_other_class_means_and_merged_ones_are_those_of_a_computation_from_all_samples():
    rows, target = clusters(5, 12, 7, 0.5, dtype=torch.float64)
    keep = (target != 2) & ((target != 3) | (torch.arange(60) == (target == 3).nonzero()[0]))
    rows, target = rows[keep], target[keep]  # a class has no sample, another one
    cut = 15
    moments, other = (gather(rows[part], target[part], 5) for part in (slice(0, cut), slice(cut, None)))
    moments.merge(other)
    centers = torch.randn(5, 7).double()
    moved = moments.around(centers)
    means = torch.stack([rows[target == k].mean(dim=0) if k != 2 else torch.zeros(7) for k in range(5)])
    for found, around in ((moments, means), (moved, centers)):
        deviations = (rows - around[target]).numpy()
        np.testing.assert_allclose(found.means, around, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.spread, np.bincount(target, (deviations**2).sum(axis=1), 5), atol=1e-11)
        np.testing.assert_allclose(found.columns, (deviations**2).sum(axis=0), rtol=1e-11)
        np.testing.assert_allclose(found.pooled(), deviations.T @ deviations, atol=1e-11)


@pytest.mark.parametrize("of_spread", [False, True])
def test_squares_leave_the_range_where_a_share_of_eps_of_them_does(of_spread):
    info, empty = np.finfo(np.float64), ClassMoments.zeros(2, 3)
    low, high = math.sqrt(info.tiny) / info.eps, math.sqrt(info.max) * info.eps
    for size, problem in [
        (0, None),
        (1.01 * low, None),
        (1.0, None),
        (0.99 * high, None),
        (0.99 * low, "underflow"),
        (1.01 * high, "overflow"),
    ]:
        if of_spread:
            moments = replace(empty, spread=torch.tensor([0, size**2], dtype=torch.float64))
        else:
            moments = replace(empty, means=torch.tensor([[0, 0, 0], [0, -size, 0]], dtype=torch.float64))
        assert problem in moments.fault() if problem else moments.fault() is None, size


def test_the_last_digit_of_a_feature_counts():
    for dtype, digits in ((torch.float32, 23), (torch.float64, 52), (torch.float16, 10), (torch.bfloat16, 7)):
        features = torch.tensor([[1 + 2.0**-digits], [1.0]], dtype=dtype)
        assert ClassDeviations.of(features, torch.tensor([0, 1]), 2).precision == dtype


def test_with_one_feature_too_a_scatter_matrix_and_none_are_not_merged():
    with pytest.raises(ValueError, match="both keep a scatter matrix or none"):
        ClassMoments.zeros(2, 1).merge(ClassMoments.zeros(2, 1, scatter=False))


def test_what_reads_the_scatter_matrix_says_that_it_was_not_kept():
    moments = ClassMoments.zeros(2, 3, scatter=False)
    for read in (lambda: moments.within(torch.eye(3).double()), moments.pooled):
        with pytest.raises(RuntimeError, match="the scatter matrix was not kept"):
            read()


def test_the_moments_of_no_samples_lie_where_they_are_asked_to_and_count_in_integers():
    with torch.device("meta"):
        assert ClassMoments.zeros(2, 3).means.is_meta
        moments = ClassMoments.zeros(2, 3, "cpu", scatter=False)
    assert {value.device.type for value in states_of(moments).values()} == {"cpu"}
    assert moments.scatter.shape == (0, 0)
    assert ClassMoments.zeros(2, 3).scatter.shape == (3, 3)
    for name in ("nonfinite", "inexact", "mislabeled"):  # a float32 would stop at 16,777,216
        assert getattr(moments, name).dtype == torch.int64
    moments.update(torch.randn(3, 3), torch.tensor([0, 1, 2]))  # a label out of range
    assert (moments.mislabeled, moments.nonfinite, moments.inexact[2], moments.counts.sum()) == (1, 0, 0, 2)


def test_the_state_is_float64_but_on_a_device_without_it():
    assert state_dtype("cpu") == torch.float64
    assert state_dtype("mps") == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16])
def test_labels_of_any_integer_type_reach_as_far_as_they_can(dtype):
    features, target = clusters(100, 2, 4, 0.3)
    moments = gather(features, target.to(dtype), 300)
    assert moments.mislabeled == 0
    assert moments.counts[:100].tolist() == [2] * 100


DOUBLE = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("features", "precision"),
    [
        (DOUBLE, torch.float64),
        (DOUBLE.float(), torch.float32),
        (DOUBLE.half(), torch.float16),
        (DOUBLE.bfloat16(), torch.bfloat16),
        (DOUBLE.float().double(), torch.float32),  # what it was rounded to, not what it came in
        (DOUBLE.half().float(), torch.float16),
        (DOUBLE.bfloat16().double(), torch.bfloat16),
        (torch.cat([DOUBLE, DOUBLE.float().double()]), torch.float64),  # all rows must have been rounded
    ],
)
def test_the_precision_of_the_features_is_the_coarsest_type_that_holds_them_all(features, precision):
    target = torch.arange(len(features)) % 2
    assert ClassDeviations.of(features, target, 2).precision == precision
    one, other = gather(features[:1], target[:1], 2), gather(features[1:], target[1:], 2)
    for moments in (gather(features, target, 2), merged(one, other), merged(other, one)):
        assert moments.precision == precision


SPARSE = torch.eye(4)


@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*Sparse", "ignore:.*sparse", "ignore:.*quant")
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda: SPARSE.to_sparse(), "sparse_coo tensor; call .to_dense"),
        (lambda: SPARSE.to_sparse_csr(), "sparse_csr tensor; call .to_dense"),
        (lambda: SPARSE.to("meta"), "meta tensor"),
        (lambda: torch.nested.nested_tensor([SPARSE[0], SPARSE[1]]), "nested tensor"),
        (lambda: torch.nested.nested_tensor([SPARSE[0], SPARSE[1]], layout=torch.jagged), "nested tensor"),
        (lambda: SPARSE.to(torch.float8_e4m3fn), r"float8_e4m3fn \(4, 4\); call .float\(\)"),
        (lambda: SPARSE.to(torch.complex64), r"complex64 \(4, 4\)"),
        (lambda: torch.quantize_per_tensor(SPARSE, 0.1, 0, torch.qint8), "dequantize"),
        (lambda: SPARSE.tolist(), "got list"),
    ],
)
def test_features_without_floating_arithmetic_are_refused_with_a_remedy(features, message):
    with pytest.raises(ValueError, match=message):
        check_batch(features(), torch.arange(4))


@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*Sparse", "ignore:.*sparse", "ignore:.*quant")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: torch.arange(4).to_sparse(), "sparse_coo tensor"),
        (lambda: torch.arange(4, device="meta"), "meta tensor"),
        (lambda: torch.arange(4.0), r"float32 \(4,\); call .long"),
        (lambda: torch.ones(4, dtype=torch.bool), r"bool \(4,\); call .long"),
        (lambda: torch.ones(4, dtype=torch.complex64), "complex64"),
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.eye(4), "arg max"),
        (lambda: torch.arange(4).unsqueeze(1), "squeeze"),
        (lambda: [0, 1, 2, 3], "got list"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused_with_a_remedy(target, message):
    with pytest.raises(ValueError, match=message):
        check_batch(SPARSE, target())


@pytest.mark.parametrize("scale", [1e-40, 1e-24, 1e19, 1e30])
def test_float32_features_of_any_size_give_the_same_value(scale):
    features, target = clusters(4, 100, 12, 1.0)
    expected = evaluate(("nc1", "nc1_trace"), gather(features, target, 4))
    scaled = evaluate(("nc1", "nc1_trace"), gather(features * scale, target, 4))
    rel = 1e-3 if scale == 1e-40 else 1e-6  # 1e-40 is below the normal numbers of float32
    assert {n: v.item() for n, v in scaled.items()} == pytest.approx(
        {n: v.item() for n, v in expected.items()}, rel=rel
    )
