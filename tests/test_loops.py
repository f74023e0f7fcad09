"""Running loops, whose batches are measured as they are without an extra pass."""

import warnings

import pytest
import reference
import torch
from conftest import OTHER, PAPER, ROWS, TARGET, hooks_of
from torch import nn

from lightning_nc.measuring.loops import RunningLoops, is_ready
from lightning_nc.measuring.probe import Probe

BATCHES = list(zip(ROWS.split(8), TARGET.split(8), strict=True))
OTHERS = list(zip(*(part.split(8) for part in OTHER.tensors), strict=True))


class Loop:
    """Running loops over a linear layer, whose input is the features."""

    def __init__(self, **arguments):
        self.model = nn.Linear(6, 3)
        self.probe = Probe(**arguments)
        self.loops = RunningLoops(self.probe, PAPER)

    def attach(self, batch):
        if not self.probe.attached:
            self.probe.attach(self.model, batch)

    def run(self, stage, batches, loader=0, own=None):
        for batch in batches:
            self.loops.start(stage, loader, self.model, batch, lambda batch=batch: self.attach(batch))
            self.model(batch[0])
            self.loops.finish(stage, loader, own)


def nc1(collector):
    collector.synchronize(None)
    return collector.values()["nc1"]


def true_nc1(batches):
    rows, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return pytest.approx(reference.nc1(rows.numpy(), target.numpy()), rel=1e-5)


def test_a_loop_gives_the_values_of_all_its_batches():
    loop = Loop()
    loop.loops.begin("train", True)
    loop.run("train", BATCHES)
    (collector,) = loop.loops.end("train").values()
    assert nc1(collector) == true_nc1(BATCHES)
    assert set(collector.values()) == set(PAPER)


def test_stages_and_dataloaders_are_kept_apart():
    loop = Loop()
    for stage in ("train", "validate"):
        loop.loops.begin(stage, True)
    loop.run("train", BATCHES[:3])
    loop.run("validate", OTHERS, loader=1)  # validation in the middle of an epoch
    loop.run("validate", BATCHES, loader=0)
    loop.run("train", BATCHES[3:])
    collectors = loop.loops.end("validate")
    assert list(collectors) == [0, 1]
    assert nc1(collectors[0]) == true_nc1(BATCHES)
    assert nc1(collectors[1]) == true_nc1(OTHERS)
    assert nc1(loop.loops.end("train")[0]) == true_nc1(BATCHES)


def test_a_stage_is_measured_only_between_begin_and_end():
    loop = Loop()
    assert not loop.loops.is_active("test")
    loop.loops.begin("test", False)
    assert not loop.loops.is_active("test")
    loop.run("test", BATCHES)  # nothing has begun, nothing happens
    assert loop.loops.end("test") == {}
    loop.loops.begin("test", True)
    assert loop.loops.is_active("test")
    loop.loops.end("test")
    assert not loop.loops.is_active("test")


def test_a_loop_that_begins_again_forgets_its_earlier_batches():
    loop = Loop()
    loop.loops.begin("train", True)
    loop.run("train", OTHERS)
    loop.loops.begin("train", True)
    loop.run("train", BATCHES)
    assert nc1(loop.loops.end("train")[0]) == true_nc1(BATCHES)


def test_the_samples_that_pad_a_rank_are_left_out():
    loop = Loop()
    loop.loops.begin("validate", True)
    loop.run("validate", [*BATCHES, BATCHES[0]], own=len(ROWS))
    assert nc1(loop.loops.end("validate")[0]) == true_nc1(BATCHES)


def test_a_dataloader_without_a_batch_on_this_rank_is_an_error_that_all_ranks_hear_of():
    loop = Loop()
    loop.loops.begin("validate", True)
    loop.run("validate", BATCHES, loader=0)
    collectors = loop.loops.end("validate", count=2)
    assert nc1(collectors[0]) == true_nc1(BATCHES)
    with pytest.raises(LookupError, match="no batch came to this rank"):
        collectors[1].synchronize(None)


def test_an_error_waits_for_the_end_of_the_loop_unless_the_probe_is_strict():
    broken = [*BATCHES[:2], (ROWS[:8], TARGET[:8] + 0.5), *BATCHES[2:]]
    loop = Loop()
    loop.loops.begin("train", True)
    loop.run("train", broken)
    with pytest.raises(ValueError, match="must be whole numbers"):
        loop.loops.end("train")[0].synchronize(None)
    strict = Loop(strict=True)
    strict.loops.begin("train", True)
    with pytest.raises(ValueError, match="must be whole numbers"):
        strict.run("train", broken)


def test_a_model_with_lazy_layers_is_left_alone_until_they_have_a_shape():
    loop = Loop(num_classes=3)
    loop.model = nn.LazyLinear(3)
    assert not is_ready(loop.probe, loop.model)
    loop.loops.begin("train", True)
    loop.run("train", BATCHES)  # the first batch gives the shape
    assert is_ready(loop.probe, loop.model)
    assert nc1(loop.loops.end("train")[0]) == true_nc1(BATCHES[1:])


def test_a_step_that_does_not_call_the_model_is_not_measured_and_a_loop_of_such_steps_is_an_error():
    loop = Loop()
    loop.loops.begin("train", True)
    loop.run("train", BATCHES[:2])
    loop.loops.start("train", 0, loop.model, OTHERS[0], lambda: None)
    loop.loops.finish("train", 0, None)
    loop.run("train", BATCHES[2:])
    assert nc1(loop.loops.end("train")[0]) == true_nc1(BATCHES)
    loop.loops.begin("train", True)
    loop.loops.start("train", 0, loop.model, OTHERS[0], lambda: None)
    loop.loops.finish("train", 0, None)
    with pytest.raises(LookupError, match="was not called in the forward pass"):
        loop.loops.end("train")[0].synchronize(None)


@pytest.mark.parametrize(
    ("change", "warns"),
    [
        (lambda x: x, False),
        (lambda x: x.view(8, 2, 3).flatten(1), False),
        (lambda x: x.clone(), False),
        (lambda x: x.flip(0), True),
        (lambda x: 0.7 * x + 0.3 * x.roll(1, 0), True),
    ],
    ids=["as it is", "view", "copy", "permuted", "mixed"],
)
def test_a_step_that_gives_the_model_other_values_than_its_batch_is_pointed_out_once(change, warns):
    loop = Loop()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in BATCHES[:2]:
            loop.loops.watch_inputs(loop.model, batch)
            loop.model(change(batch[0]))
            loop.loops.check_inputs()
            assert hooks_of(loop.model) == []
            loop.model(-batch[0])  # nobody watches any more
            loop.loops.check_inputs()
    said = [
        str(w.message) for w in caught if "calls the model on other values than those of the batch" in str(w.message)
    ]
    assert len(said) == int(warns)
