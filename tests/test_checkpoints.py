"""The command ``lightning-nc measure``: checkpoints of every kind, in the order of the training."""

import argparse
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROWS, TARGET, Classifier, fit, is_picture
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from versions import EMAWeightAveraging

from lightning_nc import History, NeuralCollapseCallback, measure
from lightning_nc.__main__ import main
from lightning_nc.functional import METRICS
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
    layers = ["network.layer4"]
    callback = NeuralCollapseCallback(layers=layers)
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, every_n_epochs=1)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=9, callbacks=[callback, saving], default_root_dir=tmp_path, **options)
    trainer.fit(ResNet18(width=2), datamodule=Images(batch_size=128, samples_per_class=30))
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
    assert f"lightning-nc: {damaged}: cannot be read, it may be damaged" in said.err
    assert "1 of 9 checkpoints not measured" in said.err
    assert f"{expected[-1]['nc/nc1']:.3e}" in said.out


def test_a_checkpoint_without_its_first_bytes_is_one_line_with_its_name(tmp_path, refused):
    torch.save({"state_dict": {"weight": torch.arange(300.0)}}, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[len(whole) // 2 :])
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged"):
        History.read(tmp_path / "a.ckpt")
    assert f"{tmp_path / 'a.ckpt'}: is damaged" in refused(tmp_path / "a.ckpt", *LIGHTNING)


# ------------------------------------------------------------------------------------------- what a checkpoint may be


def jittered(seed):
    """Weights for ``net``."""
    noise = torch.Generator().manual_seed(seed)
    return {name: weight + torch.rand(weight.shape, generator=noise) for name, weight in net().state_dict().items()}


def values_of(state, model=None):
    model = model or net()
    model.load_state_dict(state)
    return measure(model, DataLoader(TensorDataset(ROWS, TARGET), 8), progress=False)


def renamed(state, prefix):
    return {prefix + name: weight for name, weight in state.items()}


KINDS = {
    "state.pt": lambda state: state,
    "state_dict.pt": lambda state: {"state_dict": state, "optimizer": {"state": {0: torch.ones(2)}}},
    "model_state_dict.pth": lambda state: {"model_state_dict": state},
    "model.pth.tar": lambda state: {"model": state, "args": argparse.Namespace(data=Path("images"))},
    "module.pt": lambda state: renamed(state, "module."),
    "compiled.pt": lambda state: renamed(state, "_orig_mod."),
    "both.pt": lambda state: renamed(state, "module._orig_mod."),
    "average.pt": lambda state: {"n_averaged": torch.tensor(3), **renamed(state, "module.")},
    "wrapped.ckpt": lambda state: {"state_dict": renamed(state, "network.")},
}


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_found_under_usual_keys_and_without_the_prefixes_of_wrappers(tmp_path, name, capsys):
    state = jittered(2)
    torch.save(KINDS[name](state), tmp_path / name)
    (row,) = run(tmp_path, tmp_path / name, *NET)
    assert metrics_of(row) == {f"nc/{key}": value for key, value in values_of(state).items()}
    prefix = {"module.pt": "'module.'", "wrapped.ckpt": "'network.'", "both.pt": "'_orig_mod.' and 'module.'"}.get(name)
    assert prefix is None or f"removed {prefix} from the names of the weights" in capsys.readouterr().out


def test_safetensors_and_files_of_old_versions_of_torch_are_read(tmp_path):
    from safetensors.torch import save_file

    state = jittered(2)
    save_file(state, tmp_path / "a1.safetensors", {"epoch": "7"})
    torch.save({"model": state, "epoch": 8}, tmp_path / "a2.pt", _use_new_zipfile_serialization=False)
    rows = run(tmp_path, tmp_path, *NET)
    assert places(rows) == [(7, None), (8, None)]
    assert metrics_of(rows[0]) == metrics_of(rows[1]) == {f"nc/{key}": v for key, v in values_of(state).items()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.tail = nn.Linear(6, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.tail.weight = self.head.weight

    def forward(self, x):
        return self.tail(torch.relu(self.head(torch.relu(self.body(x)))))


def test_weights_with_several_names_need_one_of_them(tmp_path):
    model = Tied()
    state = model.state_dict()
    del state["tail.weight"]
    torch.save(state, tmp_path / "a.pt")
    (row,) = run(tmp_path, tmp_path / "a.pt", "--model", "test_checkpoints:Tied", *DATA)
    assert row["nc/nc1"] == measure(model, DataLoader(TensorDataset(ROWS, TARGET), 8), progress=False)["nc1"]


def test_models_of_torchvision_and_timm_get_the_number_of_classes_of_the_checkpoint(tmp_path):
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    made = {
        "torchvision:squeezenet1_1": torchvision.models.squeezenet1_1(num_classes=4),
        "timm:test_resnet": timm.create_model("test_resnet", num_classes=4),
    }
    for text, model in made.items():
        file = tmp_path / f"{text.replace(':', '-')}.pt"
        torch.save(renamed(model.state_dict(), "module."), file)
        call = [file, "--model", text, "--data", "test_checkpoints:images"]
        (row,) = run(tmp_path, *call, out=f"{file.stem}.csv")
        expected = measure(model, images(), progress=False)
        assert metrics_of(row) == {f"nc/{key}": value for key, value in expected.items()}


def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.arange(4).repeat(4)), 8)


# --------------------------------------------------------------------------------------------------------- Lightning


class Leaky(Classifier):
    """What the class is called with decides what it computes, and leaves no trace in the weights."""

    def __init__(self, slope, unused=0):
        super().__init__()
        self.save_hyperparameters()
        self.net[2] = nn.LeakyReLU(slope)


class Scaled(Classifier):
    """Changes its batches on the device, as augmentations on a GPU do."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        rows, target = batch
        return rows * torch.arange(1.0, 7.0), target


class Partial(Classifier):
    """Saves its last layer alone."""

    strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {name: weight for name, weight in super().state_dict(*args, **kwargs).items() if "net.4" in name}


def test_the_class_gets_the_hyperparameters_of_each_checkpoint(tmp_path, capsys):
    first = trained(tmp_path / "a", 1, model=Leaky(0.5)).history
    second = trained(tmp_path / "b", 2, model=Leaky(0.01)).history
    folders = [tmp_path / name / "checkpoints" for name in "ab"]
    rows = run(tmp_path, *folders, "--model", "test_checkpoints:Leaky", *DATA)
    assert [row["nc/nc1"] for row in rows] == [row["nc/nc1"] for row in (first[0], *second)]
    rows = run(
        tmp_path, folders[0], "--model", "test_checkpoints:Leaky", *DATA, "--model-args", "slope=0.01", out="b.csv"
    )
    assert rows[0]["nc/nc1"] != first[0]["nc/nc1"]
    said = capsys.readouterr().out.splitlines()
    lines = [f"test_checkpoints:Leaky with slope={slope}, unused=0" for slope in (0.5, 0.01)]
    assert [line for line in said if line in lines] == [*lines, lines[1]]


def test_hooks_of_batch_transfer_are_called_as_in_training(tmp_path):
    history = trained(tmp_path, 2, model=Scaled()).history
    rows = run(tmp_path, tmp_path / "checkpoints", "--model", "test_checkpoints:Scaled", *DATA)
    assert [metrics_of(row) for row in rows] == [metrics_of(row) for row in history]


def test_a_checkpoint_that_was_saved_after_the_training_is_of_its_last_epoch(tmp_path):
    callback = NeuralCollapseCallback()
    trainer, _ = fit(tmp_path, [callback], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (row,) = run(tmp_path, tmp_path / "end.ckpt", *LIGHTNING)
    del row["checkpoint"]
    assert row == callback.history[-1]


def test_a_checkpoint_in_the_middle_of_an_epoch_stands_before_that_of_its_end(tmp_path):
    saving = ModelCheckpoint(tmp_path / "a", save_top_k=-1, every_n_train_steps=4)
    fit(tmp_path, [saving], max_epochs=2)
    rows = run(tmp_path, tmp_path / "a", *LIGHTNING)
    assert places(rows) == [(0, 4), (1, 8), (1, 12)]


def test_the_last_checkpoint_is_left_out_if_it_is_a_copy(tmp_path, capsys):
    trained(tmp_path, 2, save_last=True)
    (tmp_path / "checkpoints" / "link.ckpt").symlink_to(tmp_path / "checkpoints" / "last.ckpt")
    rows = run(tmp_path, tmp_path / "checkpoints", *LIGHTNING)
    assert places(rows) == [(0, 6), (1, 12)]
    assert f"left out: {tmp_path / 'checkpoints' / 'last.ckpt'}, which has the weights of" in capsys.readouterr().out


def test_other_weights_of_the_same_epoch_and_step_are_measured_and_mentioned(tmp_path, capsys):
    for seed in (2, 3):
        torch.save({"model": jittered(seed), "epoch": 1, "step": 5}, tmp_path / f"{seed}.pt")
    assert places(run(tmp_path, tmp_path, *NET)) == [(1, 5), (1, 5)]
    assert "have the same epoch and step, but other weights: are they of one run?" in capsys.readouterr().out


def test_averaged_weights_are_measured_where_the_training_saves_them_and_marked(tmp_path, capsys):
    history = trained(tmp_path, 2, [EMAWeightAveraging(decay=0.5)]).history
    rows = run(tmp_path, tmp_path / "checkpoints", *LIGHTNING)
    assert history[-1]["weights"] == "swapped"  # those that the training has left
    assert metrics_of(rows[-1]) == metrics_of(history[-1])
    assert [row["weights"] for row in rows] == ["swapped", "swapped"]
    said = capsys.readouterr().out
    assert "WeightAveraging" in said
    assert "not measured: the weights that the checkpoints have under 'current_model_state'\n" in said


def test_a_module_that_saves_a_part_of_its_weights_has_the_others_as_it_was_built(tmp_path, monkeypatch):
    fit(tmp_path, [ModelCheckpoint(tmp_path / "a", save_top_k=-1, every_n_epochs=1)], model=Partial(), max_epochs=2)
    states = [torch.load(path)["state_dict"] for path in sorted((tmp_path / "a").iterdir())]
    assert [list(state) for state in states] == [["net.4.weight", "net.4.bias"]] * 2
    (tmp_path / "partial_module.py").write_text(
        "import torch\nfrom test_checkpoints import Partial\ndef build():\n    torch.manual_seed(3)\n    return Partial()\n"
    )
    monkeypatch.chdir(tmp_path)
    rows = run(tmp_path, tmp_path / "a", "--model", "partial_module:build", *DATA)
    for row, state in zip(rows, states, strict=True):
        torch.manual_seed(3)
        model = Partial()
        model.load_state_dict(state, strict=False)
        assert row["nc/nc3"] == measure(model, DataLoader(TensorDataset(ROWS, TARGET), 8), progress=False)["nc3"]


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The callback after a training with transformers that saved a checkpoint after every epoch, and the folder of these."""
    tiny = pytest.importorskip("tiny_transformers")
    from lightning_nc.huggingface import NeuralCollapseCallback as ForTransformers

    folder = tmp_path_factory.mktemp("tuned")
    callback = ForTransformers()
    trainer = tiny.train(
        folder,
        callback,
        model=tiny.bert(),
        data=tiny.passages(24),
        collator=tiny.padded,
        num_train_epochs=3,
        save_strategy="epoch",
    )
    return callback, folder, trainer.model


def texts():
    import tiny_transformers as tiny

    return DataLoader(tiny.passages(24), 8, collate_fn=tiny.padded)


TEXTS = ["--data", "test_checkpoints:texts"]


def test_folders_of_transformers_equal_its_callback_and_say_themselves_what_they_hold(tuned, tmp_path):
    callback, folder, _ = tuned
    rows = run(tmp_path, folder, *TEXTS)
    assert [Path(row.pop("checkpoint")).name for row in rows] == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    assert list(rows) == list(callback.history)


def test_a_model_of_a_folder_of_transformers_is_built_for_weights_of_other_kinds(tuned, tmp_path):
    callback, folder, model = tuned
    torch.save(renamed(model.state_dict(), "model."), tmp_path / "a.pt")
    (row,) = run(tmp_path, tmp_path / "a.pt", "--model", f"transformers:{folder / 'checkpoint-3'}", *TEXTS)
    assert metrics_of(row) == metrics_of(callback.history[-1])


def test_a_folder_of_transformers_in_parts_is_read_into_a_model_of_ones_own(tuned, tmp_path):
    callback, _, model = tuned
    model.save_pretrained(tmp_path / "parts", max_shard_size="5KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    (row,) = run(tmp_path, tmp_path / "parts", "--model", "tiny_transformers:bert", *TEXTS)
    assert metrics_of(row) == metrics_of(callback.history[-1])


def test_weights_that_are_missing_from_a_folder_of_transformers_are_named(tuned, refused, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tuned[1] / "checkpoint-9", tmp_path / "a")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "classifier.weight" in refused(folder, *TEXTS)


def test_the_code_that_a_config_of_transformers_names_is_not_run(tuned, refused, tmp_path):
    folder = shutil.copytree(tuned[1] / "checkpoint-9", tmp_path / "a")
    config = (folder / "config.json").read_text()
    kinds = '"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}'
    (folder / "config.json").write_text(config.replace('"model_type": "bert"', kinds))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    assert "custom code" in refused(folder, *TEXTS)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------- the order of the training


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["epoch9.pt", "epoch10.pt"], [9, 10]),
        (["net-v2-checkpoint-500.pt", "net-v2-checkpoint-1000.pt"], [500, 1000]),
        (["epoch=0-loss=3.pt", "epoch=1-loss=1.pt"], [0, 1]),
        (["resnet18-a.pt", "resnet18-b.pt"], [0, 1]),
        (["a.pt", "b2.pt"], [0, 1]),
        (["loss0.5.pt", "loss0.25.pt"], [0, 1]),
    ],
)
def test_the_order_is_that_of_numbers_in_the_names_or_else_of_the_names(tmp_path, names, expected, capsys):
    for seed, name in enumerate(names):
        torch.save(jittered(seed), tmp_path / name)
    rows = run(tmp_path, *(tmp_path / name for name in reversed(names)), *NET)
    assert [row["epoch"] for row in rows] == expected
    said = (
        "counted in the order of the names"
        if expected == [0, 1] and "0" not in names[0]
        else "the numbers in the names"
    )
    if "loss0" not in names[0]:
        assert [Path(row["checkpoint"]).name for row in rows] == names
        assert said in capsys.readouterr().out


