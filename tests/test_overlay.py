"""Several runs in one set of panels: what is drawn, how groups are formed, and what is refused."""

import math
import warnings

import numpy as np
import pytest
from matplotlib.colors import to_hex

from lightning_nc.functional import METRICS
from lightning_nc.plotting import plot_overlay


def run(scale, epochs=range(5), keys=("nc1",), **entries):
    return [{"epoch": epoch, **dict.fromkeys(keys, scale * 0.5**epoch), **entries} for epoch in epochs]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_run_is_a_curve_with_a_color_of_its_own():
    figure = plot_overlay([("a", run(1.0, keys=("nc1", "nc3"))), ("b", run(2.0)), ("c", run(4.0))])
    first, second = figure.axes
    assert [list(line.get_ydata()) for line in first.lines] == [[s * 0.5**e for e in range(5)] for s in (1.0, 2.0, 4.0)]
    assert len({to_hex(line.get_color()) for line in first.lines}) == 3
    assert second.lines[0].get_color() == first.lines[0].get_color()
    assert len(second.lines) == 1
    assert legend(figure) == ["a", "b", "c"]


def test_more_runs_than_distinct_colors_have_colors_of_a_scale():
    figure = plot_overlay([(str(index), run(1.0 + index)) for index in range(20)])
    assert len({to_hex(line.get_color()) for line in figure.axes[0].lines}) == 20


def test_a_group_is_the_median_with_a_band_from_the_smallest_to_the_largest():
    scales = {"sgd-seed0": 1.0, "sgd-seed1": 5.0, "sgd-seed2": 2.0, "adam, seed 7": 8.0}
    figure = plot_overlay([(label, run(scale)) for label, scale in scales.items()], group="")
    sgd, adam = figure.axes[0].lines
    assert sgd.get_ydata() == pytest.approx([2.0 * 0.5**e for e in range(5)])
    assert adam.get_ydata() == pytest.approx([8.0 * 0.5**e for e in range(5)])
    (band,) = figure.axes[0].collections
    for epoch in range(5):
        heights = [y for x, y in band.get_paths()[0].vertices if x == epoch]
        assert (min(heights), max(heights)) == pytest.approx((0.5**epoch, 5 * 0.5**epoch))
    assert legend(figure) == ["sgd (3 runs)", "adam", "line: median of the runs, band: smallest to largest"]


def test_runs_with_equal_labels_or_that_a_pattern_makes_equal_are_a_group():
    runs = [("x1", run(1.0)), ("x2", run(3.0))]
    assert plot_overlay(runs, group=r"\d").axes[0].lines[0].get_ydata()[0] == 2.0
    assert plot_overlay([("x", rows) for _, rows in runs], group="").axes[0].lines[0].get_ydata()[0] == 2.0
    with pytest.raises(ValueError, match="several runs have the label 'x'"):
        plot_overlay([("x", rows) for _, rows in runs])
    with pytest.raises(ValueError, match=r"no two runs have the same label without .*labels: x1, x2"):
        plot_overlay(runs, group="")


def test_a_group_is_drawn_over_the_epochs_that_all_its_runs_have_and_says_so():
    runs = [("a", run(1.0, range(6))), ("a", run(3.0, range(2, 9)))]
    with pytest.warns(UserWarning, match="group 'a'.*at the 4 of 9 epochs"):
        figure = plot_overlay(runs, group="")
    assert list(figure.axes[0].lines[0].get_xdata()) == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="group 'a' have no epoch in common"):
        plot_overlay([("a", run(1.0, [0])), ("a", run(1.0, [1]))], group="")


def test_a_curve_that_one_run_of_a_group_has_says_so():
    runs = [("a", run(1.0)), ("a", run(3.0))]
    runs[0][1][0]["train_loss"] = 0.5
    with pytest.warns(UserWarning, match="group 'a'.* the 1 of 2 runs with values"):
        plot_overlay(runs, group="")


