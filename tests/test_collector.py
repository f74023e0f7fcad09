"""What needs the samples a second time, other data, or permuted labels, with ``measure`` and the callback."""

import functools
import math

import numpy as np
import pytest
import reference
import torch
from conftest import clusters
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapse, NeuralCollapseCallback, functional, measure
from lightning_nc.functional import METRICS

CLASSES, FEATURES = 4, 6
ROWS, TARGET = clusters(CLASSES, 25, 8, 2.0)
OTHERS = clusters(CLASSES, 11, 8, 2.5, seed=1)
SAMPLES = ("nc4", "ncc_error", "nc1_cdnv_directional")
quiet = functools.partial(measure, progress=False)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches(rows=ROWS, target=TARGET, size=13):
    return DataLoader(TensorDataset(rows, target), size, shuffle=True)


def truth(model, rows, target, centers=None):
    """Sample by sample, in float64, with the class means of these samples or of others."""
    with torch.no_grad():
        features = model.net(rows).double().numpy()
        around = features if centers is None else model.net(centers[0]).double().numpy()
        weight, bias = model.head.weight.double().numpy(), model.head.bias.double().numpy()
    labels, target = (target if centers is None else centers[1]).numpy(), target.numpy()
    means = np.stack([around[labels == k].mean(axis=0) for k in range(CLASSES)])
    nearest = np.array([((row - means) ** 2).sum(1).argmin() for row in features])
    deviations = features - means[target]
    separation = means - means.mean(axis=0)
    variance = np.array([(deviations[target == k] ** 2).sum(1).mean() for k in range(CLASSES)])
    pairs = [(i, j) for i in range(CLASSES) for j in range(CLASSES) if i != j]
    distance = {(i, j): ((means[i] - means[j]) ** 2).sum() for i, j in pairs}
    directional = [
        ((deviations[target == i] @ (means[j] - means[i])) ** 2).mean() / distance[i, j] ** 2 for i, j in pairs
    ]
    within = deviations.T @ deviations / len(features)
    between = separation.T @ separation / CLASSES
    return {
        "nc4": (nearest != (features @ weight.T + bias).argmax(1)).mean(),
        "ncc_error": (nearest != target).mean(),
        "nc1_cdnv_directional": np.mean(directional),
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / CLASSES,
        "nc1_trace": np.trace(within) / np.trace(between),
        "nc1_cdnv": np.mean([(variance[i] + variance[j]) / (2 * distance[i, j]) for i, j in pairs]),
    }


def test_samples_that_fit_the_budget_and_a_second_pass_give_the_same_values(capsys):
    model, expected = Net(), None
    for budget in (2**30, 0):
        values = quiet(model, batches(), metrics=SAMPLES, layers=["net.0"], feature_budget=budget)
        for name in SAMPLES:
            assert values[name] == pytest.approx(truth(model, ROWS, TARGET)[name], rel=1e-6)
        expected = expected or values
        assert values == pytest.approx(expected, rel=1e-12)
    assert "net.0/ncc_error" in values
    assert "net.0/nc4" not in values  # which needs the classifier's weight


def test_a_second_pass_is_made_only_if_it_must_be_and_is_said_once(capsys):
    model, seen = Net(), []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for budget, passes in ((2**30, 1), (100, 2)):
        seen.clear()
        quiet(model, batches(), metrics="ncc_error", feature_budget=budget)
        assert sum(seen) >= passes * len(ROWS)
        assert sum(seen) < (passes + 1) * len(ROWS)


def test_the_effective_depth_is_the_first_layer_that_separates_as_well_as_the_last():
    model = Net()
    values = quiet(model, batches(), metrics="ncc_error", layers=["net.0", "net.1"])
    errors = [values["net.0/ncc_error"], values["net.1/ncc_error"], values["ncc_error"]]
    assert values["effective_depth"] == next(i for i, error in enumerate(errors, 1) if error <= errors[-1] + 0.01)
    assert "effective_depth" not in quiet(model, batches(), metrics="ncc_error")


def test_held_out_samples_are_measured_around_the_class_means_of_the_reference():
    model = Net()
    names = (*SAMPLES, "nc1", "nc1_trace", "nc1_cdnv", "nc2_etf")
    values = quiet(model, batches(*OTHERS), metrics=names, reference=batches())
    around, own = truth(model, *OTHERS, centers=(ROWS, TARGET)), truth(model, *OTHERS)
    for name in SAMPLES:
        assert values[name] == pytest.approx(around[name], rel=1e-6), name
    for name in ("nc1", "nc1_trace", "nc1_cdnv"):
        assert values[name] == pytest.approx(own[name], rel=1e-5), name
        assert values[f"{name}_train_means"] == pytest.approx(around[name], rel=1e-5), name
    assert {*values} == {*names, "nc1_train_means", "nc1_trace_train_means", "nc1_cdnv_train_means"}


