"""A saved run is read back whole: rows of its log, and scenes, table and settings of its checkpoints."""

import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from conftest import OTHER, Classifier, fit
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from report_runs import collapsing
from torch.utils.data import DataLoader

from lightning_nc import History, NeuralCollapseCallback
from lightning_nc.report import write_report


def save(path, *histories, **others):
    """A checkpoint with the states of callbacks, as Lightning's Trainer writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    callbacks = {f"NeuralCollapseCallback{place}": history.state() for place, history in enumerate(histories)}
    contents = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"weight": torch.zeros(2, 2)},
        "callbacks": callbacks,
    }
    torch.save({**contents, **others}, path)


def write_log(path, rows, columns=("epoch", "nc/nc1", "nc/layer1/nc1", "train_accuracy")):
    """A log as CSVLogger writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    path.write_text("\n".join([*lines, ""]))


def test_a_run_of_lightning_is_read_back_as_the_callback_has_it(tmp_path):
    callback = NeuralCollapseCallback(layers=["net.0"], stages=("train", "validate"), geometry=(0, 1, 2))
    saving = ModelCheckpoint(save_last=True)
    fit(tmp_path, [callback, saving], val=DataLoader(OTHER, 8), logger=CSVLogger(tmp_path, name="run"))
    found = History.read(tmp_path / "run" / "version_0")
    losses = [{name: row.pop(name) for name in ("train_loss", "val_loss") if name in row} for row in found]
    assert [dict(row) for row in found] == [dict(row) for row in callback.history]
    assert [len(logged) for logged, row in zip(losses, found, strict=True) if row["stage"] == "train"] == [2, 2, 2]
    assert not any(logged for logged, row in zip(losses, found, strict=True) if row["stage"] != "train")
    assert found.scenes == callback.history.scenes
    assert [scene.chosen for scene in found.scenes] == [[0, 1, 2]] * 3
    assert (found.per_class, found.about) == (callback.per_class, callback.history.about)
    alone = History.read(saving.last_model_path)
    assert (list(alone), alone.scenes, alone.per_class) == (list(found), found.scenes, found.per_class)
    log = History.read(tmp_path / "run" / "version_0" / "metrics.csv")
    assert log.scenes == []
    assert [row["nc/nc1"] for row in log if "nc/nc1" in row] == [row["nc/nc1"] for row in found if "nc/nc1" in row]


def test_a_resumed_run_has_the_epochs_of_the_first_log_too_each_once(tmp_path):
    def logged():
        return CSVLogger(tmp_path, name="run")

    first = NeuralCollapseCallback()
    fit(tmp_path, [first, ModelCheckpoint(dirpath=tmp_path / "first", save_last=True)], logger=logged())
    again = NeuralCollapseCallback()
    saving = ModelCheckpoint(save_last=True)
    fit(
        tmp_path,
        [again, saving],
        model=Classifier(),
        ckpt_path=tmp_path / "first" / "last.ckpt",
        max_epochs=5,
        logger=logged(),
    )
    for folder in (tmp_path, tmp_path / "run" / "version_1"):
        assert [row["epoch"] for row in History.read(folder)] == [0, 1, 2, 3, 4]


def test_the_log_adds_what_came_after_the_checkpoint_and_the_accuracy_beside_it(tmp_path):
    history = collapsing(6, layers=("layer1",))
    early = History.from_state(
        {**history.state(), "history": list(history)[:4], "scenes": history.state()["scenes"][:4]}
    )
    save(tmp_path / "checkpoints" / "last.ckpt", early)
    write_log(tmp_path / "metrics.csv", [{**row, "nc/nc1": f"{row['nc/nc1']:.5e}"} for row in history])
    found = History.read(tmp_path)
    assert [row["epoch"] for row in found] == [0, 1, 2, 3, 4, 5]
    assert [row["nc/nc1"] for row in found[:4]] == [row["nc/nc1"] for row in history[:4]]  # the unrounded ones
    assert found[5]["nc/nc1"] == pytest.approx(history[5]["nc/nc1"], rel=1e-4)
    assert "geometry" in found[3]
    assert len(found.scenes) == 4


def test_a_value_that_the_log_has_beside_others_of_the_checkpoint_is_kept_once(tmp_path):
    history = collapsing(3, layers=())
    save(tmp_path / "last.ckpt", history)
    columns = ("epoch", "nc/nc1", "nc/test/nc1")
    write_log(tmp_path / "metrics.csv", [*history[:2], {**history[2], "nc/test/nc1": 0.25}], columns)
    found = History.read(tmp_path)
    assert [row["nc/nc1"] for row in found if "nc/nc1" in row] == [row["nc/nc1"] for row in history]
    assert [row["nc/test/nc1"] for row in found if "nc/test/nc1" in row] == [0.25]


