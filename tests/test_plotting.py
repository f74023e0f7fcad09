"""Figures: what is drawn, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import History, measure
from lightning_nc.functional import METRICS
from lightning_nc.plotting import plot_gram, plot_history, plot_overlay, plot_runs

PREFIXES = {"train": "nc/", "validate": "nc/val/", "test": "nc/test/"}


def history(layers=("layer1/", "layer2/", ""), stages=("train",), metrics=("nc1", "nc2_of", "nc3")):
    """Five epochs of values that halve with every epoch, layer and metric."""
    return [
        {
            "stage": stage,
            "epoch": epoch,
            "step": epoch,
            **{
                f"{PREFIXES[stage]}{layer}{metric}": 0.5 ** (epoch + i + j)
                for i, layer in enumerate(layers)
                for j, metric in enumerate(metrics)
            },
        }
        for epoch in range(5)
        for stage in stages
    ]


def points(axis):
    """(x, y) of every curve of a panel, by label and line style."""
    return {
        (line.get_label(), line.get_linestyle()): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axis.lines
    }


def texts_beside(figure):
    """The texts of the legends and of the color bar's ticks."""
    (part,) = figure.subfigs
    figure.draw_without_rendering()
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    legends = [text.get_text() for legend in part.legends for text in legend.get_texts()]
    return legends, [text.get_text() for bar in bars for text in bar.get_yticklabels()]


def test_layers_go_from_light_to_dark_and_the_classifiers_input_comes_last():
    figure = plot_history(history(("", "layer1/", "layer2/")))
    assert [axis.get_title().split(",")[0] for axis in figure.axes] == ["NC1", "NC2", "NC3"]
    names = ["layer1", "layer2", "classifier input"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines) == names
    brightness = [sum(lines[name].get_color()[:3]) for name in names]
    assert brightness == sorted(brightness, reverse=True)
    assert list(lines["layer2"].get_ydata()) == [0.5 ** (epoch + 2) for epoch in range(5)]
    assert texts_beside(figure) == (names, [])


def test_the_legend_names_only_what_was_measured():
    assert texts_beside(plot_history(history(("layer1/", "layer2/"))))[0] == ["layer1", "layer2"]
    assert texts_beside(plot_history(history(("",))))[0] == []
    both = plot_history(history(("train/",), ("train", "validate")))
    assert texts_beside(both)[0] == ["train", "train", "validate"]  # a layer and a stage of the same name


def test_titles_say_what_is_drawn():
    metrics = ("nc1", "nc2_etf_centered", "nc2_etf", "nc2_of", "nc3", "nc3_centered", "bias_collapse")
    assert [axis.get_title() for axis in plot_history(history(metrics=metrics)).axes] == [
        "NC1, within-class variability",
        "NC2, class means to ETF",
        "NC2, centered means to ETF",
        "NC2, class means to OF",
        "NC3, weight to class means",
        "NC3, weight to centered means",
        "bias against global mean",
    ]


def test_two_hundred_layers_get_a_color_bar_beside_panels_of_full_width():
    layers = [f"layer{index}/" for index in range(200)]
    figure = plot_history(history([*layers, ""], ("train", "validate")))
    legends, bar = texts_beside(figure)
    assert legends == ["train", "validate"]
    assert bar == ["layer0", "layer40", "layer80", "layer120", "layer160", "classifier input"]
    for axis in figure.axes[:3]:
        assert axis.get_legend() is None
        assert len(axis.lines) == 402
        assert axis.get_window_extent().width > 0.15 * figure.bbox.width


def test_the_color_bar_has_the_colors_of_the_curves():
    figure = plot_history(history([f"layer{index}/" for index in range(40)]))
    (bar,) = (axis for axis in figure.axes if axis.get_label() == "<colorbar>")
    mesh = next(part for part in bar.collections if part.get_array() is not None)
    drawn = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    for index in (0, 17, 39):
        assert mesh.cmap(mesh.norm(index)) == pytest.approx(drawn[f"layer{index}"])
    assert bar.yaxis_inverted()  # the first layer at the top, as in a legend


