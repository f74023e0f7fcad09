import csv
import os
import struct
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy
import pytest
import torch
import torchvision
from lightning.pytorch import Trainer
from PIL import Image
from torch.nn.functional import interpolate

from lightning_nc import measure

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import resnet18
import resnet18_data

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
QUIET = (
    "--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.accelerator cpu --model.width 4"
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command):
    resnet18.main(f"{command} {QUIET}".split())


def rows(version=0):
    with open(f"results/resnet18/version_{version}/metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row["nc/nc1"]]


def write_idx(path, array):
    """The format of MNIST's files."""
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def mnist(directory):
    """Real digits in MNIST's layout: 20 of each class to train on, 10 of each to test."""
    images, target = (torch.cat(parts) for parts in zip(*resnet18_data.digits().values(), strict=True))
    images = interpolate(images * 255 / 16, size=(28, 28), mode="bilinear").round().byte().squeeze(1).numpy()
    order = numpy.argsort(target.numpy(), kind="stable").reshape(-1)
    places = [order[target.numpy()[order] == label] for label in range(10)]
    raw = directory / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, chosen in {"train": slice(0, 20), "t10k": slice(20, 30)}.items():
        part = numpy.concatenate([place[chosen] for place in places])
        write_idx(raw / f"{name}-images-idx3-ubyte", images[part])
        write_idx(raw / f"{name}-labels-idx1-ubyte", target.numpy()[part].astype(numpy.uint8))
    return directory


def test_the_demo_trains_on_real_digits_and_writes_its_table_csv_and_figure(directory, capsys):
    run(f"fit --config {CONFIGS / 'digits.yaml'} --trainer.max_epochs 3")
    text = capsys.readouterr().out
    measured = rows()
    assert [row["epoch"] for row in measured] == ["0", "1", "2"]
    assert float(measured[-1]["nc/nc1"]) < float(measured[0]["nc/nc1"])
    checkpoint = torch.load("results/resnet18/version_0/checkpoints/last.ckpt")
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0  # half a cosine has ended
    for key in ("nc/nc1", *(f"nc/network.layer{depth}/nc1" for depth in (1, 2, 3, 4))):
        assert f"{float(measured[-1][key]):.3e}" in text
    assert "results/resnet18/version_0/metrics.csv" in text
    assert (directory / "results/resnet18/version_0/neural_collapse.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("loss", "bias"),
    [
        ("cross_entropy", "true"),
        ("mse", "false"),
        pytest.param("cross_entropy", "false", marks=pytest.mark.slow),
        pytest.param("mse", "true", marks=pytest.mark.slow),
    ],
)
def test_both_losses_with_and_without_a_bias_train_on_files_of_mnist(mnist, loss, bias):
    run(
        f"fit --data.dataset mnist --data.root {mnist} --data.batch_size 25 --model.loss {loss} --model.bias {bias} "
        "--trainer.max_epochs 2"
    )
    values = {key: float(value) for key, value in rows()[-1].items() if key.startswith("nc/")}
    assert len(values) == 6 + 4 * 4
    assert all(0 < value < float("inf") for value in values.values())
    checkpoint = torch.load("results/resnet18/version_0/checkpoints/last.ckpt")
    assert ("network.fc.bias" in checkpoint["state_dict"]) == (bias == "true")


def test_a_head_that_is_fixed_to_a_simplex_etf_stays_as_it_is(mnist):
    run(f"fit --data.dataset mnist --data.root {mnist} --data.batch_size 25 --model.head etf --trainer.max_epochs 1")
    assert 0 < float(rows()[-1]["nc/nc3_centered"]) < 2
    weight = torch.load("results/resnet18/version_0/checkpoints/last.ckpt")["state_dict"]["network.fc.weight"]
    torch.testing.assert_close(weight @ weight.T, (torch.eye(10) - 0.1) / 0.9)


def test_validate_and_test_measure_the_test_images_of_the_last_checkpoint(mnist, capsys):
    run(f"fit --data.dataset mnist --data.root {mnist} --trainer.max_epochs 1")
    model = resnet18.ResNet18.load_from_checkpoint("results/resnet18/version_0/checkpoints/last.ckpt", width=4)
    data = resnet18_data.Images("mnist", str(mnist))
    data.setup("test")
    expected = measure(model, data.test_dataloader(), progress=False)
    for command, prefix in {"validate": "nc/val", "test": "nc/test"}.items():
        capsys.readouterr()
        run(f"{command} --config results/resnet18/version_0/config.yaml --ckpt_path last")
        text = capsys.readouterr().out
        line = next(line for line in text.splitlines() if f"{prefix}/nc1 " in line)
        assert float(line.split("│")[2]) == pytest.approx(expected["nc1"], rel=1e-5)


def test_a_resumed_run_keeps_the_epochs_before_it_and_the_schedule(directory):
    recipe = "fit --data.samples_per_class 10 --data.batch_size 50 --model.lr_milestones [1]"
    run(f"{recipe} --trainer.max_epochs 2")
    run(f"{recipe} --trainer.max_epochs 4 --ckpt_path last")
    whole = torch.load("results/resnet18/version_1/checkpoints/last.ckpt")
    assert list(whole["curves"]["loss"]) == [0, 1, 2, 3]
    (history,) = (state["history"] for name, state in whole["callbacks"].items() if "NeuralCollapse" in name)
    assert [row["epoch"] for row in history] == [0, 1, 2, 3]
    assert whole["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.005)


def test_last_without_a_run_raises():
    with pytest.raises(FileNotFoundError, match="no run in results/resnet18 has a checkpoint"):
        run("fit --ckpt_path last")


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(mnist):
    script = Path(resnet18.__file__)
    command = (
        f"fit --data.dataset mnist --data.root {mnist} --data.batch_size 32 --trainer.max_epochs 1 --trainer.devices 2 "
        f"--trainer.strategy ddp {QUIET}"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, *command.split()], env=environment, check=True, capture_output=True)
    model = resnet18.ResNet18.load_from_checkpoint("results/resnet18/version_0/checkpoints/last.ckpt", width=4)
    data = resnet18_data.Images("mnist", str(mnist))
    data.setup("fit")
    loader = torch.utils.data.DataLoader(data.train, 50, collate_fn=resnet18_data.keep_batch)
    one = measure(model, loader, layers=[f"network.layer{depth}" for depth in (1, 2, 3, 4)], progress=False)
    two = {key.removeprefix("nc/"): float(value) for key, value in rows()[-1].items() if key.startswith("nc/")}
    assert two == pytest.approx(one, rel=1e-5)


def test_an_npz_file_is_a_data_set(directory):
    parts = resnet18_data.digits()
    arrays = {}
    for part, (images, target) in parts.items():
        arrays[f"x_{part}"] = images.repeat(1, 3, 1, 1).permute(0, 2, 3, 1).byte().numpy()
        arrays[f"y_{part}"] = target.byte().numpy()
    numpy.savez("own.npz", **arrays)
    data = resnet18_data.Images("own.npz")
    data.setup("fit")
    assert (data.in_channels, data.num_classes) == (3, 10)
    images, target = data.train.tensors
    torch.testing.assert_close(images[:, 1], resnet18_digits()[0][:, 0])
    assert target.equal(parts["train"][1])
    run("fit --data.dataset own.npz --data.samples_per_class 5 --trainer.max_epochs 1")

    numpy.savez("wrong.npz", images=arrays["x_train"])
    with pytest.raises(ValueError, match=r"needs the arrays x_train and y_train.*it has images"):
        resnet18_data.Images("wrong.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": (20, 3, 16, 16)}, r"x_train must be \(N, H, W\) or \(N, H, W, C\).*transpose\(0, 2, 3, 1\)"),
        ({"x_train": (20, 784)}, "reshape flat images"),
        ({"y_train": numpy.eye(4)[numpy.arange(20) % 4]}, "if the labels are one-hot, take their argmax"),
        ({"y_train": numpy.arange(20) % 4 + 0.7}, "must be 20 integers"),
        ({"y_train": numpy.arange(19) % 4}, "must be 20 integers"),
        ({"y_train": numpy.arange(20) % 4 - 1}, "must hold labels from 0 to 2"),
        ({"x_test": (5, 8, 8), "y_test": numpy.arange(5)}, "y_test must hold labels from 0 to 3"),
    ],
)
def test_arrays_that_are_not_images_or_labels_get_a_clear_message(directory, arrays, message):
    arrays = {"x_train": (20, 8, 8), "y_train": numpy.arange(20) % 4} | arrays
    numpy.savez("own.npz", **{k: numpy.zeros(v, numpy.uint8) if isinstance(v, tuple) else v for k, v in arrays.items()})
    with pytest.raises(ValueError, match=message):
        resnet18_data.Images("own.npz")


