"""Features too wide for a d x d scatter: a second pass, in the span of the class means."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import clusters
from lightning.pytorch import Trainer
from test_callback import Classifier
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_nc import NeuralCollapseCallback, measure
from lightning_nc.functional import nc1
from lightning_nc.measuring import evaluation


@pytest.fixture
def _no_scatter(monkeypatch):
    monkeypatch.setattr(evaluation, "SCATTER_LIMIT", 0)


@pytest.mark.usefixtures("_no_scatter")
@pytest.mark.parametrize(("classes", "width"), [(4, 12), (9, 6)])
@pytest.mark.parametrize("noise", [0.3, 1e-4])
def test_a_second_pass_gives_the_nc1_of_all_features(classes, width, noise, caplog):
    rows, target = clusters(classes, 20, width, noise)
    model = nn.Sequential(nn.Unflatten(1, (2, -1)), nn.Flatten(), nn.Linear(width, classes))
    with caplog.at_level("INFO"):
        values = measure(model, DataLoader(TensorDataset(rows, target), 7), layers=["0"], pool="flatten")
    expected = nc1(rows, target).item()
    assert expected < (1 if noise == 0.3 else 1e-7)
    assert values["nc1"] == values["0/nc1"] == pytest.approx(expected, rel=1e-6)
    said = [record.message for record in caplog.records if "second pass" in record.message]
    if classes < width:
        assert len(said) == 1
        assert f"the features of classifier input {width}, 0 {width} would need" in said[0]
    else:  # a projection on the span of the class means would gain nothing
        assert not said


@pytest.mark.usefixtures("_no_scatter")
def test_a_generator_which_has_only_one_pass_is_refused():
    rows, target = clusters(3, 10, 6, 0.3)
    batches = zip(rows.split(5), target.split(5), strict=True)
    with pytest.raises(LookupError, match="a generator gives its batches only once"):
        measure(nn.Linear(6, 3), batches, progress=False)
    values = measure(nn.Linear(6, 3), [(rows, target)], metrics=("nc2_etf", "nc3"), progress=False)
    assert set(values) == {"nc2_etf", "nc3"}


@pytest.mark.usefixtures("_no_scatter")
def test_an_iterable_dataset_is_iterated_twice(tmp_path):
    rows, target = clusters(3, 15, 6, 0.5)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from TensorDataset(rows, target)

    callback = NeuralCollapseCallback(strict=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet)
    model = Classifier()
    trainer.fit(model, DataLoader(Stream(), 8))
    with torch.no_grad():
        features = model.eval().net[:4](rows)
    assert callback.history[-1]["nc/nc1"] == pytest.approx(nc1(features, target).item(), rel=1e-6)


REAL = """
import resource, torch
from torch import nn
from lightning_nc import measure
from lightning_nc.functional import nc1
from lightning_nc.measuring import evaluation
torch.manual_seed(0)
target = torch.arange(10).repeat(20)
images = torch.randn(10, 4, 64, 64)[target] + 1e-3 * torch.randn(200, 4, 64, 64)
model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(16384, 10))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
measure(model, [(images[:20], target[:20])], metrics=("nc2_etf",), progress=False)
before = peak()
values = measure(model, list(zip(images.split(20), target.split(20))), layers=["0"], pool="flatten", progress=False)
print(peak() - before, values["0/nc1"], nc1(images.relu().flatten(1), target).item())
"""


def test_features_of_16384_dimensions_take_little_memory():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", REAL], env=environment, check=True, capture_output=True, text=True)
    gigabytes, value, expected = map(float, run.stdout.split())
    assert gigabytes < 0.3  # the scatter alone would take 3.2
    assert value == pytest.approx(expected, rel=1e-6)
