"""Values, figures and tables in the real loggers, read back from what they wrote."""

import csv
import math
import time

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from test_callback import StopAfter, fit, loader

from lightning_nc import NeuralCollapseCallback
from lightning_nc.__main__ import main
from lightning_nc.plotting import plot_gram, plot_history, plot_runs, split_key
from lightning_nc.runs import _records, read_run


def train(tmp_path, logger, **arguments):
    callback = NeuralCollapseCallback(layers=["net.0", "net.2"], stages=("train", "validate"), strict=True, **arguments)
    fit(tmp_path, [callback], logger=logger, val=loader(False))
    return callback


def values(rows):
    return sorted(
        (row["epoch"], key, pytest.approx(value, rel=1e-6))
        for row in rows
        for key, value in row.items()
        if "nc/" in key
    )


def is_picture(path):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    yield
    import wandb

    wandb.finish()


def finished(logger, tmp_path):
    """The records of a run that W&B has finished; its service closes the file some time after ``finish`` returns."""
    from wandb.proto.wandb_internal_pb2 import Record

    logger.experiment.finish()
    (file,) = tmp_path.rglob("run-*.wandb")
    for _ in range(600):
        records = [Record.FromString(payload) for payload in _records(file.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} was not closed within a minute")


def test_csv_and_pictures_beside_it_where_the_logger_takes_none(tmp_path):
    callback = train(tmp_path, CSVLogger(tmp_path, name="", version=""))
    assert values(read_run(tmp_path)) == values(callback.history)
    assert is_picture(tmp_path / "neural_collapse.png")
    assert is_picture(tmp_path / "class_means.png")


def test_wandb_gets_scalars_over_epochs_images_and_a_table(tmp_path, offline):
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="nc")
    callback = train(tmp_path, logger)
    summary = dict(logger.experiment.summary)
    assert summary["nc/nc1"] == pytest.approx(
        [row for row in callback.history if row["stage"] == "train"][-1]["nc/nc1"]
    )
    records = finished(logger, tmp_path)
    assert values(read_run(tmp_path)) == values(callback.history)
    pictures = list(tmp_path.rglob("media/images/figures/*.png"))
    assert {picture.name.split("_")[0] for picture in pictures} == {"neural", "class"}
    assert all(is_picture(picture) for picture in pictures)
    (table,) = tmp_path.rglob("media/table/figures/final_values*.table.json")
    assert "nc/val/net.2/nc1" in table.read_text()
    axes = {
        record.metric.glob_name or record.metric.name: record.metric for record in records if record.HasField("metric")
    }
    assert axes["nc/*"].step_metric == "epoch" or axes["nc/*"].step_metric_index


def test_tensorboard_gets_scalars_and_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = train(tmp_path, TensorBoardLogger(tmp_path, name="", version="run"))
    assert values(read_run(tmp_path)) == values(callback.history)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(events.Tags()["images"]) == {"figures/neural_collapse", "figures/class_means"}


def test_a_run_that_is_stopped_early_a_file_that_is_cut_and_other_files_are_read(tmp_path, offline):
    callback = NeuralCollapseCallback(every_n_epochs=3, strict=True)
    loggers = [CSVLogger(tmp_path / "csv", name="", version=""), WandbLogger(save_dir=tmp_path / "wandb", offline=True)]
    fit(tmp_path, [callback, StopAfter()], max_epochs=50, logger=loggers)
    finished(loggers[1], tmp_path)
    assert values(read_run(tmp_path / "csv")) == values(callback.history)
    assert values(read_run(tmp_path / "wandb")) == values(callback.history)
    (tmp_path / "csv" / "predictions.csv").write_text("sample,class\n0,1\n")
    with (tmp_path / "csv" / "metrics.csv").open("a") as file:
        file.write("half")
    assert values(read_run(tmp_path / "csv")) == values(callback.history)
    (file,) = tmp_path.rglob("run-*.wandb")
    for cut in (10, 100, 1000):
        file.write_bytes(file.read_bytes()[:-cut])
        assert values(read_run(file))[:6] == values(callback.history)[:6]