def test_a_reference_that_lacks_a_class_leaves_its_samples_out_with_a_warning():
    model, kept = Net(), TARGET != 2
    with pytest.warns(UserWarning, match="1 classes of the samples have no mean"):
        values = quiet(
            model, batches(*OTHERS), metrics=("ncc_error", "nc1"), reference=batches(ROWS[kept], TARGET[kept])
        )
    assert {*values} == {"ncc_error", "nc1"}
    with torch.no_grad():
        means = torch.stack([model.net(ROWS[k == TARGET]).mean(dim=0) for k in (0, 1, 3)])
        rows, target = (part[OTHERS[1] != 2] for part in OTHERS)
        nearest = torch.tensor([0, 1, 3])[torch.cdist(model.net(rows), means).argmin(dim=1)]
    assert values["ncc_error"] == pytest.approx((nearest != target).double().mean().item())


def test_nc5_compares_the_class_means_with_the_mean_of_other_data():
    model, other = Net(), torch.randn(30, 8) + 1
    data = DataLoader(TensorDataset(other), 7)
    values = quiet(model, batches(), metrics="nc5", ood_dataloader=data, layers=["net.1"])
    with torch.no_grad():
        features, ood = model.net(ROWS).double(), model.net(other).double().mean(dim=0)
    means = torch.stack([features[k == TARGET].mean(dim=0) for k in range(CLASSES)])
    expected = torch.cosine_similarity(means, ood.expand_as(means)).abs().mean()
    assert values["nc5"] == pytest.approx(expected.item(), rel=1e-6)
    assert functional.nc5(features, TARGET, model.net(other).detach()).item() == pytest.approx(values["nc5"], rel=1e-6)
    assert {*values} == {"nc5", "net.1/nc5"}
    assert "nc5" in quiet(model, batches(), metrics="all", ood_dataloader=data)
    with pytest.raises(ValueError, match="pass ood_dataloader="):
        quiet(model, batches(), metrics="nc5")
    with pytest.raises(LookupError, match="ood_dataloader gave no batch"):
        quiet(model, batches(), ood_dataloader=[])


@pytest.mark.parametrize("budget", [2**30, 0])
def test_the_baseline_is_that_of_permuted_labels_and_of_random_directions(budget):
    model = Net()
    found = quiet(model, batches(), metrics=("nc1", "nc2_etf", "nc3"), baseline=True, feature_budget=budget)
    permuted = found.baseline["permuted"]
    with torch.no_grad():
        features = model.net(ROWS)
    draws = [functional.nc1(features, TARGET[torch.randperm(len(TARGET))]).item() for _ in range(200)]
    assert min(draws) < permuted["nc1"] < max(draws)  # and far from the value of the labels themselves
    assert permuted["nc1"] > 3 * found["nc1"]
    assert {*permuted} == {"nc1", "nc2_etf", "nc3"}
    assert {*found.baseline["random"]} == {"nc2_etf", "nc3"}
    assert permuted == pytest.approx(
        quiet(model, batches(), metrics=("nc1", "nc2_etf", "nc3"), baseline=True).baseline["permuted"], rel=1e-9
    )


@pytest.mark.parametrize("ignored", [-100, CLASSES])
@pytest.mark.parametrize("budget", [2**30, 0])
def test_ignored_samples_take_no_part_in_the_baseline_and_the_intervals(ignored, budget):
    model, settings = Net(), {"metrics": ("nc1", "nc1_cdnv"), "baseline": True, "intervals": 0.9, "layers": ["net.0"]}
    model.head = nn.Linear(FEATURES, CLASSES + 1)  # so that an ignored label may be one of a class
    rows, target = ROWS[::2], TARGET[::2]
    mixed, labels = torch.full_like(ROWS, torch.nan), torch.full_like(TARGET, ignored)
    mixed[::2], labels[::2] = rows, target
    found = quiet(model, batches(mixed, labels), ignore_index=ignored, feature_budget=budget, **settings)
    alone = quiet(model, batches(rows, target), **settings)
    assert found == pytest.approx(alone, rel=1e-5)
    assert found.baseline["permuted"] == pytest.approx(alone.baseline["permuted"], rel=1e-5)
    assert {key: pytest.approx(ends, rel=1e-3) for key, ends in alone.intervals.items()} == found.intervals


@pytest.mark.parametrize("settings", [{"metrics": "nc4"}, {"metrics": "nc3", "baseline": True}])
@pytest.mark.parametrize("budget", [2**30, 0])
def test_metrics_of_the_classifier_alone_need_nothing_of_the_layers(settings, budget):
    model = Net()
    found = quiet(model, batches(), layers=["net.*"], feature_budget=budget, **settings)
    assert found == quiet(model, batches(), **settings)


