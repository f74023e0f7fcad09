"""Pictures of the classes themselves, and their animation."""

import os
import sys
from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import is_picture
from matplotlib.colors import to_rgb
from mpl_toolkits.mplot3d.proj3d import proj_transform
from PIL import Image
from scene_cases import collapsing

from lightning_nc.plotting import animate, plot_geometry
from lightning_nc.scenes import posed


def drawn(axis, dimensions):
    """The coordinates of each set of markers of a panel: the samples of each class, then the class means."""
    read = lambda line: line.get_data_3d() if dimensions == 3 else line.get_data()  # noqa: E731
    return [np.stack(read(line), axis=1) for line in axis.lines if line.get_marker() == "o"]


def test_the_first_middle_and_last_epoch_stand_beside_exact_collapse():
    scenes = collapsing(5)
    figure = plot_geometry(scenes)
    assert [axis.get_title() for axis in figure.axes] == ["epoch 0", "epoch 2", "epoch 4", "exact collapse"]
    for axis, scene in zip(figure.axes, [posed(scenes)[place] for place in (0, 2, 4)], strict=False):
        markers = drawn(axis, 2)
        for points, expected in zip(markers[:3], scene.samples, strict=True):
            np.testing.assert_allclose(points, np.array(expected)[:, :2])
        np.testing.assert_allclose(np.concatenate(markers[3:]), np.array(scene.means)[:, :2])
        arrows = [arrow for arrow in axis.collections if hasattr(arrow, "U")]
        tips = [(*arrow.U, *arrow.V) for arrow in arrows]
        np.testing.assert_allclose(tips, np.array(scene.weight)[:, :2])
    assert len({axis.get_xlim() + axis.get_ylim() for axis in figure.axes}) == 1
    assert all(axis.get_aspect() == 1 for axis in figure.axes)


def test_exact_collapse_is_a_triangle_with_every_sample_at_its_corner():
    axis = plot_geometry(collapsing(3)).axes[-1]
    markers = drawn(axis, 2)
    corners = np.concatenate(markers[3:])
    np.testing.assert_allclose(np.concatenate(markers[:3]), corners)
    np.testing.assert_allclose(corners @ corners.T, 1.5 * np.eye(3) - 0.5, atol=1e-12)
    edges = [line for line in axis.lines if line.get_marker() != "o"]
    assert {tuple(np.round(end, 6)) for edge in edges for end in edge.get_xydata()} == {
        tuple(np.round(corner, 6)) for corner in corners
    }


def test_one_measurement_is_one_panel_beside_exact_collapse():
    assert [axis.get_title() for axis in plot_geometry(collapsing(1)).axes] == ["epoch 0", "exact collapse"]


@pytest.mark.parametrize(("chosen", "dimensions"), [((5, 2), 1), ((5, 2, 0), 2), ((5, 2, 0, 1), 3)])
def test_two_to_four_classes_are_drawn_by_their_names(chosen, dimensions, tmp_path):
    figure = plot_geometry(collapsing(3, chosen=chosen))
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts[: len(chosen)]] == list(map(str, chosen))
        assert len(drawn(axis, dimensions)) == 2 * len(chosen)
    figure.savefig(tmp_path / "geometry.png")
    assert is_picture(tmp_path / "geometry.png")


def test_space_fills_its_panels_and_nothing_is_cut_off():
    figure = plot_geometry(collapsing(3, chosen=(5, 2, 0, 1)))
    figure.draw_without_rendering()
    widest = []
    for axis in figure.axes:
        labels = [text.get_position_3d() for text in axis.texts]
        points = np.concatenate([*drawn(axis, 3), labels])
        seen = axis.transData.transform(np.stack(proj_transform(*points.T, axis.get_proj())[:2], axis=1))
        assert (seen > axis.bbox.min).all()
        assert (seen < axis.bbox.max).all()
        widest.append((np.ptp(seen, axis=0) / axis.bbox.size).max())
    assert max(widest) > 0.8


def test_the_samples_of_two_classes_are_spread_across_the_line_and_keep_their_place_along_it():
    scenes = collapsing(2, chosen=(0, 1))
    markers = drawn(plot_geometry(scenes).axes[0], 1)
    for points, expected in zip(markers[:2], posed(scenes)[0].samples, strict=True):
        np.testing.assert_allclose(points[:, 0], np.array(expected)[:, 0])
        assert len(set(points[:, 1])) == len(points)


