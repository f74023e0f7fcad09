"""The command ``lightning-nc measure``: checkpoints of every kind, in the order of the training."""

import argparse
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROWS, TARGET, Classifier, fit, is_picture
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import History, NeuralCollapseCallback, measure
from lightning_nc.__main__ import main
from lightning_nc.runs import metrics_of

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from resnet18 import ResNet18
from resnet18_data import Images

DATA = ["--data", "conftest:loader"]
LIGHTNING = ["--model", "conftest:Classifier", *DATA]
NET = ["--model", "test_checkpoints:net", *DATA]


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def run(tmp_path, *arguments, status=0, out="nc.csv"):
    """The rows that the command writes."""
    file = tmp_path / out
    assert main(["measure", *map(str, arguments), "-o", str(file)]) == status
    return History(file)


def trained(tmp_path, epochs=3, callbacks=(), model=None, **options):
    """The callback after a training that saved a checkpoint after every epoch, in the folder ``checkpoints``."""
    callback = NeuralCollapseCallback()
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, every_n_epochs=1, **options)
    fit(tmp_path, [callback, saving, *callbacks], max_epochs=epochs, model=model)
    return callback


def places(rows):
    return [(row["epoch"], row.get("step")) for row in rows]


@pytest.fixture
def refused(capsys):
    """Runs the command; asserts status 1 and a single line of error, which is returned."""

    def call(*arguments):
        assert main(["measure", *map(str, arguments)]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-nc: ")]
        return lines[0]

    return call


def test_eight_checkpoints_of_the_demo_equal_the_callback_to_the_last_digit_with_a_damaged_one_among_them(
    tmp_path, capsys
):
    layers = ["network.layer1", "network.layer4"]
    callback = NeuralCollapseCallback(layers=layers)
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, every_n_epochs=1)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=9, callbacks=[callback, saving], default_root_dir=tmp_path, **options)
    trainer.fit(ResNet18(width=4), datamodule=Images(batch_size=64, samples_per_class=30))
    (damaged,) = (tmp_path / "checkpoints").glob("epoch=4-*.ckpt")
    damaged.write_bytes(damaged.read_bytes()[:5000])

    call = [tmp_path / "checkpoints", "--model", "resnet18:ResNet18", "--data", "resnet18_data:Images"]
    rows = run(tmp_path, *call, "--layers", *layers, "--plot", tmp_path / "nc.png", status=1)
    expected = [row for row in callback.history if row["epoch"] != 4]
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir()) if path != damaged]
    assert len(expected) == 8
    assert [Path(row.pop("checkpoint")).name for row in rows] == names
    assert list(rows) == expected
    assert is_picture(tmp_path / "nc.png")
    said = capsys.readouterr()
    assert f"lightning-nc: {damaged}: " in said.err
    assert "1 of 9 checkpoints not measured" in said.err
    assert f"{expected[-1]['nc/nc1']:.3e}" in said.out
