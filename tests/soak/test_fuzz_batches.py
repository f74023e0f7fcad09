"""Whatever a dataloader gives: a right number, or an error of the package itself. A training goes on as without the callback."""

import math
import warnings
from functools import cache

import torch
from conftest import fit, hooks_of
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn

from lightning_nc import NeuralCollapse, NeuralCollapseCallback, measure
from soak import strange

RELATIVE = {"float16": 2e-2}  # eps of float16 is 1e-3, and differences of features of size 1 to 4 are squared
METRICS = ("nc1", "nc4", "ncc_error")


def is_true(value, truth, case):
    """Whether a value is the truth, at the precision of float32 features or that of the input."""
    if math.isnan(truth):
        return math.isnan(value)
    return math.isclose(value, truth, rel_tol=RELATIVE.get(case[1], 1e-5))


def test_measure_gives_a_right_number_or_an_error_of_its_own_and_leaves_the_model_as_it_was(budget):
    def check(case):
        budget.tally.add("fuzzed batches", case)
        model, batches = strange.net(), strange.batches_of(case)
        before = [parameter.clone() for parameter in model.parameters()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = measure(model, batches, metrics=METRICS, progress=False)["nc1"]
        except Exception as error:
            known = strange.is_own(error) or strange.is_of_model(error)
            assert known, case
        else:
            truth = strange.true_nc1(model[:2], strange.batches_of(case))
            assert truth is not None
            assert is_true(value, truth, case), (value, truth)
        assert hooks_of(model) == []
        assert all(module.training for module in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    budget.check(check, strange.cases())


class Trained(LightningModule):
    """Trained on its own data, whatever the dataloader gives."""

    def __init__(self):
        super().__init__()
        self.net = strange.net()
        self.draws = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.draws.append(torch.rand(()).item())
        return nn.functional.cross_entropy(self.net(strange.X), strange.Y)

    def validation_step(self, batch, batch_idx):
        self.net(strange.X)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loader:
    """Gives the batches of a case, which a step cannot use up."""

    def __init__(self, case):
        self.case = case

    def __iter__(self):
        return iter(strange.batches_of(self.case))


@cache
def plain(folder, which):
    """Weights and draws of a training without the callback; Lightning skips the batches ``which``, which are None."""
    return trained(folder, [], (which, "", "", "None"))


def trained(folder, callbacks, case):
    torch.manual_seed(3)
    model = Trained()
    fit(folder, callbacks, data=Loader(case), model=model, val=Loader(case), max_epochs=2, num_sanity_val_steps=0)
    assert hooks_of(model) == []
    assert all(module.training for module in model.modules())
    return [*model.state_dict().values(), torch.tensor(model.draws)]


MODES = [{}, {"mode": "online"}, {"stages": ("train", "validate")}]


def test_no_batch_ends_or_changes_a_training_and_a_row_is_right_or_missing_with_one_warning(budget, tmp_path):
    def check(drawn):
        case, options = drawn
        budget.tally.add("fuzzed batches", drawn)
        callback = NeuralCollapseCallback(metrics=METRICS, **options)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = trained(tmp_path, [callback], case)
        same = plain(tmp_path, case[0] if case[3] == "None" else ())
        assert all(torch.equal(a, b) for a, b in zip(same, found, strict=True)), case
        failed = [str(w.message) for w in said if "neural collapse cannot be measured" in str(w.message)]
        assert len(failed) <= 1
        if not callback.history:
            assert failed or options.get("mode") == "online" or "validate" in options.get("stages", ()), case
        for row in callback.history:
            assert math.isnan(row.get("nc/nc1", math.nan)) or options.get("mode") == "online" or not failed
        if options == {} and callback.history:
            model = Trained()
            model.load_state_dict(dict(zip(model.state_dict(), found, strict=False)))
            truth = strange.true_nc1(model.net[:2], strange.batches_of(case))
            assert is_true(callback.history[-1]["nc/nc1"], truth, case)

    budget.check(check, st.tuples(strange.cases(), st.sampled_from(MODES)))


def test_a_metric_gives_a_right_number_or_an_error_of_its_own(budget):
    def check(case):
        budget.tally.add("fuzzed batches", ("metric", case))
        metric = NeuralCollapse(3, 6, metrics=METRICS[:1])
        batches = strange.batches_of(case)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for x, y in batches:
                    metric.update(x, y)
                value = float(metric.compute()["nc1"])
        except ValueError as error:
            own = strange.is_own(error)
            assert own, case
        else:
            truth = strange.true_nc1(lambda x: x, strange.batches_of(case))
            assert is_true(value, truth, case), (value, truth)

    budget.check(check, strange.cases().filter(lambda case: not case[3]))