def test_arrays_of_any_type_and_a_constant_channel_are_trained_on(directory):
    images = numpy.random.default_rng(0).random((40, 8, 8, 4))
    images[..., 3] = 1
    numpy.savez("own.npz", x_train=images, y_train=(numpy.arange(40) % 4)[:, None])
    run("fit --data.dataset own.npz --data.batch_size 10 --trainer.max_epochs 1")
    assert float(rows()[-1]["nc/nc1"]) > 0


def test_stages_other_metrics_and_other_loggers_end_with_a_table_and_a_figure(directory, capsys, caplog):
    few = "fit --data.samples_per_class 10 --data.batch_size 50 --trainer.max_epochs 2"
    run(f"{few} --neural_collapse.stages [train,validate]")
    text = capsys.readouterr().out
    assert "nc/val/network.layer1/nc1" in text
    assert "nc/nc3_centered" in text
    run(
        f"{few} --neural_collapse.metrics [nc1_trace,nc3_gram] --trainer.logger TensorBoardLogger "
        "--trainer.logger.save_dir results --trainer.logger.name tb"
    )
    text = capsys.readouterr().out
    assert "nc/nc1_trace" in text
    assert "metrics.csv" not in text
    with caplog.at_level("INFO"):
        run("test --config results/tb/version_0/config.yaml --ckpt_path last")
    assert "results/tb/version_0/checkpoints/last.ckpt" in caplog.text


