import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import reference
import torch
from conftest import clusters, found
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_nc import measure
from lightning_nc.measuring.batches import pool_features, targets_of
from lightning_nc.measuring.hooks import Recorder
from lightning_nc.measuring.probe import match_layers


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
    assert found(model, lambda: model(torch.randn(4, 6))) == "head"


def test_the_classifier_behind_a_softmax_is_the_last_with_the_right_number_of_outputs():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.LogSoftmax(dim=1))
    assert found(model, lambda: model(torch.randn(4, 6))) == "1"
    assert found(model, lambda: model(torch.randn(4, 6)), num_classes=8) == "0"


def test_the_projection_inside_attention_does_not_stand_in_the_way():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(dim=1)).log_softmax(dim=1)

    model = Attends()
    assert found(model, lambda: model(torch.randn(4, 5, 6))) == "head"


@pytest.mark.parametrize(
    "normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hooks", "parametrization"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_head_with_normed_weight_is_found_and_measured_with_the_weight_it_applies(normed):
    rows, target = clusters(3, 10, 6, 0.3)
    head = normed(nn.Linear(6, 3, bias=False))
    length, direction = sorted(head.parameters(), key=torch.numel)
    with torch.no_grad():
        length.copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        weight = (length * direction / direction.norm(dim=1, keepdim=True)).double().numpy()
    values = measure(nn.Sequential(nn.Identity(), head), [(rows, target)], progress=False)
    assert values["nc3"] == pytest.approx(reference.direction(weight, reference.moments(rows, target)[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("head", "after"),
    [
        (nn.Linear(8, 3, bias=False), nn.Identity()),
        (nn.Linear(8, 3), nn.Unflatten(1, (3, 1))),
        (nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 3, 1)), nn.Flatten()),
        (nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 3, 1)), nn.LogSoftmax(dim=1)),
    ],
    ids=["without bias", "then a view", "convolution, then a view", "convolution, then a softmax"],
)
def test_other_last_layers_are_found_too(head, after):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head, after)
    name = found(model, lambda: model(torch.randn(4, 6)))
    assert name == ("2" if isinstance(head, nn.Linear) else "2.1")
    rows, target = clusters(3, 10, 6, 0.3)
    values = measure(model, [(rows, target)], progress=False)
    with torch.no_grad():
        features = model[:2](rows).numpy()
    weight = model.get_submodule(name).weight.detach().double().flatten(1).numpy()
    expected = reference.all_metrics(features, target.numpy(), weight, np.zeros(3))
    assert values["nc1"] == pytest.approx(expected["nc1"], rel=1e-4)
    assert values["nc3"] == pytest.approx(expected["nc3"], rel=1e-5)


class Averaged(nn.Module):
    """Two heads side by side, behind hidden layers as wide; their average is the output."""

    def __init__(self, heads=2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(heads))

    def forward(self, x):
        features = self.body(x)
        return sum(head(features) for head in self.heads) / 2


def test_heads_whose_average_is_the_output_are_not_taken_for_one():
    model, x = Averaged(), torch.randn(8, 6)
    with pytest.raises(LookupError, match=r"could be the classifier, 'heads.0', 'heads.1':.*name one with classifier"):
        found(model, lambda: model(x))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hidden_layers_as_wide_as_the_output_are_not_taken_for_heads():
    model, x = Averaged(heads=1), torch.randn(8, 6)
    assert found(model, lambda: model(x)) == "heads.0"


def test_a_head_that_goes_by_two_names_is_one():
    model, x = Averaged(heads=1), torch.randn(8, 6)
    model.last = model.heads[0]
    assert found(model, lambda: model(x)) == "heads.0"


def test_a_convolution_that_runs_after_linear_layers_is_the_last_layer():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.last = nn.Linear(6, 6), nn.Conv2d(6, 3, 1)

        def forward(self, x):
            gate = self.gate(x.mean(dim=(2, 3))).sigmoid()
            return self.last(x * gate[:, :, None, None]).mean(dim=(2, 3))

    model = Gated()
    assert found(model, lambda: model(torch.randn(4, 6, 5, 5))) == "last"


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
    assert model.accuracy._update_count == 1
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


