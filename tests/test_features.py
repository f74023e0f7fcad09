import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_nc.features import Recorder, features_of, find_classifier, match_layers, pool_features, targets_of


class Net(nn.Module):
    """A head, an auxiliary linear layer that runs after it, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.unused = nn.Linear(8, 3)
        self.head = nn.Linear(8, 3)
        self.auxiliary = nn.Linear(3, 2)

    def forward(self, x):
        logits = self.head(self.trunk(x))
        self.auxiliary(logits)
        return {"logits": logits}


def test_the_classifier_is_the_layer_whose_output_is_the_models_output():
    model = Net()
    assert find_classifier(model, lambda: model(torch.randn(4, 6))) == "head"


def test_the_classifier_behind_a_softmax_is_the_last_with_the_right_number_of_outputs():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.LogSoftmax(dim=1))
    assert find_classifier(model, lambda: model(torch.randn(4, 6))) == "1"
    assert find_classifier(model, lambda: model(torch.randn(4, 6)), num_classes=8) == "0"


def test_the_projection_inside_attention_does_not_stand_in_the_way():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(dim=1)).log_softmax(dim=1)

    model = Attends()
    assert find_classifier(model, lambda: model(torch.randn(4, 5, 6))) == "head"


def test_several_heads_are_named_in_the_error():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.color, self.shape = nn.Linear(6, 3), nn.Linear(6, 4)

        def forward(self, x):
            return self.color(x), self.shape(x)

    model = TwoHeads()
    with pytest.raises(LookupError, match=r"'color', 'shape'; name one with classifier"):
        find_classifier(model, lambda: model(torch.randn(4, 6)))
    assert find_classifier(model, lambda: model(torch.randn(4, 6)), num_classes=4) == "shape"


def test_a_model_without_linear_layer_and_one_that_calls_it_functionally_get_a_remedy():
    with pytest.raises(LookupError, match="name a module with classifier"):
        find_classifier(nn.Conv2d(1, 1, 3), lambda: None)
    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(LookupError, match=r"write self.fc\(x\) instead of F.linear"):
        find_classifier(model, lambda: nn.functional.linear(torch.randn(4, 6), model[0].weight))


def test_a_head_that_is_called_functionally_is_not_mistaken_for_another_layer():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return nn.functional.linear(self.body(x), self.head.weight)

    model = Functional()
    with pytest.raises(LookupError, match="'head' was not called"):
        find_classifier(model, lambda: model(torch.randn(4, 6)))


def test_layers_match_by_shell_pattern_and_near_names_are_offered():
    model = Net()
    assert match_layers(model, ["trunk.*", "head"]) == ["trunk.0", "trunk.1", "head"]
    with pytest.raises(LookupError, match="is named 'heat'; near: 'head'"):
        match_layers(model, ["heat"])


def test_a_recorder_sees_keyword_arguments_leaves_no_hook_behind_and_sleeps_in_copies():
    layer = nn.Linear(6, 3)
    x = torch.randn(4, 6)
    recorder = Recorder({}, inputs={"fc": layer})
    layer(x)
    assert recorder.take() == []
    recorder.arm(lambda module, tensor: tensor)
    layer(input=x)
    copy.deepcopy(layer)(x)
    pickle.loads(pickle.dumps(layer))(x)
    ((name, seen),) = recorder.take()
    assert name == "fc"
    assert torch.equal(seen, x)
    recorder.remove()
    assert not layer._forward_pre_hooks


def test_the_call_that_fits_the_labels_is_taken():
    fits, other = torch.randn(4, 6), torch.randn(9, 6)
    recorded = [("fc", other), ("fc", fits), ("fc", None), ("other", torch.randn(4, 2))]
    assert torch.equal(features_of("fc", recorded, 4), fits)
    with pytest.raises(LookupError, match="a row for each of the 5 labels"):
        features_of("fc", recorded, 5)
    with pytest.raises(LookupError, match="'fc' was not called"):
        features_of("fc", [("other", fits)], 5)


def test_pooling_keeps_batch_and_channel():
    images, tokens = torch.randn(4, 6, 3, 2), torch.randn(4, 5, 6)
    assert torch.allclose(pool_features(images, "mean"), images.mean(dim=(2, 3)))
    assert torch.allclose(pool_features(tokens, "mean"), tokens.mean(dim=1))
    assert torch.allclose(pool_features(tokens, "mean", nn.Conv1d(5, 5, 1)), tokens.mean(dim=2))
    assert pool_features(images, "flatten").shape == (4, 36)
    assert pool_features(tokens, lambda features: features[:, 0]).shape == (4, 6)


def test_labels_are_found_in_pairs_and_mappings():
    labels = torch.arange(3)
    assert targets_of((torch.ones(3, 2), labels)) is labels
    assert targets_of({"input_ids": torch.ones(3, 2), "labels": labels}) is labels
    for batch in (torch.ones(3), [torch.ones(3)], {"x": labels}):
        with pytest.raises(LookupError, match="pass target_fn"):
            targets_of(batch)