def test_a_process_keeps_an_incomplete_batch_that_is_its_only_one(directory):
    class Two:
        world_size = 2

    data = resnet18_data.Images(samples_per_class=20)
    data.setup("fit")
    assert data.train_dataloader().drop_last
    data.trainer = Two()
    assert not data.train_dataloader().drop_last


def test_test_images_without_some_class_keep_the_labels_of_training(directory):
    for part, names in {"train": "abcd", "test": "bd"}.items():
        for name in names:
            place = directory / "own" / part / name
            place.mkdir(parents=True)
            Image.new("L", (8, 8)).save(place / "0.png")
    data = resnet18_data.Images("own", image_size=8)
    data.setup("fit")
    assert [label for _, label in data.train] == [0, 1, 2, 3]
    assert [label for _, label in data.test] == [1, 3]
    (directory / "own" / "test" / "b").rename(directory / "own" / "test" / "z")
    with pytest.raises(ValueError, match="has the classes z, which do not occur in the training images"):
        data.setup("fit")


def resnet18_digits():
    data = resnet18_data.Images()
    data.setup("fit")
    return data.train.tensors


@pytest.mark.parametrize("parts", [("train", "test"), ("",)])
def test_a_folder_of_images_is_a_data_set(directory, parts):
    for part in parts:
        images, target = resnet18_data.digits()[part or "train"]
        for index in range(120):
            place = directory / "own" / part / f"class{target[index] % 3}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((images[index, 0] * 15).byte().numpy()).save(place / f"{index}.png")
    own = "--data.dataset own --data.image_size 16 --data.num_workers 0"
    run(f"fit {own} --data.samples_per_class 16 --data.batch_size 16 --trainer.max_epochs 1")
    assert float(rows()[-1]["nc/nc1"]) > 0
    data = resnet18_data.Images("own", image_size=16)
    data.setup("fit")
    assert (data.in_channels, data.num_classes, data.train[0][0].shape) == (3, 3, (3, 16, 16))
    if parts == ("",):
        with pytest.raises(ValueError, match="own has no test images"):
            data.test_dataloader()


def test_color_images_of_torchvision_are_normalized_per_channel(monkeypatch):
    class CIFAR10:
        def __init__(self, root, train):
            self.data = numpy.random.default_rng(0).integers(0, 200, (50, 32, 32, 3), dtype=numpy.uint8)
            self.targets = [index % 10 for index in range(50)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    data = resnet18_data.Images("cifar10", samples_per_class=3)
    data.setup("fit")
    images, target = data.train.tensors
    assert target.bincount().tolist() == [3] * 10
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(dim=(0, 2, 3)), torch.ones(3))
    assert len(data.test) == 50