def test_epochs_and_steps_inside_come_before_names(tmp_path):
    for name, epoch in (("epoch1.pt", 7), ("epoch2.pt", 5)):
        torch.save({"model": jittered(epoch), "epoch": epoch, "iteration": 10 * epoch}, tmp_path / name)
    assert places(run(tmp_path, tmp_path, *NET)) == [(5, 50), (7, 70)]


def test_a_damaged_checkpoint_leaves_its_place_in_the_order_of_names_free(tmp_path):
    for seed, name in enumerate("abc"):
        torch.save(jittered(seed), tmp_path / f"{name}.pt")
    (tmp_path / "b.pt").write_bytes(b"")
    assert [row["epoch"] for row in run(tmp_path, tmp_path, *NET, status=1)] == [0, 2]


# ------------------------------------------------------------------------------------- what is damaged, or not trusted


class Creates:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_checkpoint_is_executed_unless_its_source_is_trusted(tmp_path, refused):
    file, created = tmp_path / "a.ckpt", tmp_path / "created"
    torch.save({"state_dict": jittered(2), "hyper_parameters": {"a": Creates(created)}}, file)
    assert f"{file}: needs {open.__module__}.open to be unpickled" in (
        said := refused(file, *NET)
    )  # "_io" in Python 3.13
    assert "pass --unsafe if you trust its source" in said
    assert not created.exists()
    (row,) = run(tmp_path, file, *NET, "--unsafe")
    assert created.exists()
    assert row["nc/nc1"] == values_of(jittered(2))["nc1"]


