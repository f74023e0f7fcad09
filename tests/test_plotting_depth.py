"""Metrics against depth: what is drawn, and what is refused."""

import math

import numpy as np
import pytest
from conftest import is_picture

from lightning_nc.plotting import has_depth, plot_depth


def history(epochs=3, layers=("conv/", "layer2/", "layer10/", ""), metrics=("nc1", "nc2_of"), prefix="nc/", **entries):
    """Values that fall by a factor of ten with every layer and of two with every epoch; the classifier's input has nc3."""
    return [
        {
            "epoch": 5 * epoch,
            **entries,
            f"{prefix}nc3": 0.1,
            **{
                f"{prefix}{layer}{metric}": 10.0**-depth / 2**epoch
                for depth, layer in enumerate(layers)
                for metric in metrics
            },
        }
        for epoch in range(epochs)
    ]


def panels(figure):
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def metric_of(axis):
    """The key on a panel: the last line above it."""
    return [*axis.get_title().splitlines(), *(text.get_text() for text in axis.texts)][-1]


def curves(axis):
    return [np.array(line.get_xydata()) for line in axis.lines if line.get_linestyle() == "-"]


def names(axis):
    return [text.get_text() for text in axis.get_xticklabels()]


def test_every_metric_has_a_panel_with_a_curve_for_each_epoch_over_the_layers():
    figure = plot_depth(history())
    found = panels(figure)
    assert [metric_of(axis) for axis in found] == ["nc1", "nc2_of"]
    for axis in found:
        assert names(axis) == ["conv", "layer2", "layer10", "classifier input"]
        assert axis.get_yscale() == "log"
        for epoch, curve in enumerate(curves(axis)):
            np.testing.assert_allclose(curve, [(depth, 10.0**-depth / 2**epoch) for depth in range(4)])


def test_the_classifiers_input_comes_last_whatever_the_order_of_the_rows():
    figure = plot_depth(history(layers=("", "layer2/", "layer10/")))
    assert names(panels(figure)[0]) == ["layer2", "layer10", "classifier input"]
    np.testing.assert_allclose(curves(panels(figure)[0])[0], [(0, 0.1), (1, 0.01), (2, 1)])