def test_intervals_hold_the_value_and_are_wider_for_a_higher_level():
    model = Net()
    narrow, wide = (quiet(model, batches(), metrics=("nc1", "nc1_trace"), intervals=level) for level in (0.5, 0.99))
    for name in ("nc1", "nc1_trace"):
        low, high = narrow.intervals[name]
        assert wide.intervals[name][0] < low < high < wide.intervals[name][1]
        assert wide.intervals[name][0] < narrow[name] < wide.intervals[name][1]
    assert quiet(model, batches()).intervals is None
    with pytest.raises(ValueError, match="a level between 0 and 1"):
        quiet(model, batches(), intervals=95)


def test_the_table_of_classes_is_one_that_pandas_takes():
    import pandas

    model = Net()
    found = quiet(model, batches())
    table = pandas.DataFrame(found.per_class)
    assert table["class"].tolist() == [0, 1, 2, 3]
    assert table["samples"].tolist() == [25] * 4
    with torch.no_grad():
        features = model.net(ROWS).double()
    means = torch.stack([features[k == TARGET].mean(dim=0) for k in range(CLASSES)])
    centered = means - means.mean(dim=0)
    torch.testing.assert_close(torch.tensor(table["mean_norm"]), centered.norm(dim=1), rtol=1e-6, atol=0)
    cosine = torch.cosine_similarity(centered, model.head.weight.detach().double())
    torch.testing.assert_close(torch.tensor(table["weight_cosine"]), cosine, rtol=1e-5, atol=0)


def fit(callback, **kwargs):
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **kwargs
    )  # fmt: skip
    model = Net()
    trainer.fit(model, batches(), batches(*OTHERS))
    return trainer, model


def test_the_callback_measures_validation_and_test_data_around_the_class_means_of_training(tmp_path):
    names = (*SAMPLES, "nc1", "nc1_cdnv")
    callback = NeuralCollapseCallback(["net.1"], metrics=names, stages=("train", "validate", "test"), strict=True)
    trainer, model = fit(callback, default_root_dir=tmp_path)
    trainer.test(model, batches(*OTHERS), verbose=False)
    around, own, train = (
        truth(model, *OTHERS, centers=(ROWS, TARGET)),
        truth(model, *OTHERS),
        truth(model, ROWS, TARGET),
    )
    for prefix, stage in (("nc/val/", "validate"), ("nc/test/", "test")):
        row = next(row for row in reversed(callback.history) if row["stage"] == stage)
        for name in SAMPLES:
            assert row[prefix + name] == pytest.approx(around[name], rel=1e-6), name
        for name in ("nc1", "nc1_cdnv"):
            assert row[prefix + name] == pytest.approx(own[name], rel=1e-5)
            assert row[f"{prefix}{name}_train_means"] == pytest.approx(around[name], rel=1e-5)
        assert f"{prefix}net.1/nc1_train_means" in row
    row = next(row for row in reversed(callback.history) if row["stage"] == "train")
    for name in names:
        assert row[f"nc/{name}"] == pytest.approx(train[name], rel=1e-5), name
    assert not any(key.endswith("_train_means") for key in row)


def test_held_out_samples_are_compared_with_their_own_means_if_training_is_not_measured_and_it_is_said(tmp_path):
    callback = NeuralCollapseCallback(metrics=SAMPLES, stages=("validate",))
    with pytest.warns(UserWarning, match="around the class means of these samples, not around those of the training"):
        _, model = fit(callback, default_root_dir=tmp_path)
    for name in SAMPLES:
        assert callback.history[-1][f"nc/val/{name}"] == pytest.approx(truth(model, *OTHERS)[name], rel=1e-6)


def test_validation_within_an_epoch_leaves_out_what_needs_the_training_means_of_these_weights(tmp_path):
    callback = NeuralCollapseCallback(metrics=("nc1", "ncc_error"), stages=("train", "validate"), strict=True)
    with pytest.warns(UserWarning, match="ncc_error of the stage 'validate' left out, because the training data"):
        fit(callback, default_root_dir=tmp_path, val_check_interval=0.5)
    rows = [row for row in callback.history if row["stage"] == "validate"]
    compared = ["nc/val/ncc_error" in row for row in rows]
    assert compared == ["nc/val/nc1_train_means" in row for row in rows]
    assert set(compared) == {False, True}  # in the middle of an epoch and at its end
    assert all("nc/val/nc1" in row for row in rows)