@pytest.mark.parametrize("count", [3, 60])
def test_long_names_of_layers_are_wrapped_and_leave_room_for_the_panels(count):
    names = [f"model.backbone.transformer.encoder.blocks.{i}.attention.projection.output_layer" for i in range(count)]
    figure = plot_history(history([f"{name}/" for name in names]))
    legends, bar = texts_beside(figure)
    shown = legends or bar
    assert {text.replace("\n", "") for text in shown} <= set(names)
    assert shown[0].replace("\n", "") == names[0]
    assert max(len(line) for text in shown for line in text.splitlines()) <= 36
    for axis in figure.axes[:3]:
        assert axis.get_window_extent().width > 0.15 * figure.bbox.width


def test_dollar_signs_and_leading_underscores_in_names_are_shown_as_they_are():
    # As a formula, \frac without arguments cannot be drawn; a label that starts with _ is left out of a legend.
    figure = plot_runs({r"$\frac$/a": history((r"$\frac$/", "_fc/")), "b": history(("_fc/",))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    part = figure.subfigs[0]
    texts = [part.get_suptitle(), *(text.get_text() for text in part.legends[0].get_texts())]
    assert [text.replace(r"\$", "$").strip() for text in texts] == [r"$\frac$/a", r"$\frac$", "_fc"]


def test_stages_differ_by_style_and_metrics_without_layers_share_the_panel_of_their_family():
    rows = history(("",), ("train", "validate"), ("nc1", "nc2_of", "nc2_etf", "bias_collapse"))
    figure = plot_history(rows)
    assert [len(axis.lines) for axis in figure.axes] == [2, 4, 2]
    assert [axis.get_title() for axis in figure.axes] == [
        "NC1, within-class variability",
        "NC2, class means to frame",
        "bias against global mean",
    ]
    assert [(line.get_label(), line.get_linestyle()) for line in figure.axes[1].lines] == [
        ("nc2_of", "-"),
        ("nc2_etf", "-"),
        ("_nc2_of", "--"),
        ("_nc2_etf", "--"),
    ]
    assert texts_beside(figure)[0] == ["train", "validate"]


def test_keys_as_measure_returns_them_are_drawn_under_the_stage_of_their_row():
    rows = [
        {"epoch": epoch, "stage": stage, "nc1": value + epoch, "layer3/nc1": 2 * value + epoch}
        for epoch in range(3)
        for stage, value in (("train", 1.0), ("test", 10.0))
    ]
    figure = plot_history(rows)
    drawn = points(figure.axes[0])
    assert drawn["layer3", "-"] == [(0, 2.0), (1, 3.0), (2, 4.0)]
    assert drawn["classifier input", "-"] == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert [drawn[key] for key in drawn if key[1] != "-"] == [
        [(0, 20.0), (1, 21.0), (2, 22.0)],
        [(0, 10.0), (1, 11.0), (2, 12.0)],
    ]
    assert texts_beside(figure)[0] == ["layer3", "classifier input", "train", "test"]


def test_the_stage_of_a_row_holds_for_keys_with_the_prefix_too_and_is_train_by_default():
    rows = [{"epoch": e, "nc/nc1": 1.0} for e in range(3)] + [{"epoch": 2, "stage": "test", "nc/nc1": 5.0}]
    train, test = plot_history(rows).axes[0].lines
    assert list(train.get_ydata()) == [1.0, 1.0, 1.0]
    assert (list(test.get_xdata()), list(test.get_ydata())) == ([2], [5.0])


def test_rows_in_any_order_are_drawn_by_epoch():
    rows = history()
    figure = plot_history([rows[index] for index in (3, 0, 4, 2, 1)])
    assert [points(axis) for axis in figure.axes] == [points(axis) for axis in plot_history(rows).axes]


def test_standard_errors_are_no_curves():
    rows = [{**row, "nc/nc1_stderr": 0.1, "nc/val/layer1/nc2_of_stderr": 0.1} for row in history(("",))]
    assert [points(axis) for axis in plot_history(rows).axes] == [
        points(axis) for axis in plot_history(history(("",))).axes
    ]
    with pytest.raises(ValueError, match="nothing to plot in 1 rows"):
        plot_history([{"epoch": 0, "nc1_cdnv_stderr": 0.1}])


def test_entries_of_a_row_that_are_no_metrics_are_ignored():
    rows = [{**row, "partial": True, "weights": "averaged", "note": None, "lr": 1.0} for row in history(("",))]
    assert [points(axis) for axis in plot_history(rows).axes] == [
        points(axis) for axis in plot_history(history(("",))).axes
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to plot in 0 rows: needs 'epoch' and a metric"),
        ([{"epoch": 0, "loss": 1.0}], r"nothing to plot in 1 rows.*found \['epoch', 'loss'\]"),
        ([{"nc1": 1.0, "step": 3}], r"needs an 'epoch', got only \['nc1', 'step'\]"),
        ([{"epoch": math.nan, "nc1": 1.0}], "epoch must be a finite number, got nan"),
        ([{"epoch": math.inf, "nc1": 1.0}], "epoch must be a finite number, got inf"),
        ([{"epoch": None, "nc1": 1.0}], "epoch must be a number, got None"),
        ([{"epoch": 0, "nc1": "large"}], "nc1 must be a number, got 'large'"),
        ([{"epoch": 0, "stage": "val", "nc1": 1.0}], "stage must be one of train, validate, test, got 'val'"),
        ([{"epoch": 0, "nc1": 1.0, "nc/nc1": 2.0}], "a row has a metric twice"),
        ({"epoch": 0, "nc1": 1.0}, "history must hold rows such as .* got 'epoch'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_was_found(rows, message):
    with pytest.raises(ValueError, match=message):
        plot_history(rows)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="runs is empty"):
        plot_runs({})


def test_dataloaders_of_a_stage_differ():
    rows = [{"epoch": 0, "stage": "validate", "nc/val/nc1": 1.0, "nc/val_1/nc1": 2.0}]
    figure = plot_history(rows)
    first, second = figure.axes[0].lines
    assert first._dash_pattern != second._dash_pattern
    assert texts_beside(figure)[0] == ["validate", "validate_1"]


def test_zeros_and_holes_are_visible_on_a_log_axis():
    rows = [{"stage": "train", "epoch": e, "nc/nc1": v} for e, v in enumerate([1.0, 0.0, math.nan, 1e-3])]
    figure = plot_runs({"a": rows, "b": [{**row, "nc/nc1": row["nc/nc1"] * 1e-9} for row in rows]})
    line, zeros = figure.axes[0].lines
    assert zeros.get_marker() == "v"
    assert list(zeros.get_xdata()) == [1]
    edge = zeros.get_transform().transform((1, zeros.get_ydata()[0]))[1]
    assert edge == pytest.approx(figure.axes[0].transData.transform((1, figure.axes[0].get_ylim()[0]))[1])
    assert np.isnan(line.get_ydata()[[1, 2]]).all()
    assert line.get_markevery() == [0, 3]  # without a neighbor, no line would show them
    assert texts_beside(plot_history(rows))[0] == ["exactly 0"]
    assert not plot_history([rows[0]]).legends
    nothing = plot_history([{"stage": "train", "epoch": e, "nc/nc1": math.nan} for e in range(3)])
    assert [text.get_text() for text in nothing.axes[0].texts] == ["nc1 · smaller is closer", "no finite value"]


def test_an_objective_is_drawn_in_a_first_panel_over_the_epochs_of_the_training_data():
    rows = history(("",), ("train", "validate"))
    figure = plot_history(rows, objective={"loss": [5.0, 4.0, 3.0, 2.0, 1.0]})
    assert figure.axes[0].get_title() == "Loss"
    assert points(figure.axes[0])["loss", "-"] == list(enumerate([5.0, 4.0, 3.0, 2.0, 1.0]))
    assert figure.axes[1].get_title() == "NC1, within-class variability"


def test_loss_and_accuracy_of_the_rows_share_a_panel_with_two_axes():
    rows = [{**row, "loss": 2.0 ** -row["epoch"], "accuracy": 0.5 + 0.1 * row["epoch"]} for row in history(("",))]
    for row in rows:
        row["val_loss"] = 3.0
    figure = plot_history(rows)
    (left, right) = (axis for axis in figure.axes if axis.get_ylabel() in ("loss", "accuracy"))
    assert (left.get_ylabel(), left.get_yscale()) == ("loss", "log")
    assert (right.get_ylabel(), right.get_yscale()) == ("accuracy", "linear")
    assert left.get_title() == "Loss and accuracy"
    train, val = left.lines
    assert list(train.get_ydata()) == [1.0, 0.5, 0.25, 0.125, 0.0625]
    assert (list(val.get_ydata()), val.get_linestyle()) == ([3.0] * 5, "--")
    twice = plot_history([{"epoch": 0, "nc1": 1.0, "train_loss": 2.0, "loss": 3.0, "eval_loss": 4.0, "val_loss": 5.0}])
    assert sorted(line.get_ydata()[0] for line in twice.axes[0].lines) == [2.0, 3.0, 4.0, 5.0]
    assert right.lines[0].get_ydata() == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["loss", "accuracy (right)"]
    assert texts_beside(figure)[0] == ["train", "validate"]
    assert len(plot_history(rows, metrics="nc1").axes) == 1  # only what was named


def test_the_right_axes_of_runs_have_the_same_limits_too():
    runs = {
        name: [{**row, "loss": 1.0, "acc": high} for row in history(("",))] for name, high in (("a", 0.5), ("b", 1.0))
    }
    first, second = (axis for axis in plot_runs(runs).axes if axis.get_ylabel() == "accuracy")
    assert first.get_ylim() == second.get_ylim()


def test_the_value_at_a_frame_of_the_other_kind_is_marked_and_explained_in_the_legend():
    figure = plot_history(history(("", "layer1/"), metrics=("nc1", "nc2_of")), num_classes=4)
    level = next(line for line in figure.axes[1].lines if line.get_linestyle() == "-.").get_ydata()[0]
    assert level == pytest.approx(0.5176380902)  # Tirer & Bruna's four classes: nc2_of at an exact simplex ETF
    assert texts_beside(figure)[0][-1] == "nc2_of of an exact ETF"
    assert all(line.get_linestyle() == "-" for line in figure.axes[0].lines)


def test_a_frame_of_the_other_kind_that_would_squash_the_curves_is_left_out():
    rows = [{"epoch": epoch, "nc2_of": 1e-3 * 0.9**epoch} for epoch in range(5)]
    figure = plot_history(rows, num_classes=4)
    assert len(figure.axes[0].lines) == 1
    assert texts_beside(figure)[0] == []


def test_a_panel_says_which_metric_it_shows_and_which_values_are_closer():
    names = ("nc2_etf_centered", "stable_rank", "gnc2_margin", "minority_cosine")
    rows = [{"epoch": epoch, "layer1/nc1": 1.0, **dict.fromkeys(names, 2.0)} for epoch in range(3)]
    told = {axis.texts[0].get_text().replace("\n", " · ") for axis in plot_history(rows, num_classes=10).axes}
    assert told == {
        "nc1 · smaller is closer",
        "nc2_etf_centered · smaller is closer",
        "stable_rank · approaches 9",
        "gnc2_margin · larger is closer, 1.11 at collapse",
        "minority_cosine · smaller is closer, -0.111 at collapse",
    }
    family = plot_history([{"epoch": epoch, "nc3": 1.0, "nc3_gram": 2.0} for epoch in range(3)]).axes[0]
    assert family.texts[0].get_text() == "smaller is closer"
    assert [text.get_text() for text in family.get_legend().get_texts()] == ["nc3", "nc3_gram"]


def labels(axis):
    """The labels of the y axis within its limits."""
    axis.get_figure(root=True).draw_without_rendering()
    low, high = axis.get_ylim()
    return [
        text.get_text() for text, at in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True) if low <= at <= high
    ]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.13, 0.58, ["0.15", "0.2", "0.3", "0.5"]),
        (0.15, 1.0, ["0.15", "0.2", "0.3", "0.5", "0.7", "1"]),
        (0.62, 0.98, ["0.6", "0.8", "1"]),
        (0.02, 2.0, ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]),
        (200, 300, ["200", "220", "240", "250", "260", "280", "300"]),
    ],
)
def test_log_axes_of_few_decades_have_several_plain_labels(low, high, expected):
    found = labels(plot_history([{"epoch": 0, "nc1": low}, {"epoch": 1, "nc1": high}]).axes[0])
    assert len(found) >= 3
    assert set(found) <= set(expected)