def test_a_pickled_module_is_measured_if_its_source_is_trusted(tmp_path, refused):
    model = net()
    model.load_state_dict(jittered(2))
    torch.save(model, tmp_path / "a.pt")
    assert "torch.nn.modules.container.Sequential" in refused(tmp_path / "a.pt", *NET)
    (row,) = run(tmp_path, tmp_path / "a.pt", *NET, "--unsafe")
    assert row["nc/nc1"] == values_of(jittered(2))["nc1"]


def flipped(data):
    """One bit of a weight, which torch.load does not notice."""
    place = data.index(jittered(2)["0.weight"].numpy().tobytes()) + 3
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[: len(data) // 2], "may be damaged"),
        (lambda data: b"", "may be damaged"),
        (lambda data: b"<html>404</html>" * 9, "may be damaged"),
        (lambda data: data[:200] + bytes(50) + data[250:], "does not fit its checksum"),
        (flipped, "is damaged: a/data/0 does not fit its checksum"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_others_go_on(tmp_path, change, reason, capsys):
    for seed, name in ((2, "a"), (3, "b"), (4, "c")):
        torch.save(jittered(seed), tmp_path / f"{name}.pt")
    (tmp_path / "a.pt").write_bytes(change((tmp_path / "a.pt").read_bytes()))
    rows = run(tmp_path, tmp_path, *NET, status=1)
    assert [row["nc/nc1"] for row in rows] == [values_of(jittered(seed))["nc1"] for seed in (3, 4)]
    said = capsys.readouterr().err
    assert str(tmp_path / "a.pt") in said
    assert reason in said
    assert "--unsafe" not in said
    assert "1 of 3 checkpoints not measured" in said


def test_damaged_safetensors_are_named(tmp_path, refused):
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    assert "is damaged, or no safetensors file" in refused(tmp_path / "a.safetensors", *NET)


def test_weights_that_are_missing_or_unexpected_are_named_and_the_next_checkpoint_is_right(tmp_path, capsys):
    partial, more, other = jittered(1), jittered(2), jittered(3)
    del partial["3.bias"]
    more["extra.weight"] = torch.ones(1)
    other["3.weight"] = torch.ones(5, 8)
    for place, state in enumerate((partial, more, other, jittered(4))):
        torch.save(state, tmp_path / f"epoch{place}.pt")
    (row,) = run(tmp_path, tmp_path, *NET, status=1)
    assert row["epoch"] == 3
    assert metrics_of(row) == {f"nc/{key}": value for key, value in values_of(jittered(4)).items()}
    said = capsys.readouterr().err
    assert "epoch0.pt: the model, a Sequential, needs other weights: the checkpoint comes without '3.bias'" in said
    assert "the checkpoint comes with 'extra.weight'" in said
    assert "size mismatch for 3.weight" in said


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], "holds a list; needs a state dict"),
        ({"epoch": 3}, "holds no weights: needs a state dict, or one under 'state_dict', 'model_state_dict', 'model'"),
        ({"model": jittered(1), "state_dict": jittered(2)}, "holds weights under 'state_dict' and 'model'"),
    ],
)
def test_files_that_are_no_checkpoints_say_what_they_hold(tmp_path, refused, contents, message):
    torch.save(contents, tmp_path / "a.pt")
    assert message in refused(tmp_path / "a.pt", *NET)


