import copy
import functools
import io
import pickle
import warnings
from dataclasses import fields

import numpy as np
import pytest
import reference
import torch
import torch.multiprocessing as mp
from conftest import bottleneck, clusters, free_port
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers import BootStrapper, MetricTracker

from lightning_nc import NC1, NC2, NC3, NC4, NeuralCollapse, NeuralRegressionCollapse
from lightning_nc import functional as F
from lightning_nc.moments import ClassMoments

CLASSES, FEATURES = 5, 12


def data():
    return clusters(CLASSES, 40, FEATURES, 0.3)


def fill(metric, features, target, size=33):
    for rows, labels in zip(features.split(size), target.split(size), strict=True):
        metric.update(rows, labels)
    return metric


def every_metric():
    weight = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
    return {
        "nc1": NC1(CLASSES, FEATURES),
        "nc2_etf": NC2(CLASSES, FEATURES),
        "nc2_of": NC2(CLASSES, FEATURES, frame="of"),
        "nc2_etf_centered": NC2(CLASSES, FEATURES, center=True),
        "nc3": NC3(CLASSES, FEATURES, weight),
        "nc3_centered": NC3(CLASSES, FEATURES, lambda: weight, center=True),
    }


def expected():
    features, target = data()
    weight = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
    return reference.all_metrics(
        features.numpy(), target.numpy(), weight.double().numpy(), torch.zeros(CLASSES).numpy()
    )


@pytest.mark.parametrize("name", every_metric())
def test_a_metric_agrees_with_an_independent_computation(name):
    metric = fill(every_metric()[name], *data())
    assert metric.compute().item() == pytest.approx(expected()[name], rel=1e-9)
    assert not metric.compute().requires_grad
    assert metric.is_differentiable is False


def test_a_collection_shares_states_and_gives_the_same_values():
    collection = MetricCollection(every_metric())
    alone = {name: fill(metric, *data()).compute() for name, metric in every_metric().items()}
    fill(collection, *data())
    assert sorted(map(len, collection.compute_groups.values())) == [1, 5]  # nc1 keeps the scatter matrix too
    assert {name: value.item() for name, value in collection.compute().items()} == {
        n: v.item() for n, v in alone.items()
    }
    fill(collection, *data())  # after a compute the group must still share
    twice = {name: fill(fill(metric, *data()), *data()).compute().item() for name, metric in every_metric().items()}
    assert {name: value.item() for name, value in collection.compute().items()} == pytest.approx(twice, rel=1e-12)


def test_a_collection_keeps_metrics_of_different_sizes_apart():
    features, target = data()
    collection = MetricCollection({"a": NC1(CLASSES, FEATURES), "b": NC1(CLASSES + 1, FEATURES)})
    fill(collection, features, target)
    with pytest.warns(UserWarning, match="no sample"):
        values = collection.compute()
    assert values["a"].item() == pytest.approx(values["b"].item(), rel=1e-9)


def test_forward_gives_the_value_of_the_batch_and_accumulates_all():
    features, target = data()
    metric = NC1(CLASSES, FEATURES)
    for rows, labels in zip(features.split(50), target.split(50), strict=True):
        assert metric(rows, labels).item() == pytest.approx(F.nc1(rows, labels, CLASSES).item(), rel=1e-5)
    assert metric.compute().item() == pytest.approx(expected()["nc1"], rel=1e-6)