def test_the_lowest_label_of_a_log_axis_below_a_decade_is_near_its_lower_end():
    for high in np.geomspace(0.3, 2, 12):
        axis = plot_history([{"epoch": 0, "nc1": high}, {"epoch": 1, "nc1": 0.21}]).axes[0]
        assert float(labels(axis)[0]) < 1.6 * 0.21


def test_a_change_of_a_few_percent_does_not_fill_a_log_axis_whatever_is_drawn_after_it():
    rows = [{"epoch": epoch, "nc1": 1 + 0.01 * epoch, "nc1_permuted": 1.02} for epoch in range(5)]
    for axis in (plot_history(rows).axes[0], plot_overlay([("a", rows), ("b", rows)]).axes[0]):
        low, high = axis.get_ylim()
        assert high / low == pytest.approx(2)
        assert low < 1 < 1.04 < high
    low, high = plot_history([{"epoch": epoch, "nc1": 10.0**epoch} for epoch in range(2)]).axes[0].get_ylim()
    assert (low, high) == pytest.approx((10**-0.05, 10**1.05))  # margins of 5%, as ever


def test_numbers_of_layers_have_whole_ticks():
    rows = [
        {"epoch": e, "a/ncc_error": 0.1, "ncc_error": 0.1, "effective_depth": d} for e, d in enumerate([1.0, 3.0, 2.0])
    ]
    axis = next(axis for axis in plot_history(rows).axes if axis.get_title() == "effective depth")
    assert all(tick == round(tick) for tick in axis.get_yticks())


