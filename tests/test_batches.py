"""Inputs, labels and forward pass of a batch, and how features become one row per sample."""

import pytest
import torch
from conftest import clusters
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_nc import measure
from lightning_nc.measuring.batches import (
    copy_batch,
    listed,
    pool_features,
    run_forward,
    some_rows,
    targets_of,
)


def test_labels_are_found_in_pairs_and_mappings():
    labels = torch.arange(3)
    assert targets_of((torch.ones(3, 2), labels)) is labels
    assert targets_of({"input_ids": torch.ones(3, 2), "labels": labels}) is labels
    for batch in (torch.ones(3), [torch.ones(3)], {"x": labels}):
        with pytest.raises(LookupError, match="pass target_fn"):
            targets_of(batch)


def test_a_module_that_keeps_its_network_under_the_name_of_a_wrapper_is_called_itself():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(6, 3)

        def forward(self, pixels, scale):
            return self.module(pixels * scale)

    rows, target = clusters(3, 10, 6, 0.3)
    model = Holder()
    values = measure(model, [{"pixels": rows, "scale": torch.tensor(2.0), "labels": target}], progress=False)
    assert values == measure(model.module, [(2 * rows, target)], progress=False)


def test_a_lightning_module_without_forward_runs_its_validation_step_which_logs_and_counts_nothing():
    class Steps(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.accuracy = nn.Linear(6, 3), MulticlassAccuracy(3)

        def validation_step(self, batch, batch_idx):
            logits = self.net(batch["x"])
            self.accuracy.update(logits, batch["y"])
            self.log("accuracy", self.accuracy)
            return nn.functional.cross_entropy(logits, batch["y"])

    rows, target = clusters(3, 10, 6, 0.3)
    model = Steps()
    model.accuracy.update(torch.eye(3), torch.tensor([0, 1, 1]))
    before = {name: value.clone() for name, value in model.accuracy.metric_state.items()}
    values = measure(model, [{"x": rows, "y": target}] * 2, progress=False)
    assert values == measure(model.net, [(rows, target)] * 2, progress=False)
    assert all(torch.equal(model.accuracy.metric_state[name], value) for name, value in before.items())
    assert model.accuracy.update_count == 1
    assert "log" not in vars(model)


def test_the_one_input_of_a_mapping_may_have_any_name_and_the_model_may_be_compiled():
    rows, target = clusters(3, 10, 6, 0.3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    expected = measure(model, [(rows, target)], layers=["0"], progress=False)
    batch = {"pixels": rows, "labels": target}
    assert measure(model, [batch], layers=["0"], progress=False) == expected
    compiled = torch.compile(model, backend="eager")
    compiled(rows)
    assert measure(compiled, [batch], layers=["0"], progress=False) == expected


class Pair(nn.Module):
    """Takes two entries of a batch by name."""

    def forward(self, left, right=0):
        return left - right


class Anything(nn.Module):
    def forward(self, **entries):
        return sorted(entries)


def test_a_mapping_gives_the_forward_the_entries_that_it_names():
    batch = {"left": torch.ones(2), "right": torch.ones(2), "labels": torch.arange(2), "id": 7}
    assert run_forward(Pair(), batch).tolist() == [0, 0]
    assert run_forward(Anything(), batch) == ["id", "labels", "left", "right"]
    with pytest.raises(LookupError, match=r"has the keys 'up', 'down', and the forward of Pair takes 'left', 'right'"):
        run_forward(Pair(), {"up": torch.ones(2), "down": torch.ones(2)})


def test_a_batch_that_is_no_sequence_and_a_module_without_any_forward_need_a_forward_fn():
    with pytest.raises(LookupError, match=r"a batch of type int has no first item.*pass forward_fn"):
        run_forward(nn.Identity(), 3)
    with pytest.raises(LookupError, match="LightningModule has neither a forward nor a validation_step"):
        run_forward(LightningModule(), (torch.ones(2), torch.ones(2)))


def test_a_copy_of_a_batch_may_be_changed_and_what_cannot_be_copied_is_given_as_it_is():
    batch = {"x": torch.zeros(2)}
    copy_batch(batch)["x"] += 1
    assert batch["x"].tolist() == [0, 0]
    generator = (row for row in range(3))
    assert copy_batch(generator) is generator


def test_samples_are_taken_of_every_tensor_that_has_a_row_for_each_sample():
    rows, target = torch.randn(5, 2), torch.arange(5)
    batch = {"x": rows, "more": [target, torch.randn(3, 2), torch.tensor(1.0)], "name": "a"}
    short = some_rows(batch, 5, [1, 0])
    assert torch.equal(short["x"], rows[[1, 0]])
    assert short["more"][0].tolist() == [1, 0]
    assert torch.equal(short["more"][1], batch["more"][1])
    assert (short["more"][2].item(), short["name"]) == (1, "a")
    short["x"].zero_()
    assert not torch.equal(rows[[1, 0]], short["x"])


def test_a_message_lists_at_most_ten_names():
    assert listed("ab") == "'a', 'b'"
    assert listed(range(11)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..."


def test_pooling_keeps_batch_and_channel():
    images, tokens = torch.randn(4, 6, 3, 2), torch.randn(4, 5, 6)
    assert torch.allclose(pool_features(images, "mean", axis=1), images.mean(dim=(2, 3)))
    assert torch.allclose(pool_features(tokens, "mean", axis=2), tokens.mean(dim=1))
    assert torch.allclose(pool_features(tokens, "mean", axis=1), tokens.mean(dim=2))
    assert pool_features(images, "flatten").shape == (4, 36)
    assert pool_features(tokens, lambda features: features[:, 0]).shape == (4, 6)


def test_features_of_one_or_two_dimensions_are_copied_as_they_are():
    rows = torch.randn(4, 6, requires_grad=True)
    pooled = pool_features(rows, "flatten")
    assert torch.equal(pooled, rows)
    assert not pooled.requires_grad
    assert pooled.data_ptr() != rows.data_ptr()
    assert pool_features(torch.arange(4.0)).tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_mean_over_a_sequence_leaves_out_the_positions_that_the_mask_leaves_out(dtype):
    tokens = (1000 * torch.randn(3, 200, 4)).to(dtype)  # their sum may leave float16
    lengths = [200, 7, 1]
    mask = torch.stack([(torch.arange(200) < length).long() for length in lengths])
    expected = torch.stack([row[:length].double().mean(dim=0) for row, length in zip(tokens, lengths, strict=True)])
    pooled = pool_features(tokens, "mean", axis=2, mask=mask)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-5, atol=1e-2)
    other = pool_features(tokens, "mean", axis=2, mask=mask[:, :3])  # of something else: no position is left out
    torch.testing.assert_close(other.double(), tokens.double().mean(dim=1), rtol=1e-2, atol=1)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_sequences_of_different_lengths_are_averaged_one_by_one_or_refused():
    sequences = [torch.randn(3, 4), torch.randn(5, 4)]
    nested = torch.nested.nested_tensor(sequences)
    expected = torch.stack([sequence.mean(dim=0) for sequence in sequences])
    torch.testing.assert_close(pool_features(nested, "mean"), expected)
    torch.testing.assert_close(pool_features(nested, "last"), torch.stack([sequence[-1] for sequence in sequences]))
    torch.testing.assert_close(pool_features(nested, "first"), torch.stack([sequence[0] for sequence in sequences]))
    with pytest.raises(ValueError, match="which only pool='mean', 'first' and 'last' can pool; got pool='flatten'"):
        pool_features(nested, "flatten")


@pytest.mark.parametrize("axis", [1, 2])
def test_first_and_last_take_the_positions_at_the_ends_that_are_not_padding(axis):
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    features = torch.randn(4, 5, 3)
    given = features.movedim(-1, axis)
    at = torch.arange(4)
    assert torch.equal(pool_features(given, "first", axis, mask), features[at, torch.tensor([0, 2, 0, 0])])
    last = pool_features(given, "last", axis, mask)
    assert torch.equal(last[:3], features[at[:3], torch.tensor([2, 4, 0])])
    assert torch.equal(pool_features(given, "last", axis), features[:, -1])
    with pytest.raises(ValueError, match="takes a position of a sequence"):
        pool_features(torch.randn(4, 5, 3, 3), "first", 1)