def test_epochs_go_from_light_to_dark_and_the_color_bar_names_them():
    figure = plot_depth(list(reversed(history(4))))
    (bar,) = (axis for axis in figure.axes if axis.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "epoch"
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0", "5", "10", "15"]
    colors = [line.get_color() for line in panels(figure)[0].lines]
    assert [sum(color[:3]) for color in colors] == sorted((sum(color[:3]) for color in colors), reverse=True)
    np.testing.assert_allclose([curve[0, 1] for curve in curves(panels(figure)[0])], [1, 0.5, 0.25, 0.125])
    mesh = next(part for part in bar.collections if part.get_array() is not None)
    for place, color in enumerate(colors):
        assert mesh.cmap(mesh.norm(place)) == pytest.approx(color)


def test_one_epoch_is_named_above_the_figure_and_many_have_thin_curves(tmp_path):
    figure = plot_depth(history(1))
    assert figure.get_suptitle() == "epoch 0"
    few, many = plot_depth(history(12)), plot_depth(history(40))
    assert len(curves(panels(many)[0])) == 40
    assert panels(many)[0].lines[0].get_linewidth() < panels(few)[0].lines[0].get_linewidth()
    many.savefig(tmp_path / "depth.png")
    assert is_picture(tmp_path / "depth.png")


def test_the_effective_depth_of_the_last_epoch_is_marked_and_explained():
    rows = history(metrics=("nc1", "ncc_error"))
    for row, depth in zip(rows, (4.0, 3.0, math.nan), strict=True):
        row["nc/effective_depth"] = depth
    figure = plot_depth(rows)
    for axis in panels(figure):
        (line,) = (line for line in axis.lines if line.get_linestyle() == "--")
        assert set(line.get_xdata()) == {2}
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == "effective depth in epoch 5: layer10"
    assert not plot_depth(history()).legends


def test_layers_with_the_same_numbers_stand_at_one_place_and_the_mark_of_the_depth_moves_with_it():
    rows = history(layers=("a/", "b/", "c/", ""), metrics=("ncc_error",))
    for row in rows:
        row["nc/b/ncc_error"] = row["nc/a/ncc_error"]
        row["nc/ncc_error"] = row["nc/c/ncc_error"]
        row["nc/effective_depth"] = 3.0
    figure = plot_depth(rows)
    (axis,) = panels(figure)
    assert names(axis) == ["a =\nb", "c =\nclassifier input"]
    np.testing.assert_allclose(curves(axis)[0], [(0, 1), (1, 0.01)])
    (line,) = (line for line in axis.lines if line.get_linestyle() == "--")
    assert set(line.get_xdata()) == {1}
    assert figure.legends[0].get_texts()[0].get_text() == "effective depth in epoch 10: c"
    rows[1]["nc/b/ncc_error"] *= 1.01  # in one epoch only
    assert names(panels(plot_depth(rows))[0]) == ["a", "b", "c =\nclassifier input"]


def test_an_effective_depth_that_does_not_fit_the_order_of_the_layers_is_not_marked():
    rows = history(1, layers=("layer2/", "layer10/", "stem/", ""), metrics=("ncc_error",))
    rows[0] |= {"nc/stem/ncc_error": 0.9, "nc/layer2/ncc_error": 0.0, "nc/effective_depth": 2.0}
    assert [text.get_text() for text in plot_depth(rows).legends[0].get_texts()] == ["exactly 0"]


def test_training_data_are_drawn_or_else_the_first_dataloader_of_the_first_stage():
    held_out = history(prefix="nc/val/", stage="validate", metrics=("nc1",))
    held_out += history(prefix="nc/val_1/", stage="validate", metrics=("nc2_of",))
    figure = plot_depth(held_out + history(metrics=("nc1_trace",)))
    assert metric_of(panels(figure)[0]) == "nc1_trace"
    (axis,) = panels(plot_depth(held_out))
    assert metric_of(axis) == "nc1"
    assert len(curves(axis)) == 3


def test_keys_as_measure_returns_them_are_of_the_stage_of_their_row():
    rows = history(prefix="", stage="test") + history(1, prefix="", metrics=("nc1_trace",))
    assert [metric_of(axis) for axis in panels(plot_depth(rows))] == ["nc1_trace"]


def test_errors_and_chance_are_no_metrics_of_their_own():
    rows = history(metrics=("nc1_cdnv", "nc1_cdnv_stderr", "nc1_permuted", "nc2_etf_random"))
    assert len(panels(plot_depth(rows))) == 1


def test_zeros_stand_at_the_lower_edge_and_what_is_not_a_number_is_left_out():
    rows = history(1)
    rows[0] |= {"nc/layer2/nc1": 0.0, "nc/conv/nc1": math.nan}
    axis = panels(plot_depth(rows))[0]
    (zero,) = (line for line in axis.lines if line.get_marker() == "v")
    assert zero.get_xdata().tolist() == [1]
    np.testing.assert_allclose(curves(axis)[0][:, 1], [math.nan, math.nan, 0.01, 0.001])


def test_a_metric_that_some_layers_lack_is_drawn_where_it_is():
    rows = history()
    for row in rows:
        del row["nc/layer2/nc1"]
    np.testing.assert_allclose(curves(panels(plot_depth(rows))[0])[0], [(0, 1), (2, 0.01), (3, 0.001)])


def test_some_of_many_layers_are_named_the_last_among_them():
    figure = plot_depth(history(2, layers=[*(f"encoder.blocks.{index}.mlp/" for index in range(48)), ""]))
    shown = names(panels(figure)[0])
    assert len(shown) <= 17
    assert (shown[0], shown[-1]) == ("encoder.blocks.0.mlp", "classifier input")
    figure.draw_without_rendering()


@pytest.mark.parametrize("rows", [[], history(layers=("",)), history(layers=("layer2/",))])
def test_without_two_depths_the_error_names_the_argument(rows):
    with pytest.raises(ValueError, match="pass layers="):
        plot_depth(rows)
    assert not has_depth(rows)


def test_two_layers_are_depths():
    assert has_depth(history(layers=("a/", "b/")))
    assert has_depth(history(layers=("a/", "")))
