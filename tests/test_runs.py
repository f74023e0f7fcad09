"""Runs read back: what loggers wrote, and files that somebody else wrote."""

import csv
import math
import os

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_nc.plotting import plot_history
from lightning_nc.runs import epoch_of, find_log, is_metric, read_run, split_seeds

ROWS = [
    {"epoch": epoch, "nc/nc1": 0.5**epoch, "nc/layer3/nc1": 2.0 * 0.5**epoch, "nc/val/nc1": 3.0 * 0.5**epoch}
    for epoch in range(40)
]


def log(logger, rows=ROWS):
    for row in rows:
        logger.log_metrics(row, step=10 * row["epoch"])
    logger.finalize("success")


def logged(rows=ROWS):
    """The rows with the step under which ``log`` gives them to a logger."""
    return [{**row, "step": 10 * row["epoch"]} for row in rows]


def write(path, *lines, encoding="utf-8"):
    path.write_bytes("\n".join([*lines, ""]).encode(encoding))
    return path


def damaged(file, at, byte):
    """A file that had ``at`` in it, with one other byte there."""
    data = file.read_bytes()
    place = data.index(at)
    file.write_bytes(data[:place] + byte + data[place + 1 :])


def all_same(rows, expected=ROWS):
    """Whether the rows are the same up to float32, which TensorBoard stores."""
    return all(row == pytest.approx(other, rel=1e-6, nan_ok=True) for row, other in zip(rows, expected, strict=True))


def test_what_a_csv_logger_wrote_is_read_back_from_its_file_and_from_any_folder_above(tmp_path):
    log(CSVLogger(tmp_path, name="a", version="b"))
    for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b" / "metrics.csv"):
        assert all_same(read_run(path), logged())


def test_what_tensorboard_wrote_is_read_back_with_its_epochs(tmp_path):
    log(TensorBoardLogger(tmp_path, name="a", version="b"))
    assert all_same(read_run(tmp_path), logged())


def test_what_transformers_wrote_to_tensorboard_is_read_back_under_the_keys_of_its_log_history(tmp_path):
    transformers = pytest.importorskip("transformers")
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    writer = SummaryWriter(tmp_path)
    callback, arguments = TensorBoardCallback(writer), transformers.TrainingArguments(tmp_path, use_cpu=True)
    for row in ROWS:
        state = transformers.TrainerState(global_step=10 * row["epoch"], is_world_process_zero=True)
        callback.on_log(arguments, state, transformers.TrainerControl(), logs={**row, "loss": 0.5, "grad_norm": 0.1})
    writer.close()
    assert all_same(read_run(tmp_path), [{**row, "train/loss": 0.5} for row in logged()])


def test_what_wandb_wrote_is_read_back_and_a_file_that_is_cut_gives_the_rows_before_the_cut(tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="nc")
    rows = [*ROWS, {"epoch": 40, "nc/nc1": math.nan, "nc/val/nc1": math.inf, "note": "x" * 40_000, "nc/nc3": 1.0}]
    log(logger, rows)
    logger.experiment.finish()
    import wandb

    wandb.teardown()  # waits until the file is closed
    (file,) = tmp_path.rglob("run-*.wandb")
    rows[-1].pop("note")
    rows = logged(rows)
    assert all_same(read_run(tmp_path), rows)  # the note spans two blocks of the file
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 8])
    found = read_run(file)
    assert 0 < len(found) < len(rows)
    assert all_same(found, rows[: len(found)])
    file.write_bytes(whole + bytes(5000))  # as a crash of the machine may leave it
    assert all_same(read_run(file), rows)
    damaged(file, b"0.0078125", b"9")  # another number, if it were read
    with pytest.raises(ValueError, match=r"the file is damaged: the record at byte [0-9]+ does not fit its checksum"):
        read_run(file)


def test_an_event_file_with_a_damaged_record_is_refused_instead_of_read_up_to_it(tmp_path):
    log(TensorBoardLogger(tmp_path, name="a", version="b"))
    (file,) = tmp_path.rglob("events*")
    whole = file.read_bytes()
    file.write_bytes(whole + bytes(5000))
    assert all_same(read_run(file), logged())
    damaged(file, b"nc/nc1", b"N")
    with pytest.raises(ValueError, match=r"the record of events\S+ at byte [0-9]+ does not fit its checksum"):
        read_run(tmp_path)


