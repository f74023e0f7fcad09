"""Figures of the classes: their table, the cosines of their means, and these over time."""

import math

import numpy as np
import pytest
import torch
from conftest import clusters, is_picture
from scene_cases import collapsing, measured

from lightning_nc.plotting import plot_classes, plot_frames
from lightning_nc.scenes import scene

COLUMNS = ["nearest_cdnv", "nc1_trace_share", "mean_norm", "weight_cosine", "samples"]


def found(classes=6, weight=True, noise=0.5):
    """A table and a scene of random classes."""
    features, target = clusters(classes, 8, classes + 3, noise, dtype=torch.float64)
    rows = torch.randn(classes, classes + 3, dtype=torch.float64) if weight else None
    kept = measured(features, target, classes, rows)
    return kept.table, scene(kept, 7, 70, "train")


def columns(figure):
    return {axis.get_xlabel(): axis for axis in figure.axes if axis.get_xlabel() in COLUMNS}


def histogram(figure):
    return next((axis for axis in figure.axes if axis.get_title().startswith("cosines")), None)


def test_a_row_is_a_class_and_the_least_separated_stand_at_the_top():
    table, last = found()
    figure = plot_classes(table, [last])
    order = sorted(range(6), key=lambda row: -table["nearest_cdnv"][row])
    drawn = columns(figure)
    assert list(drawn) == COLUMNS
    for name, axis in drawn.items():
        np.testing.assert_allclose(axis.lines[0].get_xdata(), [table[name][row] for row in order])
        assert axis.lines[0].get_ydata().tolist() == list(range(6))
        low, high = axis.get_ylim()
        assert low > high  # the first row at the top
    names = [f"{table['class'][row]} → {table['nearest'][row]}" for row in order]
    assert [text.get_text() for text in drawn["nearest_cdnv"].get_yticklabels()] == names
    assert figure.get_suptitle() == "all 6 classes, the least separated at the top"


def test_lines_mark_what_collapse_gives_and_the_mean_over_all_classes():
    table, last = found(30)
    lines = {name: axis.lines[1].get_xdata()[0] for name, axis in columns(plot_classes(table, [last])).items()}
    assert (lines["nearest_cdnv"], lines["weight_cosine"]) == (0, 1)
    assert lines["nc1_trace_share"] == pytest.approx(1 / 30)
    assert lines["mean_norm"] == pytest.approx(np.mean(table["mean_norm"]))
    assert lines["samples"] == 8


def test_of_many_classes_twenty_are_drawn():
    table, last = found(50)
    figure = plot_classes(table, [last])
    shown = columns(figure)["nearest_cdnv"].lines[0].get_xdata()
    np.testing.assert_allclose(shown, sorted(table["nearest_cdnv"], reverse=True)[:20])
    assert figure.get_suptitle().startswith("20 of 50 classes")
    assert histogram(figure).get_title().endswith("epoch 7, first 32 of 50 classes")


def test_the_histogram_counts_every_pair_of_classes_once_beside_the_value_of_a_simplex():
    table, last = found()
    axis = histogram(plot_classes(table, [last]))
    pairs = [last.cosines[i][j] for i in range(6) for j in range(i)]
    edges = [bar.get_x() for bar in axis.patches] + [axis.patches[-1].get_x() + axis.patches[-1].get_width()]
    assert [bar.get_height() for bar in axis.patches] == np.histogram(pairs, edges)[0].tolist()
    assert sum(bar.get_height() for bar in axis.patches) == 15
    assert axis.lines[0].get_xdata()[0] == pytest.approx(-1 / 5)


def test_without_a_weight_its_column_is_left_out():
    table, last = found(weight=False)
    assert list(columns(plot_classes(table, [last]))) == [name for name in COLUMNS if name != "weight_cosine"]


def test_the_table_and_the_histogram_are_drawn_alone_if_the_other_is_missing():
    table, last = found()
    assert histogram(plot_classes(table, [])) is None
    figure = plot_classes({}, [last])
    assert columns(figure) == {}
    figure.draw_without_rendering()


def test_what_is_not_a_finite_number_is_written(tmp_path):
    features, target = clusters(3, 8, 4, 0.5)
    features[0] = math.nan
    kept = measured(features, target, 3)
    figure = plot_classes(kept.table, [scene(kept, 0, 0, "train")])
    assert [text.get_text() for text in columns(figure)["mean_norm"].texts] == ["nan"] * 3
    assert [text.get_text() for text in histogram(figure).texts] == ["no finite value"]
    figure.savefig(tmp_path / "classes.png")
    assert is_picture(tmp_path / "classes.png")


@pytest.mark.parametrize("classes", [1, 2])
def test_one_class_and_two_are_drawn(classes):
    kept = measured(torch.randn(8, 3), torch.arange(8) % classes, classes)
    scenes = [scene(kept, 0, 0, "train")]
    for figure in (plot_classes(kept.table, scenes), plot_frames(scenes)):
        figure.draw_without_rendering()


def test_heat_maps_show_the_cosines_of_the_first_middle_and_last_epoch_on_one_scale(tmp_path):
    scenes = collapsing(6)
    figure = plot_frames(scenes)
    axes = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in axes] == ["epoch 0", "epoch 3", "epoch 5"]
    for axis, expected in zip(axes, (scenes[0], scenes[3], scenes[5]), strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), expected.cosines)
        largest = max(
            abs(scene.cosines[i][j]) for scene in (scenes[0], scenes[3], scenes[5]) for i in range(6) for j in range(i)
        )
        assert axis.images[0].get_clim() == pytest.approx((-largest, largest))
        diagonal = axis.images[0].to_rgba(np.eye(6), norm=True)[0, 0]
        assert diagonal.tolist() == [0, 0, 0, 1]
        assert [text.get_text() for text in axis.get_xticklabels()] == list("012345")
    assert figure.get_suptitle() == "cosines of the centered class means, 1 on the diagonal (black)"
    figure.savefig(tmp_path / "frames.png")
    assert is_picture(tmp_path / "frames.png")


def test_the_color_bar_marks_the_value_of_a_simplex():
    figure = plot_frames(collapsing(2))
    (bar,) = (axis for axis in figure.axes if axis.get_label() == "<colorbar>")
    assert bar.lines[-1].get_ydata()[0] == pytest.approx(-1 / 5)
    (mark,) = bar.child_axes
    assert [text.get_text() for text in mark.get_yticklabels()] == ["ideal\n−0.2"]


def test_pictures_of_one_epoch_each_have_the_same_scale_and_so_can_be_compared():
    for one in collapsing(2):
        assert plot_frames([one]).axes[0].images[0].get_clim() == (-1, 1)


def test_of_many_classes_the_title_says_how_many_are_drawn():
    _, last = found(40)
    figure = plot_frames([last])
    assert figure.get_suptitle() == "cosines of the centered class means\nfirst 32 of 40 classes"
    assert figure.axes[0].images[0].get_array().shape == (32, 32)


@pytest.mark.parametrize("draw", [lambda: plot_classes({}, []), lambda: plot_frames([])])
def test_without_a_measurement_the_error_says_what_to_do(draw):
    with pytest.raises(ValueError, match="train with the callback, or append what measure"):
        draw()
