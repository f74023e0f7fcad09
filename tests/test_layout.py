"""Which axis holds the features: known from layers, carried to other modules, or an error that names the candidates."""

import pytest
import torch
from conftest import Permute
from torch import nn

from lightning_nc.measuring.hooks import trace
from lightning_nc.measuring.layout import Layout


class ChannelsFirstNorm(nn.LayerNorm):
    """Normalizes the channels of (B, C, H, W), as the norms of ConvNeXt do."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RootMeanSquare(nn.Module):
    """A norm of somebody else: one weight per channel, no attribute that counts them."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / x.square().mean(dim=-1, keepdim=True).sqrt() * self.weight


class Scale(nn.Module):
    """A learned scale of the channels."""

    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(*shape))

    def forward(self, x):
        return x * self.gamma


class Concatenate(nn.Module):
    """Twice as many channels."""

    def forward(self, x):
        return torch.cat([x, x + 1], dim=1)


def axis_of(model, inputs, layer, outputs=True):
    """The axis of the features of a layer, in the last call of it."""
    with torch.no_grad():
        _, calls = trace(model, lambda: model(inputs))
    return Layout(calls).feature_axis(max(i for i, call in enumerate(calls) if call.name == layer), outputs)


# All axes have four entries: only the kind of the layer can tell.
@pytest.mark.parametrize(
    ("layer", "dimensions", "axis"),
    [
        (nn.Conv1d(4, 4, 1), 3, 1),
        (nn.Conv2d(4, 4, 1), 4, 1),
        (nn.Conv3d(4, 4, 1), 5, 1),
        (nn.ConvTranspose2d(4, 4, 1), 4, 1),
        (nn.BatchNorm1d(4), 3, 1),
        (nn.InstanceNorm2d(4), 4, 1),
        (nn.GroupNorm(2, 4), 4, 1),
        (nn.Linear(4, 4), 3, 2),
        (nn.Linear(4, 4), 4, 3),
        (nn.LayerNorm(4), 4, 3),
        (nn.RMSNorm(4), 3, 2),
        (nn.LSTM(4, 4), 3, 2),
        (nn.GRU(4, 2, bidirectional=True), 3, 2),
        (nn.LSTM(4, 8, proj_size=4, batch_first=True), 3, 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_torchs_own_layers_know_the_axis_even_where_all_sizes_are_equal(layer, dimensions, axis):
    model, inputs = nn.Sequential(layer), torch.randn(*[4] * dimensions)
    assert axis_of(model, inputs, "0") == axis
    assert axis_of(model, inputs, "0", outputs=False) == axis


def test_an_embedding_and_an_attention_hold_their_features_last():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Embedding(9, 4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, ids):
            x = self.embed(ids)
            return self.attention(x, x, x)[0]

    ids = torch.randint(9, (4, 4))
    assert axis_of(Attend(), ids, "embed") == axis_of(Attend(), ids, "attention") == 2


def test_a_norm_that_permutes_is_known_by_the_only_axis_that_its_channels_fit():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), ChannelsFirstNorm(5))
    assert axis_of(model, torch.randn(2, 3, 4, 4), "1") == 1


def test_a_norm_of_another_library_is_known_by_its_weight():
    assert axis_of(nn.Sequential(RootMeanSquare(5)), torch.randn(2, 4, 5), "0") == 2


@pytest.mark.parametrize(("shape", "axis"), [((1, 4, 1, 1), 1), ((1, 1, 1, 4), 3)])
def test_a_learned_scale_says_which_axis_it_scales(shape, axis):
    assert axis_of(nn.Sequential(Scale(*shape)), torch.randn(2, 4, 4, 4), "0") == axis


def test_a_permutation_moves_the_axis_with_the_tensor_that_the_next_layer_receives():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), Permute(0, 2, 3, 1), nn.LayerNorm(4), Permute(0, 3, 1, 2), nn.Conv2d(4, 4, 1)
    )
    inputs = torch.randn(2, 3, 4, 4)
    assert [axis_of(model, inputs, str(layer)) for layer in range(5)] == [1, 3, 3, 1, 1]


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Dropout(), nn.Sequential(nn.GELU(), nn.Identity())])
def test_modules_between_layers_of_one_convention_follow_it(between):
    convolutions = nn.Sequential(nn.Conv1d(3, 7, 1), between, nn.Conv1d(7, 7, 1))
    assert axis_of(convolutions, torch.randn(2, 3, 7), "1") == 1
    linear = nn.Sequential(nn.Linear(3, 7), between, nn.Linear(7, 7))
    assert axis_of(linear, torch.randn(2, 7, 3), "1") == 2


def test_pooling_of_positions_keeps_the_channels_where_they_are():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 6, 1))
    assert axis_of(model, torch.randn(2, 3, 8, 8), "2") == 1


def test_where_all_layers_are_channels_first_the_number_of_channels_may_change():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Concatenate(), nn.BatchNorm2d(8))
    assert axis_of(model, torch.randn(2, 3, 8, 8), "1") == 1


def test_what_the_classifier_receives_is_known_from_the_classifier():
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    assert axis_of(model, torch.randn(2, 4, 4), "1", outputs=False) == 2


def test_layers_that_contradict_each_other_are_an_error_with_both_candidates():
    class Turned(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2) + 1

    model = nn.Sequential(nn.Conv1d(3, 4, 1), Turned(), nn.ReLU(), Turned(), nn.Linear(4, 4))
    with pytest.raises(
        LookupError, match=r"output \(2, 4, 4\) holds the features is ambiguous; candidates are axis 1 \(4\) and axis 2"
    ):
        axis_of(model, torch.randn(2, 3, 4), "2")


def test_without_any_layer_that_knows_every_axis_is_a_candidate_and_the_message_names_the_remedies():
    model = nn.Sequential(nn.Identity())
    with pytest.raises(
        LookupError,
        match=r"input \(2, 5, 7\).*axis 1 \(5\) and axis 2 \(7\). Pass pool='mean_channels_first', "
        r"pool='mean_channels_last', or a function",
    ):
        axis_of(model, torch.randn(2, 5, 7), "0", outputs=False)


def test_one_neighbor_does_not_decide_in_a_model_of_two_conventions_where_sizes_are_equal():
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (4, -1)), nn.Conv2d(4, 4, 1), nn.ReLU())
    with pytest.raises(LookupError, match="is ambiguous"):
        axis_of(model, torch.randn(2, 16, 3), "3")


def test_a_size_that_only_one_axis_has_lets_a_single_neighbor_decide():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv2d(3, 5, 1), nn.Identity(), nn.Linear(5, 2)

        def forward(self, x):
            return self.fc(self.act(self.conv(x) + 1).mean(dim=3).transpose(1, 2))

    assert axis_of(Mixed(), torch.randn(2, 3, 4, 4), "act") == 1
