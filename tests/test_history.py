"""The rows of a run: what is appended is what the file holds, whatever happens to the run."""

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import Classifier, clusters, fit, free_port, full_disk, loader
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import History, NeuralCollapseCallback, measure
from lightning_nc.plotting import plot_history


@pytest.fixture
def path(tmp_path):
    return tmp_path / "nc.csv"


def exactly(rows):
    """The rows as text, so that nan equals nan and 1 differs from 1.0."""
    return [sorted((key, repr(value)) for key, value in row.items()) for row in rows]


def filled(path, epochs=3):
    history = History(path)
    for epoch in range(epochs):
        history.append({"nc1": 1 / (epoch + 3), "layer3/nc1": 2 / (epoch + 3)}, epoch=epoch, loss=0.1)
    return history


# ----------------------------------------------------------------------------------------------------------------- rows


def test_what_measure_returns_is_kept_under_the_keys_that_the_callback_logs():
    rows, target = clusters(3, 10, 6, 0.5)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    values = measure(model, DataLoader(TensorDataset(rows, target), 7), layers=["0"], progress=False)
    history = History()
    history.append(values, epoch=0)
    history.append(values, epoch=1, stage="test", step=20)
    near = {"geometry": values.geometry.nearest or "none"}
    assert history[0] == {"stage": "train", "epoch": 0, **{f"nc/{key}": value for key, value in values.items()}, **near}
    expected = {f"nc/test/{key}": value for key, value in values.items()}
    assert history[1] == {"stage": "test", "epoch": 1, "step": 20, **expected, **near}
    assert "nc/test/0/nc1" in history[1]


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("train", ["nc/nc1", "nc/layer3/nc1", "nc/nc1_cdnv_stderr"]),
        ("validate", ["nc/val/nc1", "nc/val_1/layer3/nc1"]),
        ("test", ["nc/test/nc1"]),
    ],
)
def test_keys_that_are_logged_keys_are_kept_as_they_are(stage, keys):
    history = History()
    history.append(dict.fromkeys(keys, 0.5), epoch=0, stage=stage)
    assert history == [{"stage": stage, "epoch": 0, **dict.fromkeys(keys, 0.5)}]


def test_keys_of_a_stage_without_the_prefix_and_standard_errors_get_it():
    history = History()
    history.append({"val_1/layer3/nc1": 0.5, "nc1_cdnv_stderr": 0.1}, epoch=0, stage="validate")
    assert history == [
        {"stage": "validate", "epoch": 0, "nc/val_1/layer3/nc1": 0.5, "nc/val/nc1_cdnv_stderr": 0.1},
    ]


def test_marks_and_numbers_of_the_user_are_kept_and_entries_without_a_value_are_not():
    history = History()
    history.append({"nc1": 1.0, "loss": 0.25}, epoch=2, weights="swapped", partial=True, accuracy=0.9, top5=None)
    row = {"stage": "train", "epoch": 2, "weights": "swapped", "partial": True, "accuracy": 0.9}
    assert history == [{**row, "nc/nc1": 1.0, "loss": 0.25}]