def test_metrics_that_a_killed_run_gave_tensorboard_without_their_epoch_are_left_out_with_a_warning(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="a", version="b")
    for row in ROWS[:3]:
        logger.log_metrics(row, step=10 * row["epoch"])
    logger.log_metrics({"nc/nc1": 0.125}, step=30)
    logger.finalize("success")
    with pytest.warns(UserWarning, match="without an epoch at 1 steps, the last of them 30: left out"):
        assert all_same(read_run(tmp_path), logged(ROWS[:3]))


def test_the_newest_log_of_a_folder_is_read(tmp_path):
    for index, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        file = write(tmp_path / name / "metrics.csv", "epoch,nc/nc1", f"{index},1.0")
        os.utime(file, (index, index))
    assert find_log(tmp_path) == tmp_path / "new" / "metrics.csv"


def test_keys_as_measure_returns_them_a_stage_column_and_other_columns_are_read(tmp_path):
    file = write(
        tmp_path / "own.csv", "epoch,loss,stage,nc1,layer3/nc1", "0,9,train,1.0,", "1,9,test,2.0,3.0", "2,9,,4,nan"
    )
    rows = read_run(file)
    assert [row.get("stage") for row in rows] == ["train", "test", None]
    values = [{key: value for key, value in row.items() if key not in ("stage", "loss")} for row in rows]
    assert [row["loss"] for row in rows] == [9, 9, 9]
    nan = math.nan
    assert all_same(
        values,
        [{"epoch": 0, "nc1": 1}, {"epoch": 1, "nc1": 2, "layer3/nc1": 3}, {"epoch": 2, "nc1": 4, "layer3/nc1": nan}],
    )
    assert len(plot_history(read_run(file)).axes[1].lines) == 4


def test_layers_are_in_natural_order_whatever_the_order_of_a_file(tmp_path):
    layers = ["layer10", "layer9", "layer1", "layer2"]
    with (tmp_path / "metrics.csv").open("w") as file:
        csv.writer(file).writerows([["epoch", *(f"nc/{layer}/nc1" for layer in layers), "nc/nc1"], [0, 1, 2, 3, 4, 5]])
    lines = plot_history(read_run(tmp_path)).axes[0].lines
    assert [line.get_label() for line in lines] == ["layer1", "layer2", "layer9", "layer10", "classifier input"]


@pytest.mark.parametrize(("epoch", "expected"), [("3", 3), ("3.0", 3), ("0.5", 0.5), (" 2", 2)])
def test_an_epoch_is_read_as_it_was_written(tmp_path, epoch, expected):
    (row,) = read_run(write(tmp_path / "a.csv", "epoch, nc/nc1", f"{epoch}, 1.0"))
    assert row == {"epoch": expected, "nc/nc1": 1.0}
    assert type(row["epoch"]) is type(expected)


def test_files_of_spreadsheets_are_read(tmp_path):
    expected = [{"epoch": 0, "nc/nc1": 0.5}]
    for encoding in ("utf-8", "utf-8-sig"):
        for delimiter in ",;\t":
            for end in ("\n", "\r\n"):
                text = f"epoch{delimiter}nc/nc1{end}0{delimiter}0.5{end}"
                (tmp_path / "a.CSV").write_bytes(text.encode(encoding))
                assert read_run(tmp_path / "a.CSV") == expected


def test_a_field_of_any_length_is_read_and_the_limit_of_the_csv_module_is_restored(tmp_path):
    limit = csv.field_size_limit()
    file = write(tmp_path / "a.csv", "epoch,note,nc/nc1", f"0,{'x' * 300_000},0.5")
    assert read_run(file) == [{"epoch": 0, "nc/nc1": 0.5}]
    assert csv.field_size_limit() == limit


def test_columns_that_mark_a_row_are_read_and_all_columns_of_a_history(tmp_path):
    marks, lines = (
        {"stage": "train", "epoch": 0, "step": 6, "weights": "swapped", "partial": True},
        ["train,0,6,swapped,True"],
    )
    foreign = write(tmp_path / "a.csv", "lr,stage,epoch,step,weights,partial,nc/nc1", f"0.1,{lines[0]},0.5")
    assert read_run(foreign) == [{**marks, "nc/nc1": 0.5}]
    own = write(tmp_path / "b.csv", "stage,epoch,step,weights,partial,nc/nc1,loss", f"{lines[0]},0.5,0.1")
    assert read_run(own) == [{**marks, "nc/nc1": 0.5, "loss": 0.1}]
    assert [type(value) for value in read_run(own)[0].values()] == [str, int, int, str, bool, float, float]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger, WandbLogger])
