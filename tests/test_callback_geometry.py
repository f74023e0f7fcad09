"""The scenes of a run: which samples are kept, their coordinates, checkpoints, and what the loggers get."""

import pytest
import torch
from conftest import Classifier, fit, loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Subset

from lightning_nc import NeuralCollapseCallback, extract_features
from lightning_nc.history import History
from lightning_nc.scenes import pictured


def products(rows, others):
    return torch.tensor(rows, dtype=torch.float64) @ torch.tensor(others, dtype=torch.float64).T


def test_coordinates_have_the_inner_products_of_the_features_with_the_class_means(tmp_path):
    callback = NeuralCollapseCallback(geometry=(0, 2, 1), strict=True)
    _, module = fit(tmp_path, [callback], max_epochs=2)
    found, target = extract_features(module, loader(False), progress=False)
    features = found["classifier input"]
    scene = callback.history.scenes[-1]
    assert [scene.chosen, scene.epoch, scene.stage] == [[0, 2, 1], 1, "train"]
    rows = [features[target == label].double() for label in scene.chosen]
    means = torch.stack([of_class.mean(dim=0) for of_class in rows])
    centered = means - means.mean(dim=0)
    for kept, of_class in zip(scene.samples, rows, strict=True):
        expected = (of_class[:40] - means.mean(dim=0)) @ centered.T
        torch.testing.assert_close(products(kept, scene.means), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products(scene.means, scene.means), centered @ centered.T, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_has_the_scenes_of_the_whole_run(tmp_path):
    first = NeuralCollapseCallback(geometry=(0, 1), strict=True)
    fit(tmp_path, [first, ModelCheckpoint(tmp_path, filename="first")], max_epochs=2)
    file = tmp_path / "first.ckpt"
    states = torch.load(file, weights_only=True)["callbacks"]
    (state,) = (state for key, state in states.items() if key.startswith("NeuralCollapseCallback"))
    assert History.from_state(state).scenes == first.history.scenes
    assert History.from_state(state).per_class == first.per_class
    second = NeuralCollapseCallback(geometry=(0, 1), strict=True)
    fit(tmp_path, [second], max_epochs=3, ckpt_path=file)
    assert second.history.scenes[:2] == first.history.scenes
    assert [scene.epoch for scene in second.history.scenes] == [0, 1, 2]
    assert second.history.about == first.history.about
    assert first.history.about["classifier"] == "net.4"


def test_scenes_of_training_data_come_first(tmp_path):
    callback = NeuralCollapseCallback(stages=("train", "validate"), geometry=(0, 1))
    fit(tmp_path, [callback], max_epochs=2, val=loader(False))
    assert [scene.epoch for scene in pictured(callback.history.scenes)] == [0, 1]
    assert {scene.stage for scene in pictured(callback.history.scenes)} == {"train"}
    held_out = NeuralCollapseCallback(stages=("validate",), geometry=(0, 1))
    fit(tmp_path, [held_out], max_epochs=2, val=loader(False))
    assert [scene.stage for scene in pictured(held_out.history.scenes)] == ["validate", "validate"]


def test_the_classes_of_held_out_data_are_those_of_the_first_dataloader(tmp_path):
    class TwoLoaders(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    callback = NeuralCollapseCallback(stages=("validate",), geometry=(0, 1), strict=True)
    data = loader(False).dataset
    half = DataLoader(Subset(data, range(len(data) // 2)), batch_size=8)
    fit(tmp_path, [callback], model=TwoLoaders(), max_epochs=2, val=[loader(False), half])
    assert sum(callback.per_class["samples"]) == len(data)
    assert [scene.epoch for scene in callback.history.scenes] == [0, 1]


def test_a_class_without_samples_is_said_once_and_everything_else_is_measured(tmp_path):
    callback = NeuralCollapseCallback(geometry=(0, 99))
    with pytest.warns(
        UserWarning, match=r"geometry=\(0, 99\): no picture is kept, because class 99 has no sample"
    ) as said:
        fit(tmp_path, [callback], max_epochs=2)
    assert sum("no picture is kept" in str(warning.message) for warning in said) == 1
    assert [scene.chosen for scene in callback.history.scenes] == [[], []]
    assert len(callback.history) == 2


def test_a_class_whose_samples_are_ignored_has_no_picture(tmp_path):
    callback = NeuralCollapseCallback(geometry=(0, 1), ignore_index=1)
    with pytest.warns(
        UserWarning, match="no picture is kept, because class 1 has no sample in the data, or is ignored"
    ):
        fit(tmp_path, [callback], max_epochs=1)
    assert [scene.chosen for scene in callback.history.scenes] == [[]]


class WithoutClassifier(Classifier):
    """Its last layer is not a module, so no classifier is found."""

    def __init__(self):
        super().__init__()
        self.net, self.rows = self.net[:4], torch.nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return self.net(x) @ self.rows.T


def test_geometry_of_a_model_without_a_classifier_is_said_once_and_training_goes_on(tmp_path):
    callback = NeuralCollapseCallback(["net.2"], num_classes=3, metrics="nc1", geometry=(0, 1))
    with pytest.warns(UserWarning, match="the input of a classifier was not measured") as said:
        fit(tmp_path, [callback], model=WithoutClassifier(), max_epochs=2)
    assert sum("was not measured" in str(warning.message) for warning in said) == 1
    assert [row["epoch"] for row in callback.history] == [0, 1]
    assert not callback.history.scenes


@pytest.mark.parametrize("geometry", [(0,), (0, 1, 2, 3, 4), (0, 0), (0, -1), ("a", "b"), 3, "01", (0, 1.5)])
def test_what_is_not_two_to_four_classes_is_refused(geometry):
    with pytest.raises(MisconfigurationException, match="geometry must be two to four different class indices"):
        NeuralCollapseCallback(geometry=geometry)


def test_running_loops_keep_no_scenes_of_training():
    with pytest.raises(MisconfigurationException, match="which only mode='exact' can"):
        NeuralCollapseCallback(geometry=(0, 1), mode="online")


def test_a_logger_gets_the_pictures_of_every_measured_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(tmp_path, [NeuralCollapseCallback(geometry=(0, 1, 2), strict=True)], max_epochs=3, logger=logger)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    steps = [event.step for event in events.Images("figures/geometry_by_epoch")]
    assert len(steps) == len(set(steps)) == 3
    assert [event.step for event in events.Images("figures/class_means_by_epoch")] == steps