def test_merge_pickle_and_reset():
    features, target = data()
    first, second = fill(NC1(CLASSES, FEATURES), features[:70], target[:70]), NC1(CLASSES, FEATURES)
    fill(second, features[70:], target[70:])
    first.merge_state(pickle.loads(pickle.dumps(second)))
    assert first.compute().item() == pytest.approx(expected()["nc1"], rel=1e-6)
    first.reset()
    assert first.counts.sum() == 0
    assert fill(first, features, target).compute().item() == pytest.approx(expected()["nc1"], rel=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_saved_states_of_parts_of_the_data_merge_to_the_whole_whatever_the_split(parts, tmp_path):
    features, target = data()
    names = [name for name, spec in F.METRICS.items() if not spec.needs and spec.exists(CLASSES, FEATURES)]
    order = torch.randperm(len(target))
    for number, rows in enumerate(order.tensor_split(parts)):
        metric = fill(NeuralCollapse(CLASSES, FEATURES, metrics=names), features[rows], target[rows])
        metric.persistent(True)
        torch.save(metric.state_dict(), tmp_path / f"{number}.pt")
    total = NeuralCollapse(CLASSES, FEATURES, metrics=names)
    for number in range(parts):
        total.merge_state(torch.load(tmp_path / f"{number}.pt", weights_only=True))
    whole = fill(NeuralCollapse(CLASSES, FEATURES, metrics=names), features, target, len(target)).compute()
    assert {name: value.item() for name, value in total.compute().items()} == pytest.approx(
        {name: value.item() for name, value in whole.items()}, rel=1e-12
    )
    assert total.compute()["nc1"].item() == pytest.approx(expected()["nc1"], rel=1e-9)


def test_a_state_that_is_not_complete_or_does_not_fit_is_not_merged():
    metric = fill(NC1(CLASSES, FEATURES), *data())
    with pytest.raises(ValueError, match=r"got nothing; call metric.persistent\(True\)"):
        metric.merge_state(NC1(CLASSES, FEATURES).state_dict())
    with pytest.raises(ValueError, match="the same num_classes, num_features and metrics"):
        metric.merge_state(NC1(CLASSES, FEATURES + 1))
    assert metric.counts.sum() == len(data()[1])


@pytest.mark.filterwarnings("ignore:nc1 leaves out")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_precision_of_the_features_survives_pickle_merge_and_a_state_dict(dtype):
    # Behind a bottleneck it decides which directions count.
    features, target, points = bottleneck(CLASSES, 100, 64, dtype)
    first, second = (NC1(CLASSES, 64) for _ in range(2))
    first.update(features[::2], target[::2])
    second.update(features[1::2], target[1::2])
    second.persistent(True)
    loaded = NC1(CLASSES, 64)
    loaded.persistent(True)
    loaded.load_state_dict(second.state_dict())
    first = pickle.loads(pickle.dumps(first))
    first.merge_state(loaded)
    assert first.compute().item() == pytest.approx(F.nc1(features, target).item(), rel=1e-3)
    assert first.compute().item() == pytest.approx(F.nc1(points, target).item(), rel=0.3)


def test_a_reset_in_inference_mode_does_not_break_later_updates():
    features, target = data()
    metric = NC1(CLASSES, FEATURES)
    with torch.inference_mode():
        fill(metric, features, target)
        metric.reset()
        fill(metric, features[:99], target[:99])
    fill(metric, features[99:], target[99:])
    assert metric.compute().item() == pytest.approx(expected()["nc1"], rel=1e-6)


def test_the_state_keeps_its_precision_when_the_model_changes_its_own():
    metric = fill(NC1(CLASSES, FEATURES), *data())
    value = metric.compute()
    metric.to(torch.bfloat16).half().to("cpu")
    assert metric.means.dtype == torch.float64
    assert metric.compute() == value
    metric.reset()
    assert fill(metric, *data()).compute() == value
    metric.to("meta")
    assert metric.means.device.type == "meta"


def test_a_pickle_holds_the_state_once_and_not_the_zeros_of_a_reset():
    metric = NeuralCollapse(100, 400)
    assert len(pickle.dumps(metric)) < 1.1 * bytes_of(metric)


COPIES = {
    "itself": lambda metric: metric,
    "clone": lambda metric: metric.clone(),
    "deepcopy": copy.deepcopy,
    "collection": lambda metric: MetricCollection({"m": metric}).clone(prefix="val_")["m"],
    "bootstrap": lambda metric: BootStrapper(metric, num_bootstraps=2).metrics[1],
}
SOURCES = {
    "layer": lambda head: (head, head),
    "parameters": lambda head: (head.weight, head.bias),
    "callables": lambda head: (lambda: head.weight, lambda: head.bias),
}


def parts(head):
    return head.weight.detach().clone(), head.bias.detach().clone()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("way", COPIES)
def test_metrics_and_their_copies_read_the_weight_and_bias_at_every_compute(way, source):
    head, (features, target) = nn.Linear(FEATURES, CLASSES), clusters(CLASSES, 40, FEATURES, 2.0)
    weight, bias = SOURCES[source](head)
    metrics = [
        fill(COPIES[way](metric), features, target)
        for metric in (
            NC3(CLASSES, FEATURES, weight),
            NeuralCollapse(CLASSES, FEATURES, weight, bias, metrics="bias_collapse"),
            NC4(CLASSES, FEATURES, weight, bias),
        )
    ]
    optimizer = torch.optim.SGD(head.parameters(), 10.0)
    seen = []
    for _ in range(3):
        nc3, collapse, nc4 = (metric.compute() for metric in metrics)
        now = parts(head)
        assert nc3.item() == pytest.approx(F.nc3(features, target, now[0]).item(), rel=1e-9)
        assert collapse["bias_collapse"].item() == pytest.approx(F.bias_collapse(features, target, *now).item())
        assert nc4 == F.nc4(features, target, *now)
        seen.append(nc3.item())
        nn.functional.cross_entropy(head(features), target).backward()
        optimizer.step()
    assert len(set(seen)) == 3


def test_a_tracker_reads_the_current_weight_too():
    head, (features, target) = nn.Linear(FEATURES, CLASSES), data()
    tracker = MetricTracker(NC3(CLASSES, FEATURES, head))
    for _ in range(2):
        tracker.increment()
        tracker.update(features, target)
        with torch.no_grad():
            head.weight.add_(torch.randn(CLASSES, FEATURES))
        assert tracker.compute().item() == pytest.approx(F.nc3(features, target, parts(head)[0]).item(), rel=1e-9)


def test_a_layer_is_followed_when_its_parameters_are_replaced():
    head, (features, target) = nn.Linear(FEATURES, CLASSES), data()
    metric = fill(NC3(CLASSES, FEATURES, head).clone(), features, target)
    other = nn.Linear(FEATURES, CLASSES)
    head.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert metric.compute().item() == pytest.approx(F.nc3(features, target, parts(other)[0]).item(), rel=1e-9)


class Model(nn.Module):
    def __init__(self, source):
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)
        self.metric = NC3(CLASSES, FEATURES, source(self))

    def read(self):
        return self.head.weight