def test_log_axes_of_many_decades_have_powers_of_ten_at_their_places():
    axis = plot_history([{"epoch": 0, "nc1": 1e-8}, {"epoch": 1, "nc1": 10.0}]).axes[0]
    found = labels(axis)
    assert len(found) >= 4
    for text, at in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True):
        assert text.get_text() == rf"$\mathdefault{{10^{{{round(math.log10(at))}}}}}$"
    small = labels(plot_history([{"epoch": 0, "nc1": 2e-7}, {"epoch": 1, "nc1": 8e-7}]).axes[0])
    assert r"$\mathdefault{3\times10^{-7}}$" in small


def test_layers_with_the_same_numbers_are_one_curve_with_both_names():
    rows = history(("layer3/", "layer4/", ""))
    for row in rows:
        row.update({key.replace("layer4/", ""): value for key, value in row.items() if "layer4" in key})
    figure = plot_history(rows)
    assert [line.get_label() for line in figure.axes[0].lines] == ["layer3", "layer4 = classifier input"]
    assert texts_beside(figure)[0] == ["layer3", "layer4 = classifier input"]
    rows[2]["nc/layer4/nc1"] *= 1.001  # in one metric of one epoch
    assert len(plot_history(rows).axes[0].lines) == 3


def test_metrics_with_the_same_numbers_are_one_curve_with_both_names():
    rows = [
        {"epoch": epoch, "nc2_etf": 0.5**epoch, "nc2_etf_centered": 0.5**epoch, "nc2_of": 1.0} for epoch in range(3)
    ]
    (axis,) = plot_history(rows).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["nc2_etf = nc2_etf_centered", "nc2_of"]
    assert len(axis.lines) == 2