def test_a_value_that_is_nan_in_a_run_of_a_group_is_a_hole():
    runs = [("a", run(1.0)), ("a", run(3.0))]
    runs[1][1][2]["nc1"] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_overlay(runs, group="")
        figure.draw_without_rendering()
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, False, True, False, False]


def test_the_classifiers_input_is_drawn_unless_a_layer_is_named():
    keys = ("nc1", "layer3/nc1", "layer3/nc2_of")
    runs = [("a", run(1.0, keys=keys)), ("b", run(2.0, keys=keys))]
    figure = plot_overlay(runs)
    assert (figure.get_suptitle(), len(figure.axes)) == ("classifier input", 1)
    figure = plot_overlay(runs, layer="layer3")
    assert (figure.get_suptitle(), len(figure.axes)) == ("layer layer3", 2)
    with pytest.raises(ValueError, match="no run has a layer 'layer4'; measured were classifier input, layer3"):
        plot_overlay(runs, layer="layer4")


def test_stages_differ_by_dashes_and_losses_have_panels_of_their_own():
    runs = [
        (name, [{**row, "stage": s} for s in ("train", "test") for row in run(1.0, loss=2.0, acc=0.5)]) for name in "ab"
    ]
    figure = plot_overlay(runs)
    assert [(axis.get_title(), axis.get_yscale()) for axis in figure.axes] == [
        ("loss", "log"),
        ("acc", "linear"),
        ("NC1, within-class variability", "log"),
    ]
    assert [line.get_linestyle() for line in figure.axes[2].lines] == ["-", "--", "-", "--"]  # all dashes read so
    assert legend(figure) == ["a", "b", "train", "test"]
    assert len(plot_overlay(runs, metrics="nc1").axes) == 1


def test_a_loss_that_only_one_of_several_runs_has_is_left_out():
    runs = [("a", run(1.0, loss=2.0, acc=0.5)), ("b", run(2.0, loss=3.0))]
    assert [axis.get_title() for axis in plot_overlay(runs).axes] == ["loss", "NC1, within-class variability"]
    assert len(plot_overlay(runs[:1]).axes) == 3


def test_up_to_eight_panels_stand_in_two_columns():
    every = [name for name, spec in METRICS.items() if not spec.opt_in][:8]
    figure = plot_overlay([(name, run(1.0, keys=every)) for name in "ab"], metrics=every)
    assert {axis.get_subplotspec().get_gridspec().ncols for axis in figure.axes} == {2}
    assert figure.get_figheight() < 14


def test_zeros_are_explained_in_the_legend():
    assert legend(plot_overlay([("a", run(0.0)), ("b", run(1.0))])) == ["a", "b", "exactly 0"]


def test_runs_over_iterations_and_over_epochs_are_refused_together():
    over = [{**row, "iteration": row["epoch"]} for row in run(1.0)]
    assert plot_overlay([("a", over)]).axes[0].get_xlabel() == "iteration"
    with pytest.raises(ValueError, match="some runs count epochs and others iterations"):
        plot_overlay([("a", over), ("b", run(1.0))])
    with pytest.raises(ValueError, match="runs is empty"):
        plot_overlay([])


def test_the_value_at_a_frame_of_the_other_kind_is_marked_where_it_is_near():
    runs = [("a", run(1.0, keys=("nc2_of",))), ("b", run(2.0, keys=("nc2_of",)))]
    figure = plot_overlay(runs, num_classes=4)
    assert figure.axes[0].lines[-1].get_ydata()[0] == pytest.approx(0.5176380902)  # Tirer & Bruna's four classes
    assert legend(figure)[-1] == "nc2_of of an exact ETF"


def test_more_metrics_than_fit_are_counted_in_the_heading():
    every = [name for name, spec in METRICS.items() if not spec.opt_in]
    figure = plot_overlay([(name, run(1.0, keys=every)) for name in "ab"])
    assert len(figure.axes) == 6  # those of the paper
    assert figure.get_suptitle().splitlines()[1].startswith(f"{len(every) - 6} more metrics were measured")
