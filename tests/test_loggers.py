"""Figures and a table of the final values in the real loggers."""

import json

import pytest
import torch
from conftest import StopAfter, fit, is_picture, loader
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image

from lightning_nc import History, NeuralCollapseCallback
from lightning_nc.loggers import publish_figures, publish_scene
from lightning_nc.measuring.classes import MeasuredClasses
from lightning_nc.moments import ClassMoments
from lightning_nc.runs import read_run
from lightning_nc.scenes import scene

ROWS = [
    {"stage": stage, "epoch": epoch, "step": 10 * epoch, f"{prefix}nc1": 0.5**epoch, f"{prefix}net.2/nc1": 0.8**epoch}
    for epoch in range(4)
    for stage, prefix in (("train", "nc/"), ("validate", "nc/val/"))
]


def classes(means):
    moments = ClassMoments.zeros(*means.shape, scatter=False)
    moments.update(
        means.repeat(2, 1) + 0.1 * torch.randn(2 * len(means), means.shape[1]).to(means),
        torch.arange(len(means)).repeat(2),
    )
    return MeasuredClasses(moments, torch.randn(means.shape).double())


def history(means):
    """Rows of layers and stages, and the classes that they are about."""
    kept = History(rows=ROWS)
    kept.classes = classes(means)
    kept.scenes = [scene(kept.classes, row["epoch"], row["step"], "train") for row in ROWS[::2]]
    return kept


HISTORY = history(torch.eye(4, 6, dtype=torch.float64))
FIGURES = {"neural_collapse", "class_means", "classes", "depth"}


def values(rows):
    return sorted((row["epoch"], key, pytest.approx(row[key], rel=1e-6)) for row in rows for key in row if "nc/" in key)


@pytest.fixture
def wandb_logger(monkeypatch, tmp_path):
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    yield WandbLogger(save_dir=tmp_path, offline=True, project="nc")
    wandb.finish()


def test_a_logger_that_takes_no_pictures_gets_files_in_its_directory(tmp_path):
    publish_figures([CSVLogger(tmp_path, name="", version="")], [HISTORY])
    assert {file.stem for file in tmp_path.glob("*.png")} == FIGURES
    assert all(map(is_picture, tmp_path.glob("*.png")))


def test_wandb_gets_images_and_a_table_of_the_last_value_of_every_key(tmp_path, wandb_logger):
    publish_figures([wandb_logger], [HISTORY])
    pictures = list(tmp_path.rglob("media/images/figures/*.png"))
    assert {picture.name.rsplit("_", 2)[0] for picture in pictures} == FIGURES
    assert all(is_picture(picture) for picture in pictures)
    (table,) = tmp_path.rglob("media/table/figures/final_values*.table.json")
    final = json.loads(table.read_text())
    assert final["columns"] == ["metric", "value"]
    last = {"nc/nc1": 0.125, "nc/net.2/nc1": 0.512, "nc/val/nc1": 0.125, "nc/val/net.2/nc1": 0.512}
    assert dict(final["data"]) == pytest.approx(last)


def test_tensorboard_gets_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    publish_figures([logger], [HISTORY])
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(events.Tags()["images"]) == {f"figures/{name}" for name in FIGURES}
    assert [event.step for event in events.Images("figures/neural_collapse")] == [30]


def test_mlflow_gets_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    publish_figures([MLFlowLogger(save_dir=str(tmp_path / "runs"))], [HISTORY])
    pictures = list(tmp_path.rglob("*.png"))
    assert {picture.name for picture in pictures} == {f"{name}.png" for name in FIGURES}
    assert all(is_picture(picture) for picture in pictures)


def test_what_is_not_known_or_too_large_is_left_out(tmp_path):
    few = {"neural_collapse", "depth"}
    for kept, expected in ((History(rows=ROWS), few), (history(torch.randn(1001, 2).double()), {*few, "class_means"})):
        publish_figures([CSVLogger(tmp_path / str(len(expected)), name="", version="")], [kept])
        assert {file.stem for file in (tmp_path / str(len(expected))).iterdir()} == expected


def test_the_cosines_of_more_classes_than_the_scenes_hold_are_drawn_once_more(tmp_path):
    publish_figures([CSVLogger(tmp_path, name="", version="")], [history(torch.randn(40, 50).double())])
    assert {file.stem for file in tmp_path.glob("*.png")} == {*FIGURES, "all_class_means"}


def test_the_callback_gives_every_logger_the_values_and_the_figures(tmp_path, wandb_logger):
    loggers = [
        CSVLogger(tmp_path / "csv", name="", version=""),
        TensorBoardLogger(tmp_path / "tb", name=""),
        wandb_logger,
    ]
    callback = NeuralCollapseCallback(
        layers=["net.0", "net.2"], stages=("train", "validate"), every_n_epochs=3, strict=True
    )
    fit(tmp_path, [callback, StopAfter()], max_epochs=50, logger=loggers, val=loader(False))
    summary = dict(wandb_logger.experiment.summary)
    assert summary["nc/nc1"] == pytest.approx([row for row in callback.history if "nc/nc1" in row][-1]["nc/nc1"])
    wandb_logger.experiment.finish()
    import wandb

    wandb.teardown()  # waits until the file is closed
    for place in (tmp_path / "csv", tmp_path / "tb", *tmp_path.rglob("offline-run-*")):
        assert values(read_run(place)) == values(callback.history)
    assert is_picture(tmp_path / "csv" / "neural_collapse.png")


def test_wandb_shows_the_metrics_over_epochs(tmp_path, wandb_logger, monkeypatch):
    axes = {}
    monkeypatch.setattr(
        type(wandb_logger.experiment), "define_metric", lambda self, name, **kw: axes.update({name: kw})
    )
    fit(tmp_path, [NeuralCollapseCallback()], max_epochs=1, logger=wandb_logger)
    assert axes["nc/*"]["step_metric"] == "epoch"


def test_a_full_disk_warns_and_the_run_is_complete(tmp_path, monkeypatch):
    def full(self, path, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    callback = NeuralCollapseCallback(strict=True)
    message = r"could not be written.*No space left on device: '.*neural_collapse\.png'; callback\.plot\(\)"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, [callback], logger=CSVLogger(tmp_path, name="", version=""))
    assert len(callback.history) == 3
    assert values(read_run(tmp_path)) == values(callback.history)


def test_a_logger_whose_server_is_gone_warns_and_the_next_gets_its_pictures(tmp_path):
    class Gone(TensorBoardLogger):
        @property
        def experiment(self):
            raise RuntimeError("the server is gone")

    logger = TensorBoardLogger(tmp_path, name="", version="")
    with pytest.warns(UserWarning, match="could not be written: the server is gone"):
        publish_scene([Gone(tmp_path), logger], HISTORY.scenes[-1])
    assert any(tmp_path.glob("events*"))


def test_callbacks_of_one_trainer_share_a_figure(tmp_path):
    both = [NeuralCollapseCallback(), NeuralCollapseCallback(stages=("validate",), metrics=("nc1",))]
    fit(tmp_path, both, logger=CSVLogger(tmp_path, name="", version="both"), val=loader(False))
    alone = NeuralCollapseCallback(stages=("train", "validate"))
    fit(tmp_path, [alone], logger=CSVLogger(tmp_path, name="", version="alone"), val=loader(False))
    sizes = [Image.open(tmp_path / name / "neural_collapse.png").size for name in ("both", "alone")]
    assert sizes[0] == sizes[1]