def test_checkpoints_of_another_run_are_not_mixed_in(tmp_path):
    own, other = collapsing(4, layers=()), collapsing(4, layers=(), classes=5)
    save(tmp_path / "version_0" / "last.ckpt", own)
    save(tmp_path / "version_1" / "last.ckpt", other)  # newer
    log = tmp_path / "version_0" / "metrics.csv"
    write_log(log, own)
    assert History.read(tmp_path).scenes == own.scenes
    (tmp_path / "version_0" / "last.ckpt").unlink()
    with pytest.warns(UserWarning, match="of other runs; pass the directory of one run"):
        found = History.read(tmp_path)
    assert found.scenes == []
    assert [row["nc/nc1"] for row in found] == [row["nc/nc1"] for row in own]


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_checkpoint_is_executed_and_an_older_one_is_read_with_one_warning(tmp_path):
    history, mark = collapsing(3, layers=()), tmp_path / "executed"
    save(tmp_path / "run" / "epoch=1.ckpt", history)
    for name in ("epoch=2.ckpt", "last.ckpt"):
        save(tmp_path / "run" / name, history, extra=Touch(mark))
    (tmp_path / "run" / "broken.ckpt").write_bytes(b"not a checkpoint")
    os.utime(tmp_path / "run" / "epoch=1.ckpt", (0, 0))
    with pytest.warns(UserWarning, match="run any code|damaged") as caught:
        found = History.read(tmp_path / "run")
    assert len(caught) == 1
    assert list(found) == list(history)
    with pytest.raises(
        ValueError, match=r"last\.ckpt needs .* to be unpickled, which may run any code, and is refused$"
    ):
        History.read(tmp_path / "run" / "last.ckpt")
    assert not mark.exists()


def changed(tmp_path, **parts):
    """A checkpoint whose history has other parts, and the history as it was."""
    history = collapsing(3, layers=())
    file = tmp_path / "last.ckpt"
    save(file, history)
    contents = torch.load(file, weights_only=True)
    ((key, state),) = contents["callbacks"].items()
    contents["callbacks"][key] = state | parts
    torch.save(contents, file)
    return file, history


@pytest.mark.parametrize(
    "rows",
    [
        [{"epoch": "first", "step": 1, "nc/nc1": 0.5}],
        [{"epoch": 0, "step": None, "nc/nc1": 0.5}],
        [{"epoch": 0, "step": 1, "nc/nc1": "small"}],
        [{"epoch": 10**400, "step": 1, "nc/nc1": 0.5}],
        [{"epoch": 0, "step": 1, 7: 0.5}],
        [{"epoch": 0, "step": 1, "stage": [], "nc/nc1": 0.5}],
    ],
)
def test_rows_of_a_checkpoint_that_are_no_rows_are_refused_with_its_name(tmp_path, rows):
    file, _ = changed(tmp_path, history=rows)
    with pytest.raises(ValueError, match=r"last\.ckpt holds rows of neural collapse that cannot be read"):
        History.read(file)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("scenes", 5),
        ("scenes", [5]),
        ("scenes", ['{"epoch": 0, "of another version": 1}']),
        ("scenes", [replace(collapsing(1, layers=()).scenes[0], means=[]).text]),
        ("scenes", [replace(collapsing(1, layers=()).scenes[0], epoch="first").text]),
        ("scenes", [collapsing(1, layers=()).scenes[0].text[:-1]]),
        ("scenes", ["[" * 10**6]),
        ("per_class", ["class"]),
        ("per_class", {"class": [0, 1], "samples": [4]}),
        ("about", "mode"),
        ("about", {"classes": [3]}),
        ("about", torch.ones(2)),
    ],
)
def test_a_part_of_a_history_that_is_damaged_or_of_another_version_is_left_out_with_one_warning(tmp_path, part, value):
    file, history = changed(tmp_path, **{part: value})
    with pytest.warns(UserWarning, match=rf"last\.ckpt holds {part} of neural collapse that cannot be read") as caught:
        found = History.read(file)
    assert len(caught) == 1
    assert list(found) == list(history)
    assert not found.state()[part]
    assert [name for name in ("scenes", "per_class", "about") if not found.state()[name]] == [part]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", ["scenes", "per_class", "about"])