def test_mlflow_gets_scalars_and_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(save_dir=str(tmp_path / "runs"))
    callback = train(tmp_path, logger)
    logged = logger.experiment.get_metric_history(logger.run_id, "nc/nc1")
    assert [entry.value for entry in logged] == [row["nc/nc1"] for row in callback.history if row["stage"] == "train"]
    pictures = list(tmp_path.rglob("*.png"))
    assert {picture.name for picture in pictures} == {"neural_collapse.png", "class_means.png"}
    assert all(is_picture(picture) for picture in pictures)


def test_a_disk_that_is_full_when_a_figure_is_written_warns_and_the_run_stays_whole(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, path, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.warns(UserWarning, match=r"could not be written.*No space left on device; callback\.plot\(\)"):
        callback = train(tmp_path, CSVLogger(tmp_path, name="", version=""))
    assert len(callback.history) == 6
    assert values(read_run(tmp_path)) == values(callback.history)


# ------------------------------------------------------------------------------------------------------- pictures


def history(layers=("", "layer1/", "layer2/"), stages=(("train", ""),), measures=("nc1", "nc2_of", "nc3")):
    return [
        {
            "stage": stage,
            "epoch": epoch,
            "step": epoch,
            **{
                f"nc/{prefix}{layer}{measure}": 0.5 ** (epoch + i + j)
                for i, layer in enumerate(layers)
                for j, measure in enumerate(measures)
            },
        }
        for epoch in range(5)
        for stage, prefix in stages
    ]


def test_layers_are_a_scale_of_colours_from_light_to_dark():
    figure = plot_history(history())
    assert [axis.get_title().split(",")[0] for axis in figure.axes] == ["NC1", "NC2", "NC3"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == ["layer1", "layer2", "features"]
    brightness = [sum(lines[name].get_color()[:3]) for name in ("layer1", "layer2", "features")]
    assert brightness == sorted(brightness, reverse=True)
    assert list(lines["layer2"].get_ydata()) == [0.5 ** (epoch + 2) for epoch in range(5)]


def test_keys_fall_into_stage_layer_and_measure():
    assert split_key("nc/nc1") == ("train", "", "nc1")
    assert split_key("nc/val/net.2/nc1") == ("validate", "net.2", "nc1")
    assert split_key("nc/val_1/nc1") == ("validate_1", "", "nc1")
    assert split_key("nc/test_block/nc1") == ("train", "test_block", "nc1")


def test_stages_differ_by_style_and_measures_without_layers_share_their_familys_panel():
    rows = history(("",), (("train", ""), ("validate", "val/")), ("nc1", "nc2_of", "nc2_etf", "bias_collapse"))
    figure = plot_history(rows)
    assert [len(axis.lines) for axis in figure.axes] == [2, 4, 2]
    assert [axis.get_title() for axis in figure.axes] == [
        "NC1, within-class variability",
        "NC2, class means to frame",
        "bias_collapse",
    ]
    assert [(line.get_label(), line.get_linestyle()) for line in figure.axes[1].lines] == [
        ("nc2_of", "-"),
        ("nc2_etf", "-"),
        ("_nc2_of", "--"),
        ("_nc2_etf", "--"),
    ]
    (legend,) = figure.subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["train", "validate"]


def test_loaders_of_a_stage_differ():
    rows = history(("",), (("validate", "val/"), ("validate", "val_1/")), ("nc1",))
    first, second = plot_history(rows).axes[0].lines
    assert first._dash_pattern != second._dash_pattern


def test_zeros_and_holes_are_seen_on_a_log_axis():
    rows = [{"stage": "train", "epoch": e, "nc/nc1": v} for e, v in enumerate([1.0, 0.0, math.nan, 1e-3])]
    figure = plot_runs({"a": rows, "b": [{**row, "nc/nc1": row["nc/nc1"] * 1e-9} for row in rows]})
    line, zeros = figure.axes[0].lines
    assert zeros.get_marker() == "v"
    assert list(zeros.get_xdata()) == [1]
    edge = zeros.get_transform().transform((1, zeros.get_ydata()[0]))[1]
    assert edge == pytest.approx(figure.axes[0].transData.transform((1, figure.axes[0].get_ylim()[0]))[1])
    assert np.isnan(line.get_ydata()[[1, 2]]).all()
    assert line.get_markevery() == [0, 3]  # without a neighbour, no line would show them
    nothing = plot_history([{"stage": "train", "epoch": e, "nc/nc1": math.nan} for e in range(3)])
    assert [text.get_text() for text in nothing.axes[0].texts] == ["no finite value"]


def test_layers_lie_in_natural_order_whatever_the_order_of_a_file(tmp_path):
    layers = ["layer10", "layer9", "layer1", "layer2"]
    with (tmp_path / "metrics.csv").open("w") as file:
        csv.writer(file).writerows([["epoch", *(f"nc/{layer}/nc1" for layer in layers), "nc/nc1"], [0, 1, 2, 3, 4, 5]])
    figure = plot_history(read_run(tmp_path))
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["layer1", "layer2", "layer9", "layer10", "features"]
    brightness = [sum(line.get_color()[:3]) for line in figure.axes[0].lines]
    assert brightness == sorted(brightness, reverse=True)


def test_callbacks_that_share_a_trainer_share_a_figure(tmp_path):
    both = [NeuralCollapseCallback(), NeuralCollapseCallback(stages=("validate",), metrics=("nc1",))]
    fit(tmp_path, both, logger=CSVLogger(tmp_path, name="", version="both"), val=loader(False))
    alone = NeuralCollapseCallback(stages=("train", "validate"))
    fit(tmp_path, [alone], logger=CSVLogger(tmp_path, name="", version="alone"), val=loader(False))
    sizes = [Image.open(tmp_path / name / "neural_collapse.png").size for name in ("both", "alone")]
    assert sizes[0] == sizes[1]


def test_the_value_at_a_frame_of_the_other_kind_is_marked():
    figure = plot_history(history(("", "layer1/"), measures=("nc1", "nc2_of")), num_classes=4)
    level = next(line for line in figure.axes[1].lines if line.get_linestyle() == "-.").get_ydata()[0]
    assert level == pytest.approx(0.5176380902)  # of Tirer & Bruna's four classes: nc2_of at an exact simplex ETF
    assert [text.get_text() for text in figure.axes[1].texts] == ["exact ETF"]
    assert not figure.axes[0].texts


def test_runs_are_drawn_below_each_other_with_the_same_axes():
    other = [{**row, "nc/nc1": row["nc/nc1"] / 1000} for row in history(("",))]
    figure = plot_runs({"a": history(("",)), "b": other})
    assert len(figure.axes) == 6
    assert figure.axes[0].get_ylim() == figure.axes[3].get_ylim()


def test_a_gram_matrix_shows_all_pairs_of_classes():
    gram = torch.eye(5) * 1.25 - 0.25
    (image,) = plot_gram(gram).axes[0].images
    assert np.allclose(image.get_array(), gram)
    assert image.get_clim() == (-1, 1)
    axis = plot_gram(gram, classes=[1, 2, 3, 5, 8]).axes[0]
    assert [axis.xaxis.get_major_formatter()(at, None) for at in (-1, 0, 3, 4, 5)] == ["", "1", "5", "8", ""]


def test_the_command_draws_runs_and_says_what_is_wrong(tmp_path, capsys):
    for name in ("a", "b"):
        train(tmp_path, CSVLogger(tmp_path / name, name="", version=""))
    out = tmp_path / "both.png"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b" / "metrics.csv"), "-k", "3", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'a' / 'metrics.csv'}: 6 measurements" in said
    assert f"{out}: 2 runs" in said
    assert is_picture(out)
    assert main(["plot", str(tmp_path / "none")]) == 1
    assert "none of metrics.csv, events.out.tfevents*, run-*.wandb" in capsys.readouterr().err
    with (tmp_path / "other.csv").open("w") as file:
        csv.writer(file).writerows([["epoch", "loss"], [0, 1.0]])
    assert main(["plot", str(tmp_path / "other.csv")]) == 1
    assert "no row with an epoch and a key that starts with nc/" in capsys.readouterr().err
    (tmp_path / "run-a.wandb").write_bytes(bytes(7) + b"\0\0\0\0\x08\0\x01" + b"\xff" * 8)
    assert main(["plot", str(tmp_path / "run-a.wandb")]) == 1
    assert "is damaged" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plot", str(tmp_path / "a"), "-k", "1"])
    assert main(["plot", str(tmp_path / "a"), "-o", str(tmp_path / "plain")]) == 0
    assert is_picture(tmp_path / "plain.png")
    assert main(["plot", str(tmp_path / "a"), "-o", str(tmp_path / "a.xyz")]) == 1