def test_losses_and_accuracies_of_a_logger_stand_in_the_row_of_their_epoch(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True) if kind is WandbLogger else kind(tmp_path)
    for epoch in range(3):
        step = 10 * epoch
        logger.log_metrics({"epoch": epoch, "train_loss_step": 9.0, "lr": 0.1}, step=step)
        logger.log_metrics({"epoch": epoch, "val_loss": 2.0 + epoch}, step=step + 1)
        logger.log_metrics({"epoch": epoch, "nc/nc1": 0.5, "train_loss": 1.0, "train_acc": 0.75}, step=step + 2)
    logger.finalize("success")
    if kind is WandbLogger:
        logger.experiment.finish()
        import wandb

        wandb.teardown()  # waits until the file is closed
    expected = {"nc/nc1": 0.5, "train_loss": 1.0, "train_acc": 0.75}
    rows = [{key: value for key, value in row.items() if key != "step"} for row in read_run(tmp_path)]
    assert rows == [{**expected, "epoch": epoch, "val_loss": 2.0 + epoch} for epoch in range(3)]


def test_the_table_of_the_ufm_example_is_read_over_iterations_by_level_and_by_seed(tmp_path):
    file = write(
        tmp_path / "figure4.csv", "seed,iteration,objective,nc1,nc1_h1,nc2_of_pre", "0,100,0.5,1,2,3", "1,100,0.4,4,5,6"
    )
    rows = read_run(file)
    assert rows == [
        {"seed": 0, "iteration": 100, "epoch": 100, "objective": 0.5, "nc1": 1.0, "h1/nc1": 2.0, "pre/nc2_of": 3.0},
        {"seed": 1, "iteration": 100, "epoch": 100, "objective": 0.4, "nc1": 4.0, "h1/nc1": 5.0, "pre/nc2_of": 6.0},
    ]
    assert split_seeds("f", rows) == [("f, seed 0", rows[:1]), ("f, seed 1", rows[1:])]
    assert split_seeds("f", rows[:1]) == [("f", rows[:1])]


def test_no_row_is_lost_to_a_seed_that_is_no_number():
    rows = [{"seed": math.nan, "nc1": 0.5}, {"seed": 1, "nc1": 0.4}, {"seed": math.nan, "nc1": 0.3}]
    runs = split_seeds("a", rows)
    assert [(label, [row["nc1"] for row in found]) for label, found in runs] == [
        ("a, seed nan", [0.5, 0.3]),
        ("a, seed 1", [0.4]),
    ]


def test_a_whole_number_that_is_too_large_for_a_float_is_infinite(tmp_path):
    file = write(tmp_path / "a.csv", "epoch,loss,nc/nc1", f"0,{'9' * 400},0.5")
    (row,) = read_run(file)
    assert row["loss"] == math.inf


def test_standard_errors_are_read_after_their_metric(tmp_path):
    keys = ["nc/nc1_cdnv", "nc/nc1_cdnv_stderr", "nc/nc2_equiangular", "nc/nc2_equiangular_stderr"]
    file = write(tmp_path / "a.csv", ",".join(["epoch", *sorted(keys, reverse=True)]), "0,4,3,2,1")
    (row,) = read_run(file)
    assert list(row)[:4] == keys
    (row,) = read_run(write(tmp_path / "a.csv", "epoch,layer3/nc1_cdnv_stderr", "0,1"))
    assert row == {"layer3/nc1_cdnv_stderr": 1.0, "epoch": 0}


def test_names_of_layers_with_other_separators_do_not_change_the_separator(tmp_path):
    assert read_run(write(tmp_path / "a.csv", "epoch,nc/a;b;c/nc1", "0,0.5")) == [{"epoch": 0, "nc/a;b;c/nc1": 0.5}]