def test_values_by_chance_are_explained_in_the_legend():
    rows = [{**row, "nc/nc1_permuted": 5.0} for row in history(("",))]
    figure = plot_history(rows)
    assert texts_beside(figure)[0] == ["chance"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines][1] == [5.0] * 5


def test_legends_hide_no_curve():
    rows = [
        {**row, "loss": 1.0, "accuracy": 0.5} for row in history(("",), ("train", "test"), ("nc1", "nc3", "nc3_gram"))
    ]
    figure = plot_history(rows)
    figure.draw_without_rendering()
    panels = [axis.get_window_extent() for axis in figure.axes]
    (part,) = figure.subfigs
    for legend in [*part.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]:
        box = legend.get_window_extent()
        assert not any(box.overlaps(panel) for panel in panels)


def test_text_is_at_least_seven_points_and_no_figure_is_wider_than_twelve_inches():
    layers = [f"backbone.stage{index}/" for index in range(30)]
    for figure in (plot_history(history([*layers, ""], ("train", "test"))), plot_history(history(), metrics="all")):
        figure.draw_without_rendering()
        assert figure.get_figwidth() <= 12
        assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 7


@pytest.fixture(scope="module")
def measured():
    """A history with what a measurement keeps beside the metrics that were asked for."""
    features = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(features, torch.tensor([0, 1, 1, 2, 2, 2]).repeat(10)), batch_size=30)
    rows = History()
    for epoch in range(2):
        rows.append(measure(torch.nn.Linear(12, 3), loader, metrics=("nc1", "nc3"), progress=False), epoch=epoch)
    return rows