@pytest.mark.parametrize("source", [lambda m: m.head, lambda m: m.head.weight, lambda m: m.read])
def test_the_metric_of_a_copied_model_reads_the_head_of_the_copy(source):
    features, target = data()
    model = Model(source)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight.add_(torch.randn(CLASSES, FEATURES))
    for one in (model, twin):
        value = fill(one.metric, features, target).compute()
        assert value.item() == pytest.approx(F.nc3(features, target, parts(one.head)[0]).item(), rel=1e-9)


def test_the_layer_is_no_part_of_the_metric():
    head = nn.Linear(FEATURES, CLASSES)
    for metric in (NC3(CLASSES, FEATURES, head), NC4(CLASSES, FEATURES, head, head)):
        assert list(metric.modules()) == [metric]
        assert list(metric.parameters()) == []
        metric.persistent(True)
        assert not any("weight" in key for key in metric.state_dict())
        metric.to(torch.float16).to("meta")
        assert (head.weight.dtype, head.weight.device.type) == (torch.float32, "cpu")


def test_a_pickle_holds_the_values_of_the_weight():
    head, (features, target) = nn.Linear(FEATURES, CLASSES), data()
    metric = fill(NC3(CLASSES, FEATURES, head), features, target)
    file = io.BytesIO()
    torch.save(metric, file)
    before = metric.compute()
    with torch.no_grad():
        head.weight.mul_(-1)
    file.seek(0)
    assert torch.load(file, weights_only=False).compute() == before != metric.compute()


def test_without_a_weight_or_bias_the_metrics_that_need_it_are_left_out():
    assert NeuralCollapse(3, 4).metrics == ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of")
    head = nn.Linear(4, 3, bias=False)
    assert NeuralCollapse(3, 4, head, head, ("nc3", "bias_collapse")).metrics == ("nc3",)
    with pytest.raises(ValueError, match="no metric is left"):
        NeuralCollapse(3, 4, metrics="nc3")


def bytes_of(metric):
    return sum(state.numel() * state.element_size() for state in metric.metric_state.values())


def test_the_scatter_matrix_is_kept_only_if_a_metric_needs_it():
    assert bytes_of(NC2(10, 25_088)) < 3e6  # 5 GB with the matrix
    assert bytes_of(NeuralCollapse(10, 2000, metrics=("nc1_cdnv", "nc2_etf"))) < 1e6
    assert bytes_of(NC1(10, 2000)) > 2000**2 * 8


@pytest.mark.parametrize(("classes", "features"), [(5, 12), (9, 4)])
def test_nc1_is_the_same_in_the_span_of_the_class_means(classes, features):
    rows, target = clusters(classes, 30, features, 0.5)
    wide = fill(NeuralCollapse(classes, features, metrics="nc2_etf"), rows, target)
    basis = wide.span()
    rank = min(classes - 1, features)
    assert basis.shape == (features, rank)
    assert torch.allclose(basis.T @ basis, torch.eye(rank).double(), atol=1e-12)
    metric = fill(NeuralCollapse(classes, rank, metrics="nc1"), rows.double() @ basis, target)
    assert metric.compute()["nc1"].item() == pytest.approx(reference.nc1_by_axes(rows, target), rel=1e-8)


def test_nc1_alone_computes_nothing_else():
    assert NC1(3, 4).metrics == ("nc1",)


def test_a_class_of_one_sample_is_in_the_span():
    metric = NC1(3, 6)
    metric.update(torch.randn(5, 6), torch.tensor([0, 0, 1, 1, 2]))
    assert metric.span().shape == (6, 2)


def test_the_span_leaves_out_missing_classes_and_what_rounding_can_cause():
    rows, target, points = bottleneck(CLASSES, 100, 64, torch.float32)
    metric = fill(NeuralCollapse(CLASSES + 2, 64, metrics="nc2_etf"), rows, target)
    with pytest.warns(UserWarning, match="leaves out 2 of 4"):
        basis = metric.span()
    assert basis.shape == (64, 2)
    value = F.nc1(rows.double() @ basis, target)
    assert value.item() == pytest.approx(reference.nc1_by_axes(points, target), rel=1e-3)