def test_rows_hold_values_of_python_whatever_was_given():
    history = History()
    values = {"nc1": torch.tensor(0.5), "nc3": np.float32(0.25), "nc2_of": "0.125", "loss": torch.tensor(2.0)}
    history.append(values, epoch=np.int64(3), step=torch.tensor(7), count=np.int64(4), note="two\nlines ", ok="True")
    assert history == [
        {"stage": "train", "epoch": 3, "step": 7, "count": 4, "note": "two lines", "ok": True}
        | {"nc/nc1": 0.5, "nc/nc3": 0.25, "nc/nc2_of": 0.125, "loss": 2.0}
    ]
    assert {type(value) for value in history[0].values()} == {str, int, float, bool}


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({"nc1": 1.0}, {"epoch": 0, "stage": "val"}, "stage must be one of 'train', 'validate', 'test', got 'val'"),
        (
            {"nc/nc1": 1.0},
            {"epoch": 0, "stage": "test"},
            "stage is 'test', but the key 'nc/nc1' is of the stage 'train'",
        ),
        ({"nc/val/nc1": 1.0}, {"epoch": 0}, "'nc/val/nc1' is of the stage 'validate'; pass stage='validate'"),
        ({"test/nc1": 1.0}, {"epoch": 0}, "'test/nc1' is of the stage 'test'; pass stage='test'"),
        ({"nc1": 1.0, "nc/nc1": 2.0}, {"epoch": 0}, "'nc/nc1' is in the row twice"),
        ({"nc1": 1.0, "epoch": 3}, {"epoch": 0}, "'epoch' is in the row twice"),
        ({"nc1": 1.0, "loss": 3}, {"epoch": 0, "loss": 4}, "'loss' is in the row twice"),
        ({"nc1": 1.0}, {"epoch": math.nan}, "epoch must be a finite number, got nan"),
        ({"nc1": 1.0}, {"epoch": None}, "epoch must be a number, got None"),
        ({"nc1": 1.0}, {"epoch": 0, "step": "a"}, "step must be a number, got 'a'"),
        ({"nc1": "large"}, {"epoch": 0}, "nc/nc1 must be a number, got 'large'"),
        ({"nc1": None}, {"epoch": 0}, "nc/nc1 must be a number, got None"),
        ({"nc1": 1.0}, {"epoch": 0, "accuracy": [1, 2]}, r"accuracy must be a number, got \[1, 2\]"),
        ({"nc1": 1.0}, {"epoch": 0, "accuracy": torch.ones(2)}, "accuracy must be a number, got tensor"),
        ({"loss": 1.0}, {"epoch": 0}, r"must hold a metric such as 'nc1' or 'nc/nc1', got \['loss'\]"),
        ({}, {"epoch": 0, "loss": 1.0}, "must hold a metric"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_appended(path, values, arguments, message):
    history = History(path)
    with pytest.raises(ValueError, match=message):
        history.append(values, **arguments)
    assert history == []
    assert not path.exists()


# ----------------------------------------------------------------------------------------------------------------- file

NAMES = ["nc1", "nc3", "layer3/nc1", "a,b/nc2_of", 'a"b/nc1', "größe/nc1", "nc1_cdnv_stderr"]
ENTRIES = ["accuracy", "weights", "note"]
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(NAMES), st.floats(), min_size=1),
            st.dictionaries(st.sampled_from(ENTRIES), st.booleans() | st.integers() | st.floats() | TEXTS | st.none()),
            st.integers(0, 10**6) | st.floats(0, 1e6),
            st.sampled_from(["train", "validate", "test"]),
            st.none() | st.integers(0, 2**53),
        ),
        min_size=1,
        max_size=6,
    )
)
@example([({"nc1": 0.5}, {"note": 2**63 - 1}, 0, "train", None), ({"nc1": 0.5}, {"note": -(2**63)}, 1, "train", None)])
def test_the_file_gives_back_exactly_the_rows_that_were_appended(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("history") / "nc.csv"
    history = History(path)
    for values, entries, epoch, stage, step in rows:
        history.append(values, epoch=epoch, stage=stage, step=step, **entries)
        assert exactly(History(path)) == exactly(history)
    assert exactly(History.read(path)) == exactly(history)


def test_a_row_is_in_the_file_at_once_and_only_a_new_column_rewrites_it(path):
    history = filled(path, 2)
    before, file = path.read_text(), path.stat().st_ino
    history.append({"layer3/nc1": 0.5, "nc1": 0.25}, epoch=2)
    assert path.read_text() == before + "train,2,,0.25,0.5\n"
    assert path.stat().st_ino == file
    history.append({"nc1": 0.5}, epoch=2, stage="test")
    assert path.read_text().splitlines() == [
        "stage,epoch,loss,nc/nc1,nc/layer3/nc1,nc/test/nc1",
        *(f"{line}," for line in before.splitlines()[1:]),
        "train,2,,0.25,0.5,",
        "test,2,,,,0.5",
    ]
    assert [file.name for file in path.parent.iterdir()] == ["nc.csv"]


def test_layers_keep_the_order_in_which_they_were_measured(path):
    history = History(path)
    history.append({"stem/nc1": 3.0, "body/nc1": 2.0, "nc1": 1.0}, epoch=0)
    lines = History.read(path).plot().axes[0].lines
    assert [line.get_label() for line in lines] == ["stem", "body", "classifier input"]


@pytest.mark.filterwarnings("error")
def test_a_loop_that_is_resumed_continues_the_file(path):
    first = filled(path)
    resumed = History(path)
    assert resumed == first
    for epoch in (3, 4):
        resumed.append({"nc1": 0.1}, epoch=epoch)
        resumed.append({"nc1": 0.1}, epoch=epoch, stage="test")
    assert [row["epoch"] for row in resumed] == [0, 1, 2, 3, 3, 4, 4]
    assert History.read(path) == resumed


@pytest.mark.parametrize(("place", "warned"), [((2, None), True), ((0, None), True), ((2, 30), True), ((2, 31), False)])
def test_a_row_that_does_not_come_after_those_of_an_earlier_run_warns_once(path, recwarn, place, warned):
    history = History(path)
    history.append({"nc1": 1.0}, epoch=2, step=30)
    again = History(path)
    for _ in range(2):
        again.append({"nc1": 1.0}, epoch=place[0], step=place[1])
    said = [str(warning.message) for warning in recwarn]
    text = f"{path} has rows of an earlier run, up to epoch 2 of stage 'train', and epoch {place[0]} is appended"
    assert [message.startswith(text) for message in said] == [True] * warned
    assert len(History.read(path)) == 3


@pytest.mark.filterwarnings("error")
def test_measuring_an_epoch_twice_in_one_run_is_no_earlier_run(path):
    history = filled(path)
    history.append({"nc1": 1.0}, epoch=0, weights="swapped")
    assert len(History.read(path)) == 4


@pytest.mark.filterwarnings("ignore:the last row of")
def test_a_row_that_was_cut_when_the_run_was_killed_is_dropped_wherever_it_was_cut(path):
    whole = filled(path)
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        resumed = History(path)
        assert resumed == whole[:2], data[start:end]
        assert path.read_bytes() == data[:end]  # reading changes nothing
        resumed.append({"nc1": 0.5}, epoch=2, note="ü")
        assert History.read(path) == resumed == [*whole[:2], {"stage": "train", "epoch": 2, "nc/nc1": 0.5, "note": "ü"}]


def test_a_row_that_lacks_only_digits_of_its_last_value_is_reported(path):
    filled(path, 5)  # the last value is 2/7
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(
        UserWarning, match=r"the last row of .*nc\.csv has no line end, so it may be cut, and is left out"
    ):
        assert len(History(path)) == 4


@pytest.mark.filterwarnings("ignore:the last row of")
def test_a_row_that_does_not_fit_on_the_disk_leaves_no_part_of_it_and_the_next_one_is_whole(path):
    history = filled(path)
    before = path.read_bytes()
    with full_disk(len(before) + 10), pytest.raises(OSError, match="File too large"):
        history.append({"nc1": 0.125, "layer3/nc1": 0.25}, epoch=3, loss=0.1)
    assert path.read_bytes() == before
    with full_disk(len(before) + 10), pytest.raises(OSError, match=r"File too large.*nc\.csv"):
        history.append({"nc1": 0.125, "layer4/nc1": 0.25}, epoch=3, loss=0.1)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    history.append({"nc1": 0.125, "layer3/nc1": 0.25}, epoch=4, loss=0.1)
    assert [row["epoch"] for row in History(path)] == [0, 1, 2, 4]


def test_a_character_that_was_cut_is_dropped_with_its_row(path):
    history = filled(path, 1)
    history.append({"nc1": 0.5}, epoch=1, note="größe")
    history.append({"nc1": 0.5}, epoch=2, note="größe")
    path.write_bytes(path.read_bytes()[: path.read_bytes().rfind("ö".encode()) + 1])
    assert History(path) == history[:2]


@pytest.mark.parametrize(
    "content",
    [
        b"epoch,nc/nc1\n0,0.5\n",
        b"stage;epoch;nc/nc1\ntrain;0;0.5\n",
        b"an essay",
        b"\x89PNG\r\n\x1a\n\0\0",
        b"\0" * 300_000,
        "stage,epoch,nc/nc1\n".encode("utf-16"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"nc\.csv was not written by History.*Pass another path; History\.read reads"):
        History(path)
    assert path.read_bytes() == content


def test_a_file_that_was_replaced_during_the_run_is_left_as_it_is(path):
    history = filled(path)
    path.write_text("an essay")
    with pytest.raises(ValueError, match="was not written by History"):
        history.append({"nc1": 0.5}, epoch=3)
    assert path.read_text() == "an essay"
    assert len(history) == 4  # the measurement is not lost


def test_a_path_that_is_no_csv_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.csv, got 'nc\.txt'"):
        History("nc.txt")
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        History(tmp_path / "a.csv")


def test_an_empty_file_and_folders_that_do_not_exist_are_begun(path, tmp_path):
    path.touch()
    assert History.read(filled(path).path) == filled(tmp_path / "a" / "b" / "nc.csv")


def test_a_file_that_was_deleted_is_begun_anew(path):
    history = filled(path)
    path.unlink()
    history.append({"nc1": 0.5}, epoch=3)
    assert History.read(path) == history[3:]


def test_the_file_stays_where_it_is_when_the_directory_changes_and_a_link_stays_a_link(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("link.csv").symlink_to("nc.csv")
    history = History("link.csv")
    monkeypatch.chdir("other")
    history.append({"nc1": 0.5}, epoch=0)
    assert History.read(tmp_path / "nc.csv") == history
    assert (tmp_path / "link.csv").is_symlink()


def append_on(rank, port, path):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    history = History(path)
    for epoch in range(3):
        dist.barrier()  # as in measure
        history.append({"nc1": 0.5 + rank}, epoch=epoch)
    assert [row["nc/nc1"] for row in history] == [0.5 + rank] * 3
    dist.destroy_process_group()


def test_only_the_first_rank_of_a_process_group_writes(path):
    ranks = torch.multiprocessing.start_processes(append_on, (free_port(), path), 2, join=False, start_method="fork")
    finished = ranks.join(timeout=60) or ranks.join(timeout=60)  # returns after the first process that ends
    for process in ranks.processes:
        process.kill()
    assert finished
    assert [row["nc/nc1"] for row in History.read(path)] == [0.5] * 3


# -------------------------------------------------------------------------------------------------------------- as a list


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda history: pickle.loads(pickle.dumps(history))])
def test_a_copy_has_the_rows_and_continues_the_file(path, copied):
    history = filled(path)
    before = path.read_bytes()
    twin = copied(history)
    assert type(twin) is History
    assert twin == history == list(history)
    assert path.read_bytes() == before
    twin.append({"nc1": 0.5}, epoch=3)
    assert len(history) == 3
    assert History.read(path) == twin
    assert copied(History()) == []


def test_rows_to_start_with_are_copied_and_not_written(path):
    rows = [{"stage": "train", "epoch": 0, "nc/nc1": 0.5}]
    history = History(path, rows)
    history.append({"nc1": 0.25}, epoch=1)
    history[0]["nc/nc1"] = 2.0
    assert rows[0]["nc/nc1"] == 0.5
    assert History.read(path) == history[1:]


def test_what_was_read_is_kept_in_memory_alone(path):
    history = filled(path)
    read = History.read(path)
    read.append({"nc1": 0.5}, epoch=3)
    assert History.read(path) == history
    assert read.path is None


def test_a_table_of_pandas_has_a_column_for_every_key(path):
    pandas = pytest.importorskip("pandas")
    history = filled(path)
    history.append({"nc1": 0.5}, epoch=2, stage="test")
    table = pandas.DataFrame(history)
    assert list(table) == ["stage", "epoch", "loss", "nc/nc1", "nc/layer3/nc1", "nc/test/nc1"]
    assert table["nc/nc1"].tolist()[:3] == [row["nc/nc1"] for row in history[:3]]
    assert table.equals(pandas.read_csv(path))


def test_plot_draws_the_rows():
    history = History()
    for epoch in range(3):
        history.append({"nc1": 0.5**epoch, "nc2_of": 0.4, "nc2_of_stderr": 0.1}, epoch=epoch, accuracy=0.5)
        history.append({"nc1": 0.9**epoch}, epoch=epoch, stage="test")
    drawn, expected = history.plot(num_classes=4), plot_history(list(history), num_classes=4)
    lines = [
        [line.get_xydata().tolist() for axis in figure.axes for line in axis.lines] for figure in (drawn, expected)
    ]
    assert lines[0] == lines[1]
    assert [len(axis.lines) for axis in drawn.axes] == [1, 2, 1]  # accuracy, the metrics, and no standard error
    assert [axis.get_title() for axis in history.plot(metrics="nc2_of").axes] == ["NC2, class means to OF"]


# -------------------------------------------------------------------------------------------------------------- callback


def test_the_callback_keeps_its_rows_in_a_history_and_a_checkpoint_holds_plain_rows(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "validate"), strict=True)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, [callback, keep], val=loader(False))
    assert type(callback.history) is History
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]["history"]
    assert type(saved) is list
    assert {type(row) for row in saved} == {dict}
    assert {type(value) for row in saved for value in row.values()} == {str, int, float}
    assert saved == callback.history[: len(saved)]
    fit(tmp_path, [callback, keep], model=Classifier())
    assert [type(history) for history in callback.previous_histories] == [History]


def test_a_checkpoint_that_holds_rows_as_they_always_were_is_continued(tmp_path):
    rows = [
        {"stage": "train", "epoch": 0, "step": 6, "nc/nc1": 0.5, "nc/layer3/nc1": math.inf},
        {"stage": "train", "epoch": 0, "step": 6, "weights": "swapped", "nc/nc1": 0.25},
        {"stage": "validate", "epoch": 0, "step": 6, "partial": True, "nc/val/nc1": 0.5},
    ]
    callback = NeuralCollapseCallback()
    callback.load_state_dict({"history": rows})
    assert type(callback.history) is History
    assert callback.history == rows
    assert callback.state_dict()["history"] == rows
    assert callback.plot().axes[0].lines


def test_the_values_of_a_csv_logger_are_those_of_the_history(tmp_path):
    callback = NeuralCollapseCallback(strict=True)
    fit(tmp_path, [callback], logger=CSVLogger(tmp_path, name="", version=""))
    for row, read in zip(callback.history, History.read(tmp_path), strict=True):
        assert {key: value for key, value in row.items() if "nc/" in key or key == "epoch"} == {
            key: pytest.approx(value) for key, value in read.items() if key not in ("step", "train_loss")
        }