def test_several_heads_are_named_in_the_error():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.color, self.shape = nn.Linear(6, 3), nn.Linear(6, 4)

        def forward(self, x):
            return self.color(x), self.shape(x)

    model = TwoHeads()
    with pytest.raises(LookupError, match=r"'color', 'shape'; name one with classifier"):
        found(model, lambda: model(torch.randn(4, 6)))
    assert found(model, lambda: model(torch.randn(4, 6)), num_classes=4) == "shape"


def test_a_model_without_linear_layer_and_one_that_calls_it_functionally_get_a_remedy():
    with pytest.raises(LookupError, match="name a module with classifier"):
        found(nn.Conv2d(1, 1, 3), lambda: None)
    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(LookupError, match=r"write self.fc\(x\) instead of F.linear"):
        found(model, lambda: nn.functional.linear(torch.randn(4, 6), model[0].weight))


def test_a_head_that_is_called_functionally_is_not_mistaken_for_another_layer():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return nn.functional.linear(self.body(x), self.head.weight)

    model = Functional()
    with pytest.raises(LookupError, match="'head' was not called"):
        found(model, lambda: model(torch.randn(4, 6)))


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
    assert recorder.stop() == []
    recorder.start(lambda name, tensor: tensor)
    layer(input=x)
    copy.deepcopy(layer)(x)
    pickle.loads(pickle.dumps(layer))(x)
    ((name, seen),) = recorder.stop()
    assert name == "fc"
    assert torch.equal(seen, x)
    recorder.remove()
    assert not layer._forward_pre_hooks


def test_of_several_calls_the_last_with_a_row_for_each_label_is_measured():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            self.fc(x[:2])
            output = self.fc(x)
            self.fc(x.repeat(2, 1) + 1)
            return output

    rows, target = clusters(3, 10, 6, 0.3)
    model = Twice()
    assert measure(model, [(rows, target)], progress=False) == measure(model.fc, [(rows, target)], progress=False)


def test_pooling_keeps_batch_and_channel():
    images, tokens = torch.randn(4, 6, 3, 2), torch.randn(4, 5, 6)
    assert torch.allclose(pool_features(images, "mean", axis=1), images.mean(dim=(2, 3)))
    assert torch.allclose(pool_features(tokens, "mean", axis=2), tokens.mean(dim=1))
    assert torch.allclose(pool_features(tokens, "mean", axis=1), tokens.mean(dim=2))
    assert pool_features(images, "flatten").shape == (4, 36)
    assert pool_features(tokens, lambda features: features[:, 0]).shape == (4, 6)


def test_labels_are_found_in_pairs_and_mappings():
    labels = torch.arange(3)
    assert targets_of((torch.ones(3, 2), labels)) is labels
    assert targets_of({"input_ids": torch.ones(3, 2), "labels": labels}) is labels
    for batch in (torch.ones(3), [torch.ones(3)], {"x": labels}):
        with pytest.raises(LookupError, match="pass target_fn"):
            targets_of(batch)


class Embedding(nn.Module):
    """Gives the features; the classifier is called by the loss."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12)), nn.Linear(12, 4)

    def forward(self, x):
        return self.body(x)


def test_a_classifier_that_the_forward_does_not_call_is_named_with_the_way_out():
    model, rows = Embedding(), torch.randn(8, 6)
    with pytest.raises(LookupError, match=r"'classifier' was not called.* pass forward_fn"):
        found(model, lambda: model(rows), num_classes=4)
    batches = [(rows, torch.arange(8) % 4)]
    with pytest.raises(LookupError, match="in the training step alone, pass forward_fn"):
        measure(model, batches, classifier="classifier", progress=False)
    values = measure(model, batches, forward_fn=lambda m, batch: m.classifier(m(batch[0])), progress=False)
    assert values["nc1"] > 0


def test_an_output_that_no_linear_layer_can_have_given_is_an_error():
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.randn(4, 8))
            self.body = nn.Linear(6, 8)

        def forward(self, x):
            return nn.functional.linear(nn.functional.normalize(self.body(x)), self.centres)

    model = Cosine()
    with pytest.raises(
        LookupError, match=r"returns 4 columns, which come from no linear layer; the last .*'body', has 8"
    ):
        found(model, lambda: model(torch.randn(5, 6)))


def test_layers_before_the_head_that_are_not_called_do_not_stand_in_the_way():
    class Projected(nn.Module):
        """As Swin's attention, which takes the weight of its projection and not the layer."""

        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(nn.functional.linear(x, self.qkv.weight)).log_softmax(dim=1)

    model = Projected()
    assert found(model, lambda: model(torch.randn(5, 6))) == "head"