def test_plot_draws_one_value_and_many():
    metric = fill(NC1(CLASSES, FEATURES), *data())
    _, axis = metric.plot()
    assert len(axis.lines) + len(axis.collections) >= 1
    metric.plot([metric.compute(), metric.compute()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1, "num_features": 3}, "num_classes must be an integer of at least 2"),
        ({"num_classes": 2.5, "num_features": 3}, "num_classes must be an integer of at least 2"),
        ({"num_classes": 3, "num_features": 0}, "num_features must be an integer of at least 1"),
        ({"num_classes": 3, "num_features": 2, "metrics": ("nc1", "nc2_eft")}, "did you mean one of nc2_etf"),
        ({"num_classes": 3, "num_features": 2, "weight": torch.ones(2, 3)}, r"weight must have shape \(3, 2\)"),
        ({"num_classes": 3, "num_features": 2, "weight": nn.Linear(3, 2)}, r"weight must have shape \(3, 2\)"),
        ({"num_classes": 3, "num_features": 2, "weight": nn.ReLU()}, "a layer with a weight.*got ReLU"),
        ({"num_classes": 3, "num_features": 2, "weight": 1.0}, "weight must be .* got float"),
        ({"num_classes": 3, "num_features": 2, "bias": torch.ones(2)}, r"bias must have shape \(3,\)"),
        ({"num_classes": 2, "num_features": 3, "weight": torch.ones(1, 3)}, r"torch.cat\(\[-weight, weight\]\)"),
        ({"num_classes": 2, "num_features": 3, "bias": torch.ones(1)}, r"torch.cat\(\[-bias, bias\]\)"),
        ({"num_classes": 3, "num_features": 3, "weight": torch.ones(1, 3)}, r"got \(1, 3\)$"),
        ({"num_classes": 3, "num_features": 3, "bias": torch.ones(1)}, r"got \(1,\)$"),
        (
            {"num_classes": 3, "num_features": 2, "ignore_index": 0.5},
            "ignore_index must be an integer or None, got 0.5",
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuralCollapse(**arguments)


def test_bad_batches_are_refused_before_they_reach_the_state():
    metric = NC1(3, 4)
    for features, target, message in [
        (torch.ones(2, 5), torch.tensor([0, 1]), "num_features=4"),
        (torch.ones(2, 4), torch.tensor([0, 3]), r"lie in \[0, 3\)"),
        (torch.ones(2, 4), torch.tensor([0.0, 1.0]), "class indices"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric.update(features, target)
    assert metric.counts.sum() == 0


def test_by_default_samples_with_the_label_minus_100_are_left_out():
    features, target = data()
    for make in (NC1, lambda *size: NeuralCollapse(*size, metrics="nc1")):
        metric = fill(make(CLASSES, FEATURES), torch.cat([features, features]), torch.cat([target, target * 0 - 100]))
        assert metric.counts.sum() == len(target)
        assert not metric.higher_is_better


@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
def test_samples_with_the_ignored_label_are_left_out_of_every_metric(ignore_index):
    features, target = data()
    weight = torch.randn(CLASSES, FEATURES)
    kept = target != 2
    padded = torch.where(kept, target, ignore_index)
    for make in (
        lambda **kwargs: NC1(CLASSES, FEATURES, **kwargs),
        lambda **kwargs: NC2(CLASSES, FEATURES, center=True, **kwargs),
        lambda **kwargs: NC3(CLASSES, FEATURES, weight, **kwargs),
        lambda **kwargs: NC4(CLASSES, FEATURES, weight, **kwargs),
    ):
        expected = fill(make(), features[kept], target[kept])
        metric = fill(make(ignore_index=ignore_index), features.masked_fill(~kept.unsqueeze(1), torch.nan), padded)
        with pytest.warns(UserWarning, match=r"no sample of 1 class \(2\)"):
            assert metric.compute().item() == pytest.approx(expected.compute().item(), rel=1e-12)


def test_without_an_ignored_label_every_label_must_be_a_class():
    for metric in (NC1(3, 4, ignore_index=None), NC4(3, 4, torch.ones(3, 4), ignore_index=-1)):
        with pytest.raises(ValueError, match=r"lie in \[0, 3\), got 1 outside, for example -100"):
            metric.update(torch.ones(2, 4), torch.tensor([0, -100]))
    with pytest.raises(ValueError, match=r"ignore_index must be an integer or None, got 'pad'"):
        NC1(3, 4, ignore_index="pad")


@pytest.mark.parametrize("metric", [NC1(3, 4), NC4(3, 4, torch.ones(3, 4))])
def test_nothing_but_ignored_samples_is_nan(metric):
    metric.update(torch.full((2, 4), torch.nan), torch.full((2,), -100))
    assert metric.compute().isnan()


def test_a_feature_that_is_not_finite_gives_nan_and_a_warning_with_its_number():
    features, target = data()
    features[3, 1], features[40, 2] = torch.inf, torch.nan
    metric = fill(NeuralCollapse(CLASSES, FEATURES), features, target)
    with pytest.warns(UserWarning, match="2 samples"):
        assert all(value.isnan() for value in metric.compute().values())


def test_nc4_agrees_with_an_independent_computation_for_any_split():
    features, target = clusters(CLASSES, 40, FEATURES, 2.0)
    weight, bias = torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
    expected = reference.nc4(features, target, weight.numpy(), bias.numpy())
    assert 0.1 < expected < 0.9
    read = functools.partial(torch.clone, bias)
    whole = fill(NC4(CLASSES, FEATURES, weight, read), features, target)
    assert whole.compute().item() == pytest.approx(expected, abs=1e-12)
    one, other = (NC4(CLASSES, FEATURES, weight, bias) for _ in range(2))
    one.update(features[:70], target[:70])
    other.update(features[70:], target[70:])
    one.merge_state(other)
    assert one.compute() == whole.compute() == pickle.loads(pickle.dumps(one)).compute()


def test_nc4_is_zero_when_the_classifier_is_that_of_the_nearest_mean():
    features, target = clusters(CLASSES, 40, FEATURES, 3.0, dtype=torch.float64)
    means = torch.stack([features[target == k].mean(dim=0) for k in range(CLASSES)])
    assert F.nc4(features, target, means, -means.square().sum(dim=1) / 2) == 0
    assert F.nc4(features, target, means, means.square().sum(dim=1)) > 0


def test_nc4_leaves_out_classes_without_a_sample_and_knows_nothing_of_no_samples():
    features, target = clusters(3, 20, FEATURES, 2.0)
    weight = torch.randn(5, FEATURES)
    with pytest.warns(UserWarning, match="no sample of 2 classes"):
        value = F.nc4(features, target, weight)
    assert value.item() == pytest.approx(reference.nc4(features, target, weight[:3].numpy(), 0), abs=1e-12)
    metric = NC4(5, FEATURES, weight)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()


def with_list_state():
    return NC4(CLASSES, FEATURES, torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1)))


def _one_rank(rank, world_size, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    features, target = data()
    shares = [slice(0, 60), slice(60, None), slice(0, 0)]  # the third rank has no sample
    near = with_list_state()
    if rank < 2:  # in float64 on one rank, in float32 on the other
        fill(near, features[shares[rank]].to((torch.float64, torch.float32)[rank]), target[shares[rank]])
    values = {"nc4": near.compute().item()}
    largest = [0]
    reduce = torch.distributed.all_reduce

    def watched(tensor, **kwargs):
        largest[0] = max(largest[0], tensor.numel())
        reduce(tensor, **kwargs)

    torch.distributed.all_reduce = watched
    for name, metric in every_metric().items():
        if rank < 2:
            fill(metric, features[shares[rank]], target[shares[rank]])
        local = metric.counts.clone()
        values[name] = metric.compute().item()
        assert torch.equal(metric.counts, local)  # after compute the state is the rank's own again
    assert largest[0] <= max(CLASSES * FEATURES, FEATURES**2)  # whatever the number of ranks
    manual = NC1(CLASSES, FEATURES, sync_on_compute=False)
    if rank < 2:
        fill(manual, features[shares[rank]], target[shares[rank]])
    manual.sync()
    values["synchronized by hand"] = manual.compute().item()
    assert manual.counts.sum() == len(target)  # until unsync()
    with pytest.raises(RuntimeError, match="before the next update"):
        manual.update(features, target)
    with pytest.raises(RuntimeError, match="before the next merge"):
        manual.merge_state(NC1(CLASSES, FEATURES))
    manual.unsync()
    assert manual.counts.sum() == len(target[shares[rank]])
    manual.merge_over_ranks()
    values["merged in place"] = manual.compute().item()
    assert manual.counts.sum() == len(target)
    with pytest.raises(RuntimeError, match="all ranks already"):
        manual.merge_over_ranks()
    with pytest.raises(RuntimeError, match="sync_on_compute=False"):
        NC1(CLASSES, FEATURES).merge_over_ranks()
    manual.reset()
    padding = torch.full((3, FEATURES), torch.nan), torch.full((3,), -100)
    manual.update(*(padding if rank else (features, target)))  # the other ranks have nothing but padding
    manual.merge_over_ranks()
    values["padding"] = manual.compute().item()
    rows, labels = clusters(300, 2, 300, 0.3)  # several blocks of classes and of the scatter matrix
    large = fill(NC1(300, 300, sync_on_compute=False), rows[rank::world_size], labels[rank::world_size])
    large.merge_over_ranks()
    values["in blocks"] = large.compute().item()
    collection = MetricCollection(every_metric())  # its metrics share states
    for _ in range(2):
        fill(collection, features[rank::world_size], target[rank::world_size], 7)
        values |= {f"{name} of a collection": value.item() for name, value in collection.compute().items()}
    low, labels, _ = bottleneck(CLASSES, 100, 64, torch.bfloat16)
    narrow = NC1(CLASSES, 64)
    if rank < 2:
        fill(narrow, low[rank::2], labels[rank::2])
    values["low rank"] = narrow.compute().item()
    queue.put((rank, values))
    torch.distributed.destroy_process_group()


def _problem():
    """Features, labels, a weight, a bias and other data. Sorted, so that a rank has no sample of some classes."""
    features, target = clusters(6, 20, FEATURES, 0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    weight, bias, ood = (
        torch.randn(*size, generator=generator).double() for size in ((6, FEATURES), (6,), (9, FEATURES))
    )
    order = target.argsort()
    return features[order], target[order], weight, bias, ood


def _many():
    """Several blocks of classes and of the scatter matrix; a class has no sample, and another one."""
    features, target = clusters(300, 2, 250, 0.3)
    kept = target != 7
    kept[(target == 9).nonzero()[0]] = False
    return features[kept], target[kept]


def _half(rank, port, folder):
    """What two ranks find that share the samples, one 50 of 120 and the other the rest."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    features, target, weight, bias, ood = _problem()
    own = [slice(0, 50), slice(50, None)][rank]
    metric = NeuralCollapse(6, FEATURES, weight, bias, list(F.METRICS), sync_on_compute=False)
    fill(metric, features[own], target[own])
    metric.update_ood(ood[rank::2])
    metric.merge_over_ranks()
    centers = torch.stack([features[target == k].mean(dim=0) for k in range(6)])
    held = NeuralCollapse(6, FEATURES, weight, bias, ["ncc_error", "nc4", "nc1_cdnv_directional"], centers=centers)
    held.keeps_samples = False
    fill(held, features[own], target[own])
    regression = NeuralRegressionCollapse(3, FEATURES, weight[:3])
    regression.update(features[own], features[own, :3] ** 2)
    sums = NeuralRegressionCollapse(3, FEATURES, sync_on_compute=False)
    sums.merge_over_ranks()  # of no samples
    assert not sums.feature_mean.any()
    sums.reset()
    if rank:  # one sample in all
        sums.update(features[:1], features[:1, :3])
    sums.merge_over_ranks()
    torch.testing.assert_close(sums.feature_mean, features[0], rtol=1e-12, atol=0)
    sums.reset()
    sums.update(features[own] if rank else features[own] / 0, features[own, :3])
    sums.merge_over_ranks()
    assert sums.nonfinite == 50  # of the other rank
    alone = [torch.distributed.new_group([other]) for other in (0, 1)][rank]
    synced = fill(NeuralCollapse(6, FEATURES, weight, bias, ["nc1", "nc4"]), features[own], target[own])
    within = fill(NeuralCollapse(6, FEATURES, metrics="nc1", process_group=alone), features[own], target[own])
    assert within.compute()["nc1"].item() == pytest.approx(F.nc1(features[own], target[own], 6).item(), rel=1e-9)
    parted = NeuralRegressionCollapse(3, FEATURES, process_group=alone)
    parted.update(features[own], features[own, :3] ** 2)
    assert parted.compute()["nrc1"].item() == pytest.approx(F.nrc1(features[own], features[own, :3]).item(), rel=1e-9)
    apart = NeuralCollapse(6, FEATURES, weight, bias, ["nc1", "nc4", "nc5"], sync_on_compute=False)
    apart.update(features[own], target[own])
    apart.update_ood(ood[rank::2])
    apart.merge_over_ranks(alone)
    assert torch.equal(apart.ood_sum, ood[rank::2].sum(dim=0))
    assert apart.ood_count == len(ood[rank::2])
    assert metric.ood_count == 9
    assert apart.counts.sum() == apart.compared.sum() == len(target[own])
    many, labels = _many()
    moments = ClassMoments.zeros(300, 250)
    moments.update(many[rank::2], labels[rank::2])
    moments.merge_over_ranks()
    values = metric.compute() | {f"held {name}": value for name, value in held.compute().items()}
    values |= regression.compute() | {f"synced {name}": value for name, value in synced.compute().items()}
    assert synced.counts.sum() == len(target[own])  # the rank's own state is back
    parts = {field.name: getattr(moments, field.name) for field in fields(moments)} | {"pooled": moments.pooled()}
    torch.save([values, parts], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_give_every_value_of_all_samples(tmp_path):
    ranks = mp.start_processes(_half, (free_port(), tmp_path), 2, join=False, start_method="fork")
    finished = ranks.join(timeout=60) or ranks.join(timeout=60)  # returns after the first process that ends
    for process in ranks.processes:
        process.kill()
    assert finished
    features, target, weight, bias, ood = _problem()
    expected = reference.all_metrics(*(part.numpy() for part in (features, target, weight, bias, ood)))
    expected |= {f"held {name}": expected[name] for name in ("ncc_error", "nc4", "nc1_cdnv_directional")}
    expected |= {f"synced {name}": expected[name] for name in ("nc1", "nc4")}
    squares = features[:, :3] ** 2
    expected["nrc1"] = F.nrc1(features, squares).item()
    expected |= {name: getattr(F, name)(features, squares, weight[:3]).item() for name in ("nrc2", "nrc3")}
    many, labels = _many()
    means, _, deviations, within, _ = reference.moments(many, labels)
    means = np.insert(means, 7, 0, axis=0)
    squares = np.bincount(labels, (deviations**2).sum(axis=1))
    for rank in (0, 1):
        values, parts = torch.load(tmp_path / f"{rank}.pt")
        assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, rel=1e-8, nan_ok=True)
        found = {
            "counts": np.bincount(labels),
            "means": means,
            "spread": squares,
            "columns": (deviations**2).sum(axis=0),
        }
        for name, truth in (found | {"pooled": within * len(many)}).items():
            np.testing.assert_allclose(parts[name], truth, rtol=1e-9, atol=1e-10, err_msg=name)
        coarse = [(many != many.to(dtype)).sum().item() for dtype in (torch.bfloat16, torch.float16)]
        assert parts["inexact"].tolist() == [*coarse, 0]


@pytest.mark.filterwarnings("ignore:nc1 leaves out")
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_real_processes_agree_with_one(world_size):
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    workers = [context.Process(target=_one_rank, args=(rank, world_size, port, queue)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    single = {
        name: fill(m, *data()).compute().item() for name, m in {**every_metric(), "nc4": with_list_state()}.items()
    }
    low, labels, _ = bottleneck(CLASSES, 100, 64, torch.bfloat16)
    single["in blocks"] = F.nc1(*clusters(300, 2, 300, 0.3)).item()
    single |= {f"{name} of a collection": single[name] for name in every_metric()}
    single |= dict.fromkeys(("synchronized by hand", "merged in place", "padding"), single["nc1"])
    single["low rank"] = F.nc1(low, labels).item()
    for values in results.values():
        assert values == pytest.approx(single, rel=1e-6)
        assert values == results[0]


def test_the_layer_below_an_adapter_is_refused_as_a_weight_and_what_the_adapter_applies_is_taken():
    peft = pytest.importorskip("peft")
    rows, target = clusters(3, 10, 6, 0.3)
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 3))
    head = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights=False)
    ).base_model.model[1]
    with pytest.raises(ValueError, match="below its adapter; pass a callable"):
        NC3(3, 6, weight=head)
    metric = NC3(3, 6, weight=lambda: head.weight + head.get_delta_weight("default"))
    metric.update(rows, target)
    applied = (head(torch.eye(6)) - head(torch.zeros(1, 6))).T.detach().double().numpy()
    assert metric.compute().item() == pytest.approx(
        reference.direction(applied, reference.moments(rows, target)[0]), rel=1e-5
    )


def test_a_buffer_of_labels_that_is_filled_again_changes_no_sample_that_is_kept():
    features, target = clusters(CLASSES, 40, FEATURES, 2.0)
    metric, labels = NeuralCollapse(CLASSES, FEATURES, metrics="ncc_error"), torch.empty(40, dtype=torch.long)
    for rows, own in zip(features.split(40), target.split(40), strict=True):
        metric.update(rows, labels.copy_(own))
    assert metric.compute()["ncc_error"] == F.ncc_error(features, target)


def test_samples_that_were_compared_already_are_not_merged_with_samples_that_are_kept():
    features, target = clusters(CLASSES, 40, FEATURES, 2.0)
    compared, kept = (NeuralCollapse(CLASSES, FEATURES, metrics="ncc_error") for _ in range(2))
    compared.keeps_samples = False
    compared.update(features, target)
    compared.compare(features[target == 1], target[target == 1])
    kept.update(features, target)
    for one, other in ((compared, kept), (kept, compared)):
        with pytest.raises(ValueError, match="compared with class means already"):
            one.merge_state(other)


@pytest.mark.parametrize("kept", [True, False])
def test_held_out_samples_are_compared_with_the_class_means_of_other_data(kept):
    train, labels = clusters(5, 9, 4, 0.5, dtype=torch.float64)
    rows, target = clusters(5, 30, 4, 2.5, dtype=torch.float64)
    rows, target = rows[target != 4], target[target != 4]  # a class of the centers has no sample
    centers = torch.stack([train[labels == k].mean(dim=0) for k in range(5)])
    weight, bias = torch.randn(5, 4).double(), torch.randn(5).double()
    names = ["nc1", "nc1_trace", "nc2_etf", "ncc_error", "nc4"]
    metric = NeuralCollapse(5, 4, weight, bias, names, centers=centers.clone().requires_grad_())
    metric.keeps_samples = kept
    assert "centers" not in metric.state_dict()
    fill(metric, rows, target)
    with pytest.warns(UserWarning, match="no sample of 1 class"):
        values = {name: value.item() for name, value in metric.compute().items()}
    own, used = reference.moments(rows, target)[0], centers[:4].numpy()
    deviations, centered = rows.numpy() - used[target], used - used.mean(axis=0)
    nearest = np.array([((row - centers.numpy()) ** 2).sum(axis=1).argmin() for row in rows.numpy()])
    decision = (rows @ weight.T + bias).argmax(dim=1).numpy()
    within, between = deviations.T @ deviations / len(rows), centered.T @ centered / 4
    truth = {
        "nc1": reference.nc1_by_axes(rows, target),
        "nc1_trace": reference.all_metrics(rows, target, weight[:4].numpy(), bias[:4].numpy())["nc1_trace"],
        "nc2_etf": reference.frame(own, "etf"),
        "ncc_error": np.mean(nearest != target.numpy()),
        "nc4": np.mean(nearest != decision),
        "nc1_train_means": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 4,
        "nc1_trace_train_means": np.trace(within) / np.trace(between),
    }
    assert values == pytest.approx(truth, rel=1e-9)
    coarse = NeuralCollapse(5, 4, weight, bias, names, centers=centers.float())
    exact = NeuralCollapse(5, 4, weight, bias, names, centers=centers.float().double())
    for part in (coarse, exact):
        fill(part, rows, target)
    with pytest.warns(UserWarning, match="no sample of 1 class"):
        assert coarse.compute() == exact.compute()


def test_samples_of_a_class_without_a_center_are_not_compared():
    rows, target = clusters(4, 20, 6, 2.0, dtype=torch.float64)
    centers = torch.stack([rows[target == k].mean(dim=0) for k in range(4)]) + 0.3
    centers[2, 1] = torch.nan
    kept = target != 2
    kept[(target == 2).nonzero()[0]] = True  # a single one of these samples
    names = ["ncc_error", "nc1_cdnv_directional", "nc1_trace"]
    metric = fill(NeuralCollapse(4, 6, metrics=names, centers=centers), rows[kept], target[kept])
    with pytest.warns(UserWarning, match="1 classes of the samples have no mean among the centers"):
        values = metric.compute()
    assert list(values) == ["nc1_trace", "ncc_error", "nc1_cdnv_directional"]  # without NC1 around the centers
    rows, target = rows[target != 2], target[target != 2]
    without = fill(NeuralCollapse(4, 6, metrics=names, centers=centers), rows, target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest = without.compute()
    assert not any("no mean among" in str(warning.message) for warning in caught)  # it has no sample that is lost
    assert "nc1_trace_train_means" in rest
    for name in ("ncc_error", "nc1_cdnv_directional"):
        assert values[name] == rest[name]
    known = [k for k in range(4) if k != 2]
    nearest = [min(known, key=lambda k: ((row - centers[k]) ** 2).sum()) for row in rows]
    wrong = [near != label for near, label in zip(nearest, target.tolist(), strict=True)]
    assert values["ncc_error"].item() == pytest.approx(np.mean(wrong), abs=1e-12)
    assert 0 < np.mean(wrong) < 1
    with pytest.raises(ValueError, match=r"centers must have shape \(4, 6\), got \(6, 4\)"):
        NeuralCollapse(4, 6, centers=centers.T)


def test_a_second_pass_compares_every_sample_once():
    features, target = clusters(CLASSES, 40, FEATURES, 2.0)
    metric = NeuralCollapse(CLASSES, FEATURES, metrics="ncc_error")
    metric.keeps_samples = False
    fill(metric, features, target)
    assert not metric.compared.any()
    for part in zip(features.split(33), target.split(33), strict=True):
        metric.compare(*part)
    assert torch.equal(metric.compared, metric.counts)
    assert metric.compute()["ncc_error"] == F.ncc_error(features, target)


def test_an_absent_class_is_nobodys_nearest_and_a_class_of_one_sample_is_compared_with():
    rows, target = clusters(4, 30, 6, 2.0, dtype=torch.float64)
    kept = (target != 1) & ((target != 2) | (torch.arange(120) == (target == 2).nonzero()[0]))
    rows, target = rows[kept], target[kept]
    metric = fill(NeuralCollapse(4, 6, metrics="ncc_error"), rows, target)
    with pytest.warns(UserWarning, match="no sample of 1 class"):
        value = metric.compute()["ncc_error"].item()
    owner = np.searchsorted([0, 2, 3], target)
    assert value == pytest.approx(np.mean(reference.nearest(rows, target) != owner), abs=1e-12)


def test_comparisons_with_the_same_centers_merge():
    features, target = clusters(CLASSES, 40, FEATURES, 2.0)
    centers = torch.stack([features[target == k].double().mean(dim=0) for k in range(CLASSES)])
    parts = [NeuralCollapse(CLASSES, FEATURES, metrics="ncc_error", centers=centers) for _ in range(2)]
    for metric, rows in zip(parts, (slice(0, 70), slice(70, None)), strict=True):
        metric.keeps_samples = False
        fill(metric, features[rows], target[rows])
    parts[0].merge_state(parts[1])
    assert torch.equal(parts[0].compared, parts[0].counts)
    assert parts[0].compute()["ncc_error"] == F.ncc_error(features, target)


def test_labels_out_of_range_that_only_the_device_has_seen_raise_in_compute():
    features, target = data()
    metric = NC1(CLASSES, FEATURES)
    metric.moments().update(features, torch.where(target == 1, CLASSES, target))  # update() reads no label off the CPU
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, {CLASSES}\), got 40 outside"):
        metric.compute()


def test_other_data_come_in_batches_of_any_precision():
    features, target = data()
    other = torch.randn(50, FEATURES).bfloat16()
    metric, twin = (fill(NeuralCollapse(CLASSES, FEATURES, metrics="nc5"), features, target) for _ in range(2))
    for part in other[20:].split(16):
        metric.update_ood(part)
    for part in other[:20].split(16):
        twin.update_ood(part)
    metric.merge_state(twin)
    weight = np.eye(CLASSES, FEATURES)
    truth = reference.all_metrics(features, target, weight, np.zeros(CLASSES), other.double().numpy())["nc5"]
    assert metric.compute()["nc5"].item() == pytest.approx(truth, rel=1e-9)
    assert metric.ood_count == 50
    np.testing.assert_allclose(metric.ood_sum, other.double().sum(dim=0), rtol=1e-12)
    metric.reset()
    assert metric.ood_sum.shape == (FEATURES,)
    with pytest.raises(ValueError, match=f"num_features={FEATURES}"):
        metric.update_ood(other[:, :3])


def test_a_buffer_of_features_that_is_filled_again_changes_no_sample_that_is_kept():
    features, target = clusters(CLASSES, 40, FEATURES, 2.0)
    metric, rows = NeuralCollapse(CLASSES, FEATURES, metrics="ncc_error"), torch.empty(40, FEATURES)
    for part, labels in zip(features.split(40), target.split(40), strict=True):
        metric.update(rows.copy_(part), labels)
    assert metric.compute()["ncc_error"] == F.ncc_error(features, target)


def test_after_a_merge_over_ranks_nothing_is_added():
    features, target = data()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        metric = fill(
            NeuralCollapse(CLASSES, FEATURES, metrics=["nc1", "ncc_error"], sync_on_compute=False), features, target
        )
        metric.merge_over_ranks()
        for add, what in (
            (lambda: metric.update(features, target), "update"),
            (lambda: metric.merge_state(metric), "merge"),
        ):
            with pytest.raises(RuntimeError, match=f"before the next {what}"):
                add()
        with pytest.raises(RuntimeError, match="all ranks already"):
            metric.merge_over_ranks()
        assert metric.compute()["ncc_error"] == F.ncc_error(features, target)
        assert metric.counts.sum() == len(target)
        around = fill(NeuralCollapse(CLASSES, FEATURES, metrics="nc1", centers=metric.means), features, target)
        assert around.compute().keys() == {"nc1", "nc1_train_means"}  # merges, though it compares no sample
    finally:
        torch.distributed.destroy_process_group()


def test_a_metric_is_not_merged_with_itself():
    metric = fill(NC1(CLASSES, FEATURES), *data())
    with pytest.raises(ValueError, match="with itself: its samples would count twice"):
        metric.merge_state(metric)
    assert metric.counts.sum() == len(data()[1])


def test_nc5_without_other_data_says_so():
    features, target = clusters(CLASSES, 40, FEATURES, 2.0)
    metric = NeuralCollapse(CLASSES, FEATURES, metrics="nc5")
    metric.update(features, target)
    with pytest.warns(UserWarning, match="nan, because the mean of the data of no class is not finite"):
        assert metric.compute()["nc5"].isnan()
