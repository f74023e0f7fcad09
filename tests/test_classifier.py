"""Which layer is the classifier, and the weight that it applies now."""

from dataclasses import dataclass

import numpy as np
import pytest
import reference
import torch
from conftest import clusters, hooks_of, name_of_classifier
from torch import nn

from lightning_nc import measure
from lightning_nc.measuring.classifier import Classifier, outputs_of


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
    assert name_of_classifier(model, lambda: model(torch.randn(4, 6))) == "head"


def test_the_classifier_behind_a_softmax_is_the_last_with_the_right_number_of_outputs():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.LogSoftmax(dim=1))
    assert name_of_classifier(model, lambda: model(torch.randn(4, 6))) == "1"
    assert name_of_classifier(model, lambda: model(torch.randn(4, 6)), num_classes=8) == "0"


def test_the_projection_inside_attention_is_not_taken_for_a_head():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(dim=1)).log_softmax(dim=1)

    model = Attends()
    assert name_of_classifier(model, lambda: model(torch.randn(4, 5, 6))) == "head"


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
    name = name_of_classifier(model, lambda: model(torch.randn(4, 6)))
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
        name_of_classifier(model, lambda: model(x))
    assert hooks_of(model) == []


def test_hidden_layers_as_wide_as_the_output_are_not_taken_for_heads():
    model, x = Averaged(heads=1), torch.randn(8, 6)
    assert name_of_classifier(model, lambda: model(x)) == "heads.0"


def test_a_head_that_goes_by_two_names_is_one():
    model, x = Averaged(heads=1), torch.randn(8, 6)
    model.last = model.heads[0]
    assert name_of_classifier(model, lambda: model(x)) == "heads.0"


def test_a_convolution_that_runs_after_linear_layers_is_the_last_layer():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.last = nn.Linear(6, 6), nn.Conv2d(6, 3, 1)

        def forward(self, x):
            gate = self.gate(x.mean(dim=(2, 3))).sigmoid()
            return self.last(x * gate[:, :, None, None]).mean(dim=(2, 3))

    model = Gated()
    assert name_of_classifier(model, lambda: model(torch.randn(4, 6, 5, 5))) == "last"


def test_several_heads_are_named_in_the_error():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.color, self.shape = nn.Linear(6, 3), nn.Linear(6, 4)

        def forward(self, x):
            return self.color(x), self.shape(x)

    model = TwoHeads()
    with pytest.raises(LookupError, match=r"'color', 'shape'; name one with classifier"):
        name_of_classifier(model, lambda: model(torch.randn(4, 6)))
    assert name_of_classifier(model, lambda: model(torch.randn(4, 6)), num_classes=4) == "shape"


def test_a_model_without_linear_layer_and_one_that_calls_it_functionally_get_a_remedy():
    with pytest.raises(LookupError, match="name a module with classifier"):
        name_of_classifier(nn.Conv2d(1, 1, 3), lambda: None)
    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(LookupError, match=r"write self.fc\(x\) instead of F.linear"):
        name_of_classifier(model, lambda: nn.functional.linear(torch.randn(4, 6), model[0].weight))


def test_a_head_that_is_called_functionally_is_not_mistaken_for_another_layer():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return nn.functional.linear(self.body(x), self.head.weight)

    model = Functional()
    with pytest.raises(LookupError, match="'head' was not called"):
        name_of_classifier(model, lambda: model(torch.randn(4, 6)))


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
        name_of_classifier(model, lambda: model(rows), num_classes=4)
    batches = [(rows, torch.arange(8) % 4)]
    with pytest.raises(LookupError, match="in the training step alone, pass forward_fn"):
        measure(model, batches, classifier="classifier", progress=False)
    values = measure(model, batches, forward_fn=lambda m, batch: m.classifier(m(batch[0])), progress=False)
    assert values["nc1"] > 0


def test_an_output_that_no_linear_layer_can_have_given_is_an_error():
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.centers = nn.Parameter(torch.randn(4, 8))
            self.body = nn.Linear(6, 8)

        def forward(self, x):
            return nn.functional.linear(nn.functional.normalize(self.body(x)), self.centers)

    model = Cosine()
    with pytest.raises(
        LookupError, match=r"returns \(5, 4\), which comes from no linear layer; the last .*'body', has 8"
    ):
        name_of_classifier(model, lambda: model(torch.randn(5, 6)))