def test_without_a_network_the_message_says_what_to_put_where(directory, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", offline)
    with pytest.raises(RuntimeError, match=f"no network.*get cifar-100-python.tar.gz .* into {directory}"):
        resnet18_data.Images("cifar100", str(directory)).prepare_data()


def test_an_unknown_data_set_raises_with_the_known_names():
    with pytest.raises(ValueError, match=r"digits, mnist, fashion_mnist, cifar10, cifar100, .* 'minst'"):
        resnet18_data.Images("minst")


@pytest.mark.parametrize("name", ["figure5-top", "figure5-bottom", "figure10"])
def test_the_figures_of_the_paper_have_configurations_that_others_extend(name, capsys):
    command = f"fit --config {CONFIGS / name}.yaml --config {CONFIGS / 'gpu.yaml'} --config {CONFIGS / 'fsdp.yaml'}"
    with pytest.raises(SystemExit, match="0"):
        resnet18.main([*command.split(), "--print_config"])
    text = capsys.readouterr().out
    for line in ("lr: 0.05", "weight_decay: 0.0005", f"loss: {'cross_entropy' if 'bottom' in name else 'mse'}"):
        assert line in text
    assert "FSDPStrategy" in text
    assert "bf16-mixed" in text


def test_the_configuration_without_a_gpu_measures_log_spaced_epochs_and_does_not_validate():
    run(
        f"fit --config {CONFIGS / 'figure10.yaml'} --config {CONFIGS / 'cpu.yaml'} --data.dataset digits "
        "--data.samples_per_class 7 --trainer.max_epochs 6"
    )
    measured = rows()
    assert [row["epoch"] for row in measured] == ["0", "1", "2", "3", "5"]
    assert "val_loss" not in measured[-1]


def test_the_paper_is_the_default(capsys):
    model = resnet18.ResNet18()
    assert (
        sum(p.numel() for p in model.network.parameters()) == 11_172_810
    )  # ResNet18 for CIFAR, less two input channels
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    optimizer, scheduler = model.configure_optimizers().values()
    rates = []
    for _ in range(121):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [rates[epoch] for epoch in (39, 40, 80, 120)] == pytest.approx([0.05, 0.005, 0.0005, 0.00005])
    assert optimizer.param_groups[0]["weight_decay"] == 5e-4


def test_without_milestones_the_learning_rate_follows_half_a_cosine_down_to_zero():
    model = resnet18.ResNet18(width=4, lr_milestones=(), momentum=0.5)
    model.trainer = Trainer(max_epochs=60, accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer, scheduler = model.configure_optimizers().values()
    rates = []
    for _ in range(61):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [rates[epoch] for epoch in (0, 20, 30, 40, 60)] == pytest.approx([0.05, 0.0375, 0.025, 0.0125, 0])
    assert optimizer.param_groups[0]["momentum"] == 0.5


def test_half_sum_is_the_loss_of_the_paper():
    model = resnet18.ResNet18(width=4, loss="half_sum").eval()
    images, target = torch.randn(6, 1, 8, 8), torch.tensor([0, 3, 3, 9, 1, 2])
    errors = model(images).double() - torch.eye(10, dtype=torch.float64)[target]
    loss = model.step((images, target), "train")
    assert loss.item() == pytest.approx(sum(0.5 * row @ row for row in errors).item() / 6)


def test_convolutions_start_from_kaiming_or_from_the_default_of_pytorch():
    spread = {
        kaiming: resnet18.ResNet18(width=32, kaiming=kaiming).network.layer3[0].conv1 for kaiming in (True, False)
    }
    assert spread[True].weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)  # fan-out: 128 channels
    assert spread[False].weight.abs().max().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)  # fan-in: 64 channels


def test_layout_and_half_precision_change_the_logits_by_rounding_only():
    torch.manual_seed(0)
    plain = resnet18.ResNet18(width=8).eval()
    torch.manual_seed(0)
    other = resnet18.ResNet18(width=8, channels_last=True).eval()
    images = torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(plain(images), other(images), rtol=1e-4, atol=1e-5)


def test_the_digits_are_real_and_normalized():
    images, target = resnet18_digits()
    assert images.shape == (1500, 1, 8, 8)
    assert images.mean().abs() < 1e-5
    assert images.std().item() == pytest.approx(1, rel=1e-5)
    assert target.bincount().min() > 140
