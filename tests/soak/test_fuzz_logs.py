"""Damaged logs: the rows that were written, or one line that names the file; never another number, half a file or a traceback."""

import csv
import io
import math
import random
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_nc import History
from lightning_nc.__main__ import main
from soak.damage import damaged, damages

ROWS = [
    {
        "epoch": epoch,
        "nc/nc1": 0.5**epoch,
        "nc/nc2_etf": 0.3 + 0.01 * epoch,
        "nc/layer3/nc1": 2.0 * 0.5**epoch,
        "nc/val/nc1": 3.0 * 0.5**epoch,
        "train_loss": 1 / (epoch + 1),
    }
    for epoch in range(40)
]
TRUTH = {(row["epoch"], key): value for row in ROWS for key, value in row.items()}
CHECKSUMS = ("events", "wandb")  # kinds of files in which other bits cannot pass as another number


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Name and bytes of a log of every kind, as its logger wrote it."""
    folder, patch = tmp_path_factory.mktemp("logs"), pytest.MonkeyPatch()
    patch.setenv("WANDB_SILENT", "true")
    offline = WandbLogger(save_dir=folder, offline=True, project="nc")
    for logger in (CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="", version=""), offline):
        for row in ROWS:
            logger.log_metrics(row, step=10 * row["epoch"])
        logger.finalize("success")
    offline.experiment.finish()
    import wandb

    wandb.teardown()
    history = History(folder / "history.csv")
    for row in ROWS:
        values = {key: value for key, value in row.items() if key.startswith("nc/") and "val" not in key}
        history.append(values, epoch=row["epoch"], loss=row["train_loss"])
    patch.undo()
    patterns = {"csv": "metrics.csv", "events": "events*", "wandb": "run-*.wandb", "history": "history.csv"}
    files = {kind: next(folder.rglob(pattern)) for kind, pattern in patterns.items()}
    return {kind: (file.name, file.read_bytes()) for kind, file in files.items()}


def run(*arguments):
    """Exit status and standard error of the command."""
    with redirect_stderr(io.StringIO()) as error, redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main([str(argument) for argument in arguments])
    return status, error.getvalue()


def check_command(file, command, out):
    """The command draws the file, or says in one line with its name why not, and leaves nothing."""
    out.unlink(missing_ok=True)
    before = sorted(out.parent.iterdir())
    status, said = run(command[0], file, *command[1:], "-o", out)
    if status:
        assert str(file) in said
        assert said.count("\n") == 1
        assert sorted(out.parent.iterdir()) == before
    else:
        assert out.stat().st_size > 1000
    return status


def test_a_damaged_log_gives_what_was_written_or_is_refused_by_name(budget, logs, tmp_path):
    def check(drawn):
        kind, steps = drawn
        name, data = logs[kind]
        data = damaged(data, steps)
        budget.tally.add("fuzzed logs", data)
        (tmp_path / name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows = History.read(tmp_path / name)
        except (ValueError, OSError) as error:
            message = str(error)
            assert str(tmp_path / name) in message
            return
        assert rows
        assert all(math.isfinite(row["epoch"]) for row in rows)
        if kind in CHECKSUMS:
            for row in rows:
                for key in (key for key in row if key.startswith("nc/") or key == "train_loss"):
                    assert row[key] == pytest.approx(TRUTH[row["epoch"], key], rel=1e-6)

    budget.check(check, st.tuples(st.sampled_from(["csv", "events", "wandb", "wandb", "history"]), damages()))


COMMANDS = [["plot"], ["plot", "--overlay"], ["plot", "--metrics", "all"], ["report"]]


def test_plot_and_report_of_a_damaged_log_draw_it_or_leave_nothing(budget, logs, tmp_path):
    def check(drawn):
        kind, steps, command = drawn
        name, data = logs[kind]
        budget.tally.add("fuzzed logs", (command, damaged(data, steps)))
        (tmp_path / name).write_bytes(damaged(data, steps))
        check_command(tmp_path / name, command, tmp_path / f"out.{'html' if command == ['report'] else 'png'}")
        (tmp_path / name).unlink()

    few = damages(most=1)  # so that a part of them can be drawn
    budget.check(
        check, st.tuples(st.sampled_from(["csv", "events", "wandb", "history"]), few, st.sampled_from(COMMANDS))
    )


SCRIPT = "<script>alert(1)</script>"
METRICS = [
    "nc/nc1",
    "nc1",
    "nc/val/nc1",
    "nc/val_1/nc1",
    "layer3/nc1",
    "nc/nc2_etf_centered",
    "nc/nc1_cdnv_stderr",
    "nc//nc1",
]
METRICS += [
    "nc/",
    "nc1_h1",
    "nc/unknown",
    "nc/nc1_permuted",
    "nc/effective_depth",
    "nc/layer3/ncc_error",
    "nc/日本/nc1",
]
METRICS += [f"nc/{SCRIPT}/nc1", "nc/$x$/nc1", 'nc/a"b/nc1', "nc/\u202e/nc1", f"nc/{'x' * 300}/nc1"]
OTHERS = [
    "stage",
    "step",
    "iteration",
    "seed",
    "weights",
    "partial",
    "geometry",
    "train_loss",
    "val_acc",
    "",
    "\0",
    SCRIPT,
]
CELLS = [
    "",
    "nan",
    "inf",
    "-inf",
    "0",
    "-0.1",
    "1e308",
    "1e-320",
    "1e999",
    "9" * 400,
    "x",
    "true",
    "train",
    "test",
    SCRIPT,
    "\0",
]


@st.composite
def tables(draw):
    """The text of a CSV file that somebody else wrote."""
    head = draw(st.sampled_from([["epoch"], ["stage", "epoch"], ["epoch", "epoch"], []]))
    head = [*head, *draw(st.lists(st.sampled_from([*METRICS, *METRICS, *OTHERS]), min_size=1, max_size=6))]
    rows, noise = draw(st.sampled_from([0, 1, 2, 5, 12])), random.Random(draw(st.integers(0, 2**32)))
    usual = {"stage": lambda i: "train", "epoch": str, "iteration": str}
    often = draw(st.sampled_from([0, 0.02, 0.3]))  # of strange cells

    def cell(name, i):
        return noise.choice(CELLS) if noise.random() < often else usual.get(name, lambda i: repr(0.5**i))(i)

    text = io.StringIO(newline="")
    writer = csv.writer(
        text, delimiter=draw(st.sampled_from(",,;\t")), lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"]))
    )
    writer.writerows([head, *([cell(name, i) for name in head] for i in range(rows))])
    return text.getvalue().encode(
        draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace"
    )


def test_a_table_of_somebody_else_is_drawn_or_refused_by_name_and_no_name_becomes_a_tag(budget, tmp_path):
    def check(drawn):
        data, command = drawn
        budget.tally.add("fuzzed logs", drawn)
        file, out = tmp_path / "table.csv", tmp_path / f"out.{'html' if command == ['report'] else 'png'}"
        file.write_bytes(data)
        if check_command(file, command, out) == 0 and command == ["report"]:
            assert SCRIPT not in out.read_text(encoding="utf-8")

    budget.check(check, st.tuples(tables(), st.sampled_from(COMMANDS)))