def test_a_last_row_that_is_half_written_is_left_out(tmp_path):
    file = tmp_path / "metrics.csv"
    for rest in ("1", "half", "1,0.2"):
        file.write_text(f"epoch,nc/nc1,nc/nc3\n0,0.5,0.6\n{rest}")
        assert read_run(file) == [{"epoch": 0, "nc/nc1": 0.5, "nc/nc3": 0.6}]
    file.write_text("epoch,nc/nc1,nc/nc3\n0,0.5,0.6\n1,0.2,0.3")  # cut from 0.375
    with pytest.warns(UserWarning, match="the last row of .* has no line end, so it may be cut, and is left out"):
        assert read_run(file) == [{"epoch": 0, "nc/nc1": 0.5, "nc/nc3": 0.6}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["epoch,nc/nc1", "inf,1.0"], "row 2: epoch must be a finite number, got 'inf'"),
        (["epoch,nc/nc1", "0,1.0", "nan,1.0"], "row 3: epoch must be a finite number, got 'nan'"),
        (["epoch,nc/nc1", "1e308,1.0"], r"row 2: epoch must be below 2\*\*63, got '1e308'"),
        (["epoch,nc/nc1", ",1.0"], "row 2: .*needs an 'epoch'"),
        (["epoch,nc/nc1", "first,1.0"], "row 2: epoch must be a number, got 'first'"),
        (["epoch,nc/nc1", "0,large"], "row 2: nc/nc1 must be a number, got 'large'"),
        (["epoch;nc/nc1", "0;0,5"], "row 2: nc/nc1 must be a number, got '0,5'"),
        (["epoch,nc/nc1", "0,0,5"], "row 2 has 3 cells, but the header has 2"),
        (["epoch,nc/nc1", "0", "1,1.0"], "row 2 has 1 cells, but the header has 2"),
        (["epoch,nc/nc1,nc/nc1", "0,1.0,2.0"], r"several columns named \['nc/nc1'\]"),
        (["epoch,epoch,nc/nc1", "0,1,2.0"], r"several columns named \['epoch'\]"),
        (["epoch,loss", "0,1.0"], r"needs a column 'epoch' and a metric.*found the columns \['epoch', 'loss'\]"),
        (["step,nc/nc1", "0,1.0"], r"needs a column 'epoch' and a metric.*found the columns \['step', 'nc/nc1'\]"),
        (["epoch,nc/nc1"], "holds no values of metrics"),
        (["epoch,nc/nc1", "0,"], "holds no values of metrics"),
    ],
)
def test_a_csv_file_that_cannot_be_read_as_a_run_is_refused_with_its_name_and_what_was_found(tmp_path, lines, message):
    file = write(tmp_path / "a.csv", *lines)
    with pytest.raises(ValueError, match=message) as caught:
        read_run(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\0\0", "not a CSV file in UTF-8"),
        ("a.csv", "epoch,nc/nc1\n0,1\n".encode("utf-16"), "not a CSV file in UTF-8"),
        ("a.csv", "epoch,größe,nc/nc1\n0,1,1\n".encode("latin-1"), "not a CSV file in UTF-8"),
        ("a.csv", bytes(range(32)), "needs a column 'epoch'|not a CSV file"),
        ("events.out.tfevents.1", b"\0" * 100, "holds no values|is damaged"),
        ("events.out.tfevents.1", bytes(range(256)) * 4, "holds no values|is damaged"),
        ("run-a.wandb", bytes(7) + b"\0\0\0\0\x08\0\x01" + b"\xff" * 8, "is damaged"),
        ("run-a.wandb", b"", "holds no values"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_run(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_path_without_a_log_is_refused_with_the_names_of_logs(tmp_path):
    (tmp_path / "notes.txt").write_text("epoch,nc/nc1\n0,1\n")
    (tmp_path / "metrics.csv").mkdir()
    for path in (tmp_path, tmp_path / "none", tmp_path / "notes.txt", tmp_path / "metrics.csv"):
        with pytest.raises(FileNotFoundError, match=r"metrics\.csv, events\.out\.tfevents\*, run-\*\.wandb"):
            read_run(path)


def test_metrics_are_known_by_their_name_or_by_the_prefix():
    assert all(map(is_metric, ("nc1", "layer3/nc2_of", "val/nc1", "bias_collapse", "nc/anything", "nc/val/x/y")))
    assert not any(map(is_metric, ("epoch", "partial", "weights", "train_loss", "nc1/loss", "")))


def test_an_epoch_is_an_int_where_it_is_whole():
    assert [epoch_of({"epoch": value}) for value in (2, 2.0, "2", 2.5)] == [2, 2, 2, 2.5]