def test_distances_to_frames_that_nobody_asked_for_have_no_panel(measured, tmp_path):
    assert {"nc/nc2_of", "nc/nc2_seli"} <= measured[0].keys()
    copy = History(tmp_path / "nc.csv")
    for row in measured:
        copy.append({key: value for key, value in row.items() if key not in ("stage", "epoch")}, epoch=row["epoch"])
    expected = ["NC1, within-class variability", "NC3, weight to class means"]
    for rows in (measured, History.read(copy.path)):
        assert [axis.get_title() for axis in plot_history(rows).axes] == expected
        assert [axis.get_title() for axis in plot_history(rows, metrics="nc2_seli").axes] == [
            "NC2, centered means to SELI"
        ]


def test_the_heading_names_the_nearest_frame_of_the_last_epoch_or_none():
    rows = [{"epoch": epoch, "nc1": 1.0, "geometry": "nc2_of", "nc2_of": 0.25} for epoch in range(3)]
    (part,) = plot_history(rows).subfigs
    assert part.get_suptitle() == "nearest frame at the end: orthogonal frame (nc2_of 0.25)"
    rows[-1]["geometry"] = "none"
    (part,) = plot_history(rows).subfigs
    assert part.get_suptitle() == ""


def test_more_metrics_than_fit_are_counted_and_those_that_are_named_are_drawn():
    every = [name for name in METRICS if name not in ("nc5", "nc2_orthoplex", "gnc2_margin")]
    rows = [{"epoch": epoch, "layer1/nc1": 2.0, **dict.fromkeys(every, 1.0 + epoch)} for epoch in range(2)]
    figure = plot_history(rows)
    assert len(figure.axes) == 6  # those of the paper
    assert figure.subfigs[0].get_suptitle().startswith(f"{len(every) - 6} more metrics were measured")
    assert len(plot_history(rows, metrics="all").axes) == len(every)
    assert [axis.get_title() for axis in plot_history(rows, metrics=["nc3", "nc1"]).axes] == [
        "NC1, within-class variability",
        "NC3, weight to class means",
    ]
    with pytest.raises(
        ValueError, match=r"no metric 'nc3_center' was measured; did you mean 'nc3_centered'.*nc1_trace"
    ):
        plot_history(rows, metrics="nc3_center")


def test_runs_are_drawn_one_below_the_other_with_the_same_limits():
    other = [{**row, "nc/nc1": row["nc/nc1"] / 1000} for row in history(("",))]
    figure = plot_runs({"a": history(("",)), "b": other})
    assert len(figure.axes) == 6
    assert figure.axes[0].get_ylim() == figure.axes[3].get_ylim()


def test_layers_have_the_same_color_in_runs_that_measured_different_layers():
    figure = plot_runs({"a": history(("layer10/", "")), "b": history(("layer2/", "layer10/", ""))})
    first, second = ({line.get_label(): line.get_color() for line in figure.axes[i].lines} for i in (0, 3))
    assert first["layer10"] == second["layer10"]
    assert sum(second["layer2"][:3]) > sum(second["layer10"][:3]) > sum(second["classifier input"][:3])


def test_a_gram_matrix_shows_all_pairs_of_classes():
    gram = torch.eye(5) * 1.25 - 0.25
    (image,) = plot_gram(gram).axes[0].images
    assert np.allclose(image.get_array(), gram)
    assert image.get_clim() == (-1, 1)
    axis = plot_gram(gram, classes=[1, 2, 3, 5, 8]).axes[0]
    assert [axis.xaxis.get_major_formatter()(at, None) for at in (-1, 0, 3, 4, 5)] == ["", "1", "5", "8", ""]
