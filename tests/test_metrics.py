import pickle
import socket

import numpy as np
import pytest
import reference
import torch
import torch.multiprocessing as mp
from conftest import clusters
from torchmetrics import MetricCollection

from lightning_nc import NC1, NC2, NC3, NC4, NeuralCollapse
from lightning_nc import functional as F
from lightning_nc.functional import MEASURES

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
    return reference.all_measures(
        features.numpy(), target.numpy(), weight.double().numpy(), torch.zeros(CLASSES).numpy()
    )


@pytest.mark.parametrize("name", every_metric())
def test_a_metric_agrees_with_an_independent_computation(name):
    metric = fill(every_metric()[name], *data())
    assert metric.compute().item() == pytest.approx(expected()[name], rel=1e-6)
    assert not metric.compute().requires_grad
    assert metric.is_differentiable is False


def test_a_collection_shares_one_state_and_gives_the_same_values():
    collection = MetricCollection(every_metric())
    alone = {name: fill(metric, *data()).compute() for name, metric in every_metric().items()}
    fill(collection, *data())
    assert len(collection.compute_groups) == 1
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


def test_forward_gives_the_value_of_the_batch_and_gathers_all():
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
    assert metric.scatter.dtype == torch.float64
    metric._computed = None
    assert metric.compute() == value
    metric.to("meta")
    assert metric.scatter.device.type == "meta"


def test_the_weight_is_read_at_compute_and_is_no_parameter_of_the_metric():
    layer = torch.nn.Linear(FEATURES, CLASSES)
    metric = fill(NeuralCollapse(CLASSES, FEATURES, layer.weight, layer.bias, tuple(MEASURES)), *data())
    assert list(metric.parameters()) == []
    before = metric.compute()["nc3"]
    with torch.no_grad():
        layer.weight.mul_(-1)
    metric._computed = None
    assert metric.compute()["nc3"] != before
    assert set(metric.compute()) == set(MEASURES)


def test_without_a_weight_its_measures_are_left_out():
    assert NeuralCollapse(3, 4).metrics == ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of")
    with pytest.raises(ValueError, match="nothing is left to measure"):
        NeuralCollapse(3, 4, metrics=("nc3",))


def test_plot_draws_one_value_and_many():
    metric = fill(NC1(CLASSES, FEATURES), *data())
    _, axis = metric.plot()
    assert len(axis.lines) + len(axis.collections) >= 1
    metric.plot([metric.compute(), metric.compute()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1, "num_features": 3}, "num_classes must be an integer of at least 2"),
        ({"num_classes": 3, "num_features": 0}, "num_features must be a positive integer"),
        ({"num_classes": 3, "num_features": 2, "metrics": ("nc1", "nc2_eft")}, "did you mean one of nc2_etf"),
        ({"num_classes": 3, "num_features": 2, "metrics": "nc1"}, r"write \('nc1',\)"),
        ({"num_classes": 3, "num_features": 2, "weight": torch.ones(2, 3)}, r"weight must have shape \(3, 2\)"),
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


def test_a_feature_that_is_not_finite_gives_nan_and_a_warning_with_its_number():
    features, target = data()
    features[3, 1], features[40, 2] = torch.inf, torch.nan
    metric = fill(NeuralCollapse(CLASSES, FEATURES), features, target)
    with pytest.warns(UserWarning, match="2 samples"):
        assert all(value.isnan() for value in metric.compute().values())


def disagreement(features, target, weight, bias):
    """Sample by sample, in NumPy."""
    rows = features.double().numpy()
    means = np.stack([rows[target.numpy() == k].mean(axis=0) for k in range(len(weight))])
    nearest = [min(range(len(means)), key=lambda k: ((row - means[k]) ** 2).sum()) for row in rows]
    return np.mean(np.array(nearest) != (rows @ weight.double().numpy().T + bias.double().numpy()).argmax(axis=1))


def test_nc4_agrees_with_an_independent_computation_for_any_split(monkeypatch):
    features, target = clusters(CLASSES, 40, FEATURES, 2.0)
    weight, bias = torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
    expected = disagreement(features, target, weight, bias)
    assert 0.1 < expected < 0.9
    whole = fill(NC4(CLASSES, FEATURES, weight, lambda: bias), features, target)
    assert whole.compute().item() == pytest.approx(expected, abs=1e-12)
    one, other = (NC4(CLASSES, FEATURES, weight, bias) for _ in range(2))
    one.update(features[:70], target[:70])
    other.update(features[70:], target[70:])
    one.merge_state(other)
    assert one.compute() == whole.compute() == pickle.loads(pickle.dumps(one)).compute()
    monkeypatch.setattr(F, "_BLOCK", 7 * CLASSES)
    assert F.nc4(features, target, weight, bias) == whole.compute()


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
    assert value.item() == pytest.approx(disagreement(features, target, weight[:3], torch.zeros(3)), abs=1e-12)
    metric = NC4(5, FEATURES, weight)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()
    with pytest.raises(ValueError, match=r"use lightning_nc\.NC4 or functional\.nc4"):
        NeuralCollapse(5, FEATURES, weight, metrics=("nc4",))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def kept():
    return NC4(CLASSES, FEATURES, torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1)))


def _one_rank(rank, world_size, port, queue):
    calls = []
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    features, target = data()
    parts = [slice(0, 60), slice(60, None), slice(0, 0)]  # the third rank sees nothing
    near = kept()
    if rank < 2:  # in float64 on one rank, in float32 on the other
        fill(near, features[parts[rank]].to((torch.float64, torch.float32)[rank]), target[parts[rank]])
    values = {"nc4": near.compute().item()}
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor, **kwargs: (calls.append(tensor.numel()), reduce(tensor, **kwargs))
    for name in ("all_gather", "gather", "barrier", "broadcast", "all_gather_object"):
        setattr(torch.distributed, name, lambda *a, name=name, **k: calls.append(name))
    for name, metric in every_metric().items():
        if rank < 2:
            fill(metric, features[parts[rank]], target[parts[rank]])
        local = metric.counts.clone()
        calls.clear()
        values[name] = metric.compute().item()
        assert len(calls) <= 3, calls
        assert all(
            isinstance(numel, int) and numel <= 2 * sum(s.numel() for s in metric._defaults.values()) for numel in calls
        )
        assert torch.equal(metric.counts, local)  # after compute the state is the rank's own again
    queue.put((rank, values))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_real_processes_agree_with_one_in_at_most_three_collectives(world_size):
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
    single = {name: fill(m, *data()).compute().item() for name, m in {**every_metric(), "nc4": kept()}.items()}
    for values in results.values():
        assert values == pytest.approx(single, rel=1e-6)
        assert values == results[0]