def test_layers_before_the_head_need_not_be_called():
    class Projected(nn.Module):
        """As Swin's attention, which takes the weight of its projection and not the layer."""

        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(nn.functional.linear(x, self.qkv.weight)).log_softmax(dim=1)

    model = Projected()
    assert name_of_classifier(model, lambda: model(torch.randn(5, 6))) == "head"


def test_a_slice_of_the_outputs_is_still_the_classifiers():
    class Sliced(Net):
        def forward(self, x):
            return super().forward(x)["logits"][:, :2]

    model = Sliced()
    model.unused = nn.Identity()
    assert name_of_classifier(model, lambda: model(torch.randn(5, 6)), num_classes=3) == "head"


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
    assert name_of_classifier(model, lambda: model(torch.randn(5, 6)), num_classes=4) == "fc"
    with pytest.raises(LookupError, match="outputs of several linear layers, 'fc', 'domain'"):
        name_of_classifier(model, lambda: model(torch.randn(5, 6)))


# ---------------------------------------------------------------------------------------------- what the model itself says


@pytest.mark.parametrize("method", ["get_classifier", "get_output_embeddings"])
def test_the_layer_that_the_model_itself_names_is_taken(method):
    class Named(Averaged):
        """Two heads with equal outputs, of which one is declared."""

    setattr(Named, method, lambda self: self.heads[0])
    model, x = Named(), torch.randn(8, 6)
    assert name_of_classifier(model, lambda: model(x)) == "heads.0"


# ------------------------------------------------------------------------------------------------------- weight and bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + 1


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class Adapter(nn.Module):
    """A low-rank change around a linear layer, as adapters make it."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(6, 3)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.in_features, self.out_features = 6, 3

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def parts(module, num_classes=3):
    return Classifier("head", module, num_classes, torch.randn(5, 6)).parts()


@pytest.mark.parametrize("module", [nn.Linear(6, 3), Scaled(6, 3), Adapter()], ids=lambda m: type(m).__name__)
def test_weight_and_bias_are_those_that_the_layer_applies(module):
    weight, bias = parts(module)
    x = torch.randn(7, 6)
    torch.testing.assert_close(x @ weight.T + bias, module(x).detach())
    assert not weight.requires_grad


def test_a_layer_that_applies_no_weight_has_none():
    assert parts(Cosine(6, 3)) == (None, None)
    assert parts(nn.LayerNorm(6)) == (None, None)


def test_a_head_with_more_outputs_is_cut_and_one_with_fewer_has_no_weight():
    head = nn.Linear(6, 10)
    weight, bias = parts(head, num_classes=4)
    assert torch.equal(weight, head.weight[:4])
    assert torch.equal(bias, head.bias[:4])
    assert parts(nn.Linear(6, 3), num_classes=4) == (None, None)


def test_the_weight_is_read_when_it_is_asked_for():
    head = nn.Linear(6, 3, bias=False)
    classifier = Classifier("head", head, 3)
    nn.init.constant_(head.weight, 2.0)
    assert classifier.parts()[0].unique().tolist() == [2.0]
    assert classifier.parts()[1] is None


def test_a_convolution_with_a_kernel_of_one_has_a_weight_of_two_dimensions():
    head = nn.Conv2d(6, 3, 1)
    weight, _ = Classifier("head", head, 3, torch.randn(5, 6, 1, 1)).parts()
    assert torch.equal(weight, head.weight.flatten(start_dim=1))


def test_the_number_of_outputs_is_that_of_linear_layers_and_convolutions():
    assert outputs_of(nn.Linear(6, 3)) == outputs_of(nn.Conv1d(6, 3, 5)) == 3
    assert outputs_of(nn.LayerNorm(6)) is None


def test_tied_weights_that_no_module_applies_are_refused_also_at_every_position():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = nn.Embedding(5, 8), nn.Linear(8, 8)

        def forward(self, tokens):
            return self.body(self.embedding(tokens)) @ self.embedding.weight.T

    model, tokens = Tied(), torch.arange(12).view(4, 3) % 5
    with pytest.raises(LookupError, match=r"returns \(4, 3, 5\), which comes from no linear layer"):
        name_of_classifier(model, lambda: model(tokens))