def test_a_part_of_a_history_that_is_none_is_as_one_that_is_not_there(tmp_path, part):
    file, history = changed(tmp_path, **{part: None})
    found = History.read(file)
    assert list(found) == list(history)
    assert not found.state()[part]
    write_report({"run": found}, tmp_path / "report.html")


def test_a_checkpoint_with_one_other_bit_in_a_value_is_refused_instead_of_read_as_another_number(tmp_path):
    history = collapsing(3, layers=())
    save(tmp_path / "last.ckpt", history)
    data, value = (tmp_path / "last.ckpt").read_bytes(), struct.pack(">d", history[-1]["nc/nc1"])
    assert data.count(value) == 1
    (tmp_path / "last.ckpt").write_bytes(data.replace(value, struct.pack(">d", 2 * history[-1]["nc/nc1"])))
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged: .*data.pkl does not fit its checksum"):
        History.read(tmp_path / "last.ckpt")


@pytest.mark.parametrize("callbacks", [None, [1], torch.ones(2)])
def test_a_checkpoint_with_other_callbacks_than_a_dict_of_them_holds_no_history(tmp_path, callbacks):
    torch.save(
        {"state_dict": {"weight": torch.ones(2)}, "callbacks": callbacks, "loops": torch.ones(2)}, tmp_path / "a.ckpt"
    )
    with pytest.raises(ValueError, match=r"a\.ckpt holds no history"):
        History.read(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "state", ["[" * 100_000, '{"log_history": [5]}', '{"log_history": [{"nc/nc1": 1, "step": 1}]}']
)
def test_a_damaged_trainer_state_is_refused_with_its_name(tmp_path, state):
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(ValueError, match=r"trainer_state\.json is damaged"):
        History.read(tmp_path / "trainer_state.json")


@pytest.mark.parametrize(("parts", "epochs"), [({"scenes": [5]}, [0, 1, 2, 3]), ({"history": [{"epoch": "x"}]}, [3])])
def test_a_run_is_resumed_with_what_can_be_read_of_the_history(tmp_path, parts, epochs):
    keep = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, [NeuralCollapseCallback(), keep])
    contents = torch.load(tmp_path / "last.ckpt", weights_only=False)
    ((key, state),) = ((key, state) for key, state in contents["callbacks"].items() if "NeuralCollapse" in key)
    contents["callbacks"][key] = state | parts
    torch.save(contents, tmp_path / "other.ckpt")
    callback = NeuralCollapseCallback(strict=True)
    with pytest.warns(UserWarning, match="the checkpoint holds .* of neural collapse that cannot be read"):
        fit(tmp_path, [callback], ckpt_path=tmp_path / "other.ckpt", max_epochs=4)
    assert [row["epoch"] for row in callback.history] == epochs


def test_what_several_callbacks_measured_at_one_moment_is_one_row(tmp_path):
    train = collapsing(3, layers=("layer1",))
    held_out = History(rows=[{"stage": "validate", "epoch": 1, "step": 20, "nc/val/nc1": 0.5}])
    deeper = History(
        rows=[{"stage": "train", "epoch": row["epoch"], "step": row["step"], "nc/layer2/nc1": 1.0} for row in train]
    )
    save(tmp_path / "last.ckpt", deeper, train, held_out)
    found = History.read(tmp_path / "last.ckpt")
    assert [(row["epoch"], row["stage"]) for row in found] == [
        (0, "train"),
        (1, "train"),
        (1, "validate"),
        (2, "train"),
    ]
    assert all({"nc/layer1/nc1", "nc/layer2/nc1", "nc/nc1"} <= row.keys() for row in found if row["stage"] == "train")
    assert (found.scenes, found.about) == (train.scenes, train.about)


def test_the_state_of_a_trainer_of_transformers_is_read(tmp_path):
    history = collapsing(3, layers=())
    entries = [
        {**{key: value for key, value in row.items() if key != "stage"}, "scene": scene.text}
        for row, scene in zip(history, history.scenes, strict=True)
    ]
    folder = tmp_path / "checkpoint-30"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0, "step": 5}, *entries]}))
    for path in (tmp_path, folder / "trainer_state.json"):
        found = History.read(path)
        assert [dict(row) for row in found] == [dict(row) for row in history]
        assert found.scenes == history.scenes
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="it has no log_history"):
        History.read(folder / "trainer_state.json")


def test_a_path_without_a_run_names_what_would_be_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics.csv.*a checkpoint \(.ckpt\) or trainer_state.json"):
        History.read(tmp_path)
    save(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="holds no history of NeuralCollapseCallback"):
        History.read(tmp_path / "last.ckpt")
