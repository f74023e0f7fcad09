"""What only a GPU can show: no waiting for the device inside a step, and the same numbers and trainings there."""

import pytest
import torch
from conftest import Classifier, clusters, loader
from lightning.pytorch import Trainer, seed_everything

from lightning_nc import NeuralCollapse, NeuralCollapseCallback, measure

ONLINE = {"mode": "online"}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def no_waiting():
    """A function from which on waiting for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_an_update_does_not_wait_for_the_device(no_waiting):
    metric = NeuralCollapse(3, 8).cuda()
    rows, target = (tensor.cuda() for tensor in clusters(3, 40, 8, 0.3))
    no_waiting()
    for _ in range(40):
        metric.update(rows, target)


def test_values_on_the_gpu_are_those_of_the_cpu():
    rows, target = clusters(3, 200, 32, 0.3)
    here, there = NeuralCollapse(3, 32), NeuralCollapse(3, 32).cuda()
    for part, labels in zip(rows.split(50), target.split(50), strict=True):
        here.update(part, labels)
        there.update(part.cuda(), labels.cuda())
    assert {name: float(value) for name, value in there.compute().items()} == pytest.approx(
        {name: float(value) for name, value in here.compute().items()}, rel=1e-6
    )


def test_labels_that_a_function_looks_up_on_the_cpu_meet_features_on_the_gpu():
    rows, target = clusters(3, 40, 8, 0.3)
    model, batch = torch.nn.Linear(8, 3).cuda(), (rows, torch.arange(len(rows)))
    values = measure(model, [batch], target_fn=lambda batch: target[batch[1].cpu()], progress=False)
    assert values == measure(model, [(rows, target)], progress=False)


def train(tmp_path, precision, compiled, callbacks):
    """What a training leaves: the weights, and the state of the random stream."""
    torch.compiler.reset()
    seed_everything(3, verbose=False)
    model = Classifier()
    if compiled:
        model.net = torch.compile(model.net)
    Trainer(
        max_epochs=2,
        accelerator="gpu",
        devices=1,
        precision=precision,
        deterministic=True,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    ).fit(model, loader(), loader(shuffle=False))
    return [*model.state_dict().values(), torch.cuda.get_rng_state()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    ("arguments", "compiled"),
    [
        ({}, False),
        ({}, True),
        (ONLINE, False),
        ({"stages": ("train", "validate")}, False),
        ({"stages": ("train", "validate")}, True),
    ],
)
def test_training_on_the_gpu_is_bit_identical_with_and_without_the_callback(tmp_path, precision, arguments, compiled):
    measured = train(tmp_path, precision, compiled, [NeuralCollapseCallback(strict=True, **arguments)])
    bare = train(tmp_path, precision, compiled, [])
    assert all(torch.equal(a, b) for a, b in zip(bare, measured, strict=True))


@pytest.mark.parametrize(("precision", "error"), [("32-true", 1e-5), ("bf16-mixed", 3e-2), ("16-mixed", 1e-2)])
def test_online_mode_changes_only_the_rounding_of_a_compiled_model(tmp_path, precision, error):
    measured = train(tmp_path, precision, True, [NeuralCollapseCallback(strict=True, **ONLINE)])
    *bare, stream = train(tmp_path, precision, True, [])
    assert torch.equal(stream, measured.pop())
    for a, b in zip(bare, measured, strict=True):
        assert (a - b).abs().max() <= error * a.abs().max()