def test_a_sharded_checkpoint_says_how_its_parts_are_joined(tmp_path, refused):
    (tmp_path / "epoch=0.ckpt").mkdir()
    (tmp_path / "epoch=0.ckpt" / ".metadata").write_bytes(b"")
    said = refused(tmp_path, *NET)
    assert f"lightning.pytorch.utilities.consolidate_checkpoint {tmp_path / 'epoch=0.ckpt'}" in said


# ------------------------------------------------------------------------------------------------- the command itself


@pytest.fixture
def file(tmp_path):
    torch.save(jittered(2), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def endless():
    return iter([(ROWS, TARGET)])


def several():
    return [DataLoader(TensorDataset(ROWS, TARGET), 8)]


def dataset():
    return TensorDataset(ROWS, TARGET)


def number():
    return 5


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--model", "conftest", "--model must be package.module:name, got 'conftest'"),
        ("--model", "no_such_module:Net", "no_such_module cannot be imported (ModuleNotFoundError"),
        ("--model", "conftest:Clasifier", "conftest has no 'Clasifier'; near: 'Classifier'"),
        (
            "--model",
            "conftest:KEYS",
            "must name a LightningModule class or a function that returns a module, got a list",
        ),
        ("--model", "test_checkpoints:number", "must return a torch.nn.Module, got a int"),
        ("--model", "test_checkpoints:Leaky", "missing 1 required positional argument: 'slope'); pass --model-args"),
        ("--model", "torchvision:resnet", "Unknown model resnet"),
        ("--data", "conftest:KEYS", "got a list; wrap it in a function"),
        ("--data", "test_checkpoints:number", "must give one DataLoader, got a int"),
        ("--data", "test_checkpoints:endless", "an iterator gives its batches once"),
        ("--data", "test_checkpoints:dataset", "got the data set TensorDataset"),
        ("--device", "abacus", "--device must be one of PyTorch, such as cpu or cuda:0, got 'abacus'"),
        ("--metrics", "nc9", "nc9"),
        ("--layers", "5", "no module of Sequential is named '5'"),
        ("--model-args", "width", "--model-args must be NAME=VALUE, got 'width'"),
        ("-o", "nc.txt", "must end in .csv"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(file, refused, option, text, message):
    assert message in refused(file, *NET, option, text)


def test_paths_without_checkpoints_are_one_line(tmp_path, refused):
    assert "none does not exist; pass checkpoints or folders of checkpoints" in refused(tmp_path / "none", *NET)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert f"no checkpoint in {tmp_path / 'run'}: needs files that end in .ckpt" in refused(tmp_path / "run", *NET)
    torch.save(jittered(2), tmp_path / "run" / "checkpoints" / "a.pt")
    assert f"; pass {tmp_path / 'run' / 'checkpoints'}" in refused(tmp_path / "run", *NET)


def test_a_file_that_exists_is_not_written_to(file, tmp_path, refused):
    (tmp_path / "nc.csv").write_text("mine")
    assert "nc.csv exists" in refused(file, *NET, "-o", tmp_path / "nc.csv")
    assert (tmp_path / "nc.csv").read_text() == "mine"


def test_a_state_dict_needs_to_be_told_its_model(file, refused):
    assert "--model MODEL must say what it holds" in refused(file, *DATA)


def test_the_current_directory_can_be_imported_from(file, tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text("from test_checkpoints import net as build\nfrom conftest import loader\n")
    monkeypatch.chdir(tmp_path)
    (row,) = run(tmp_path, file, "--model", "own_net:build", "--data", "own_net:loader")
    assert row["nc/nc1"] == values_of(jittered(2))["nc1"]


def test_a_metric_that_the_module_of_the_model_adds_can_be_named(file, tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(
        "from test_checkpoints import net as build\nfrom lightning_nc.functional import METRICS, MetricSpec\n"
        'METRICS["my_spread"] = MetricSpec(lambda s: s.moments.spread.max() / s.moments.spread.sum(), "largest share")\n'
    )
    monkeypatch.chdir(tmp_path)
    try:
        (row,) = run(tmp_path, file, "--model", "own_metric:build", *DATA, "--metrics", "my_spread")
    finally:
        METRICS.pop("my_spread", None)
    model = net().eval()
    model.load_state_dict(jittered(2))
    rows = [model[:3](ROWS[label == TARGET]).detach().double() for label in range(3)]
    scatter = [float((own - own.mean(0)).square().sum()) for own in rows]
    assert row["nc/my_spread"] == pytest.approx(max(scatter) / sum(scatter), rel=1e-5)


def test_a_warning_is_given_once_for_all_checkpoints(tmp_path):
    for seed in range(3):
        torch.save(jittered(seed), tmp_path / f"{seed}.pt")
    with pytest.warns(UserWarning, match="no sample") as caught:
        run(tmp_path, tmp_path, "--model", "test_checkpoints:net", "--data", "test_checkpoints:two_classes")
    said = [str(warning.message) for warning in caught]
    assert len([message for message in said if "no sample of 1 class (2)" in message]) == 1


def two_classes():
    return DataLoader(TensorDataset(ROWS[TARGET < 2], TARGET[TARGET < 2]), 8)


def test_the_data_are_loaded_once_and_a_table_is_printed(tmp_path, capsys):
    for seed in range(3):
        torch.save(jittered(seed), tmp_path / f"{seed}.pt")
    LOADED.clear()
    run(tmp_path, tmp_path, "--model", "test_checkpoints:net", "--data", "test_checkpoints:counted", "--metrics", "nc1")
    assert len(LOADED) == 1
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    expected = [[str(seed), f"{values_of(jittered(seed))['nc1']:.3e}"] for seed in range(3)]
    assert table == [["epoch", "step", "nc/nc1"], *expected]


LOADED = []


def counted():
    LOADED.append(1)
    return DataLoader(TensorDataset(ROWS, TARGET), 8)