def test_a_running_loop_whose_features_exceed_the_budget_leaves_out_what_needs_them(tmp_path):
    callback = NeuralCollapseCallback(metrics=("nc1", "ncc_error"), mode="online", feature_budget=100)
    with pytest.warns(UserWarning, match="ncc_error left out: the features do not fit into feature_budget=100"):
        fit(callback, default_root_dir=tmp_path)
    assert "nc/nc1" in callback.history[-1]
    assert "nc/ncc_error" not in callback.history[-1]


def test_the_exact_pass_the_running_loops_and_measure_give_the_same_values_of_all_metrics(tmp_path):
    class Frozen(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = Frozen().double()
    data = batches(ROWS.double())
    expected = quiet(model, data, metrics="all", layers=["net.1"])
    assert {key for key in expected if "/" not in key} >= {
        name for name, spec in METRICS.items() if not spec.opt_in
    } - {"effective_depth"}
    for arguments in ({}, {"mode": "online"}, {"stages": ("validate",)}):
        callback = NeuralCollapseCallback(["net.1"], metrics="all", strict=True, **arguments)
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, data)
        row, prefix = callback.history[-1], "nc/val/" if arguments.get("stages") else "nc/"
        found = {key: row[prefix + key] for key in expected}
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True), arguments


def test_a_metric_of_its_own_centers_and_one_of_given_centers():
    rows, target = clusters(3, 30, 5, 1.5)
    other, labels = clusters(3, 20, 5, 1.5, seed=1)
    train = NeuralCollapse(3, 5)
    train.update(rows, target)
    metric = NeuralCollapse(3, 5, metrics=("ncc_error", "nc1_trace"), centers=train.means)
    for part, own in zip(other.split(7), labels.split(7), strict=True):
        metric.update(part, own)
    values = metric.compute()
    nearest = torch.cdist(other.double(), train.means).argmin(dim=1)
    assert values["ncc_error"].item() == (nearest != labels).double().mean().item()
    between = (train.means - train.means.mean(dim=0)).square().sum() / 3
    within = (other.double() - train.means[labels]).square().sum() / len(other)
    assert values["nc1_trace_train_means"].item() == pytest.approx((within / between).item(), rel=1e-12)
    own = functional.nc1_trace(other.double(), labels)
    assert values["nc1_trace"].item() == pytest.approx(own.item(), rel=1e-9)
    assert not math.isnan(own)
    with pytest.raises(ValueError, match=r"centers must have shape \(3, 5\)"):
        NeuralCollapse(3, 5, centers=torch.ones(3, 4))
    assert reference.nc1(rows.numpy(), target.numpy()) > 0


@pytest.mark.parametrize("metrics", ["nc4", ["nc3", "nc4"], "nc3"])
@pytest.mark.parametrize("baseline", [False, True])
def test_a_layer_for_which_none_of_the_metrics_exists_is_no_obstacle(metrics, baseline):
    found = quiet(Net(), batches(), metrics=metrics, layers=["net.0"], baseline=baseline)
    assert {*found} == ({metrics} if isinstance(metrics, str) else {*metrics})


def test_data_of_no_class_are_for_training_data_alone(tmp_path):
    ood = DataLoader(TensorDataset(torch.randn(9, 8)), 4)
    callback = NeuralCollapseCallback(stages=("train", "validate"), ood_dataloader=ood, strict=True)
    fit(callback, default_root_dir=tmp_path)
    assert all(("nc/nc5" in row) == (row["stage"] == "train") for row in callback.history)
    assert not any("nc/val/nc5" in row for row in callback.history)
    with pytest.raises(Exception, match="so ood_dataloader= has no effect"):
        NeuralCollapseCallback(mode="online", ood_dataloader=ood)


def test_a_metric_of_ones_own_is_measured_drawn_and_named_where_it_fails(monkeypatch):
    monkeypatch.setitem(METRICS, "mine", functional.MetricSpec(lambda s: s.moments.spread.max(), "my spread"))
    assert quiet(Net(), batches(), metrics="mine")["mine"] > 0
    for formula, message in (
        (lambda s: 1.0, "must return a tensor"),
        (lambda s: s.no_such_part, "formula of 'mine' failed"),
    ):
        monkeypatch.setitem(METRICS, "mine", functional.MetricSpec(formula))
        with pytest.raises((RuntimeError, TypeError), match=message):
            quiet(Net(), batches(), metrics="mine")


def test_a_table_of_all_pairs_of_very_many_classes_is_not_kept():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 12_000))
    data = [(torch.randn(50, 4), torch.arange(50) % 2)]
    with pytest.warns(
        UserWarning, match="nc1_cdnv_directional left out: the pairs of 12000 classes would take 1.1 GiB"
    ):
        assert {*quiet(model, data, metrics=("ncc_error", "nc1_cdnv_directional"))} == {"ncc_error"}