def test_a_traced_model_is_measured():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert measure(traced, [(torch.randn(9, 6), torch.arange(9) % 3)], progress=False)["nc1"] > 0


def test_a_slice_of_the_outputs_is_still_the_classifiers():
    class Sliced(Net):
        def forward(self, x):
            return super().forward(x)["logits"][:, :2]

    model = Sliced()
    model.unused = nn.Identity()
    assert found(model, lambda: model(torch.randn(5, 6)), num_classes=3) == "head"


def test_outputs_are_found_inside_a_dataclass():
    @dataclass
    class Output:
        logits: torch.Tensor
        domain: torch.Tensor

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.domain = nn.Linear(6, 4), nn.Linear(6, 7)

        def forward(self, x):
            return Output(self.fc(x), self.domain(x))

    model = TwoHeads()
    assert found(model, lambda: model(torch.randn(5, 6)), num_classes=4) == "fc"
    with pytest.raises(LookupError, match="outputs of several linear layers, 'fc', 'domain'"):
        found(model, lambda: model(torch.randn(5, 6)))


def test_a_function_turns_a_sequence_first_layer_into_a_row_per_sample():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.GRU(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.rnn(x.transpose(0, 1))[0][-1])

    model, batches = Recurrent(), [(torch.randn(12, 5, 6), torch.arange(12) % 3)]
    values = measure(model, batches, layers=["rnn"], pool=lambda hidden: hidden[-1], progress=False)
    assert values["rnn/nc1"] == pytest.approx(values["nc1"], rel=1e-12)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (({"x": torch.randn(4, 6)}, torch.arange(4)), "must be Tensor, not dict"),
        (([torch.randn(4, 6)] * 2, torch.arange(4)), "must be Tensor, not list"),
    ],
)
def test_a_call_that_fails_names_the_way_out(batch, reason):
    with pytest.raises(TypeError, match=rf"{reason}.*; pass forward_fn"):
        measure(nn.Linear(6, 4), [batch], progress=False)


def test_a_column_of_labels_gets_its_own_remedy():
    with pytest.raises(ValueError, match=r"got int64 \(4, 1\); squeeze\(1\)"):
        measure(nn.Linear(6, 4), [(torch.randn(4, 6), torch.arange(4)[:, None])], progress=False)


def test_torchs_own_encoder_is_measured_where_it_leaves_the_padding_out():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
            self.encoder, self.fc = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, x, attention_mask):
            hidden = self.encoder(x, src_key_padding_mask=attention_mask == 0)
            weights = attention_mask[..., None]
            return self.fc((hidden * weights).sum(dim=1) / weights.sum(dim=1))

    model, mask = Encoder(), torch.ones(12, 5)
    mask[3:, 3:] = 0
    batch = {"x": torch.randn(12, 5, 8), "attention_mask": mask, "labels": torch.arange(12) % 3}
    values = measure(model, [batch], layers=["encoder.layers.1"], progress=False)
    assert values["encoder.layers.1/nc1"] == pytest.approx(values["nc1"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_fn": lambda batch: {}["foo"]}, "target_fn failed on a batch: KeyError: 'foo'"),
        ({"classifier": "conv"}, "'conv' is a convolution of more than one position"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 5, 3), flat=nn.Flatten(), fc=nn.Linear(20, 4)))
    with pytest.raises(LookupError, match=message):
        measure(model, [(torch.randn(8, 3, 4, 4), torch.arange(8) % 4)], progress=False, **arguments)


def test_a_data_set_is_no_loader():
    data = torch.utils.data.TensorDataset(torch.randn(8, 6), torch.arange(8) % 4)
    with pytest.raises(ValueError, match=r"got the data set TensorDataset; write DataLoader"):
        measure(nn.Linear(6, 4), data, progress=False)