def test_samples_that_are_far_out_are_left_out_and_counted():
    (scene,) = posed(collapsing(1))
    scene.samples[1][3] = [40.0, 0.0, 0.0]
    axis = plot_geometry([scene]).axes[0]
    assert list(map(len, drawn(axis, 2)[:3])) == [12, 11, 12]
    assert abs(np.array([axis.get_xlim(), axis.get_ylim()])).max() < 6
    notes = [
        text.get_text()
        for panel in axis.figure.axes
        for text in axis.figure.texts
        if text.get_transform() == panel.transAxes
    ]
    assert [note for note in notes if note] == ["1 of 36 samples are farther out"]


def test_without_a_weight_there_are_no_arrows():
    (scene,) = collapsing(1)
    scene.weight.clear()
    figure = plot_geometry([scene])
    assert not any(axis.collections for axis in figure.axes)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["samples", "class mean", "ideal simplex"]


@pytest.mark.parametrize("scenes", [[], collapsing(2, chosen=())])
def test_without_samples_the_error_names_the_argument(scenes, tmp_path):
    for draw in (plot_geometry, lambda found: animate(found, tmp_path / "a.gif")):
        with pytest.raises(ValueError, match=r"geometry=\(0, 1, 2\)"):
            draw(scenes)


def frames(path):
    with Image.open(path) as image:
        for place in range(image.n_frames):
            image.seek(place)
            yield np.asarray(image.convert("RGB")), image.info["duration"], image.info["loop"]


def area_of_cloud(image, color):
    """The number of pixels in the color of samples of a class, which half of the white shows through."""
    return (abs(image - 127.5 * (1 + np.array(to_rgb(color)))).max(axis=2) < 20).sum()


def test_a_gif_shows_all_of_the_training_and_stays_at_its_end(tmp_path):
    path = animate([collapsing(4)[place] for place in (0, 3)], tmp_path / "new" / "collapse.GIF")
    assert path == tmp_path / "new" / "collapse.GIF"
    assert [file.name for file in path.parent.iterdir()] == ["collapse.GIF"]
    images, durations, loops = zip(*frames(path), strict=True)
    assert images[0].shape == (480, 480, 3)
    assert len(images) == 21
    assert sum(durations) == 20 * 50 + 1000
    assert durations[-1] == 1000
    assert set(loops) == {0}  # for ever
    for color in ("#0072B2", "#D55E00", "#009E73"):
        assert area_of_cloud(images[-1], color) < 0.5 * area_of_cloud(images[0], color)


@pytest.mark.parametrize(("epochs", "count"), [(1, 1), (4, 61), (61, 181), (181, 181), (182, 181), (500, 181)])
@pytest.mark.slow
def test_there_are_at_most_ten_seconds_of_frames(epochs, count, tmp_path):
    scenes = [replace(scene, epoch=epoch) for scene in collapsing(1, chosen=(0, 1)) for epoch in range(epochs)]
    durations = [duration for _, duration, _ in frames(animate(scenes, tmp_path / "a.gif"))]
    assert sum(durations) == (count - 1) * 50 + 1000


@pytest.mark.parametrize("chosen", [(0, 1), (0, 1, 2, 3)])
def test_an_mp4_has_the_frames_and_a_second_more(chosen, tmp_path):
    path = animate(collapsing(2, chosen=chosen), str(tmp_path / "collapse.mp4"))
    count, seconds = imageio_ffmpeg.count_frames_and_secs(path)
    assert (count, seconds) == (20 + 20, pytest.approx(2, abs=0.01))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["collapse.png", "collapse", "gif"])
def test_another_suffix_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"must end in \.gif or \.mp4, got .*{name}"):
        animate(collapsing(2), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_ffmpeg_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImportError, match=r"lightning-neural-collapse\[report\]"):
        animate(collapsing(2), tmp_path / "collapse.mp4")


def test_a_failure_of_ffmpeg_raises_its_message_and_leaves_the_old_file(tmp_path, monkeypatch):
    tool, old = tmp_path / "bin" / "ffmpeg", tmp_path / "collapse.mp4"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho out of space >&2\nexit 3\n")
    tool.chmod(0o755)
    old.write_text("old")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="out of space"):
        animate(collapsing(2), old)
    assert old.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"bin", "collapse.mp4"}
