import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import resnet18


def test_the_demo_trains_on_real_digits_and_writes_its_table_csv_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model.width", "4", "--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false"]
    resnet18.main(["fit", *options, "--trainer.accelerator", "cpu"])
    text = capsys.readouterr().out
    (path,) = tmp_path.glob("results/resnet18/*/metrics.csv")
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert float(rows[-1]["nc/nc1"]) < float(rows[0]["nc/nc1"])
    assert f"{float(rows[-1]['nc/nc1']):.3e}" in text
    assert str(path.relative_to(tmp_path)) in text
    assert (path.parent / "neural_collapse.png").stat().st_size > 10_000


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_size_of_images_width_loss_and_bias_are_options(tmp_path, monkeypatch, loss):
    monkeypatch.chdir(tmp_path)
    resnet18.main(
        f"fit --model.width 4 --model.loss {loss} --model.bias false --data.image_size 16 --data.batch_size 512 "
        "--trainer.max_epochs 1 --trainer.enable_progress_bar false --trainer.accelerator cpu".split()
    )


def test_width_64_is_the_standard_network():
    network = resnet18.ResNet18(width=64).network
    assert sum(p.numel() for p in network.parameters()) == 11_172_810  # of ResNet18 for CIFAR, less two input channels
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_the_digits_are_real_and_normalised():
    images = resnet18.Images(image_size=8)
    images.setup("fit")
    rows, target = images.train.tensors
    assert rows.shape == (1797, 1, 8, 8)
    assert rows.mean().abs() < 1e-5
    assert rows.std().item() == pytest.approx(1, rel=1e-5)
    assert target.bincount().min() > 170
