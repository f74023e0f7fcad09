"""Numbers that were once wrong without a warning, and what is done about each: the faults as users met them."""

import copy
import functools
import math
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import guarantees_ranks
import numpy as np
import pytest
import reference
import torch
from conftest import Permute, clusters, free_port
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset
from versions import EMAWeightAveraging, needs_fsdp2

from lightning_nc import NeuralCollapseCallback, measure

PAPER = ("nc1", "nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered")
ROWS, TARGET = clusters(3, 15, 6, 0.5)
DATA = TensorDataset(ROWS, TARGET)


def expected(features, target, weight=None, layer="", prefix=""):
    """The paper's metrics of features (N, d), from the float64 reference; those of the weight if it is given."""
    rows, labels = features.detach().double().numpy(), target.numpy()
    given = torch.ones(len(target.unique()), features.shape[1]) if weight is None else weight.detach()
    values = reference.all_metrics(rows, labels, given.double().numpy(), 0.0)
    names = PAPER if weight is not None else PAPER[:4]
    return {prefix + (f"{layer}/" if layer else "") + name: values[name] for name in names}


def seen_by(model, name, inputs, output=True):
    """What the module ``name`` returns, or receives, in eval mode; by a hook of its own."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    mode = model.training
    with torch.no_grad():
        model.eval()(inputs)
    model.train(mode)
    hook.remove()
    return seen[-1][output].clone()


def check(model, inputs, target, layers=(), head=None, weight=None, rel=1e-5, **arguments):
    """``measure`` gives for every layer what ``layers`` (name -> features) say, and for the head what its input gives."""
    values = measure(model, [(inputs, target)], layers=list(layers), classifier=head, progress=False, **arguments)
    for name, features in dict(layers).items():
        truth = expected(features, target, layer=name)
        assert {key: values[key] for key in truth} == pytest.approx(truth, rel=rel)
    if head is not None:
        truth = expected(seen_by(model, head, inputs, output=False), target, weight)
        assert {key: values[key] for key in truth} == pytest.approx(truth, rel=rel)
    return values


# ------------------------------------------------------------------------------------------------------ 2. pooling


class Residual(nn.Module):
    """A block of a transformer of images, in channels-last layout."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class ChannelsLast(nn.Module):
    """As torchvision's Swin: (B, H, W, C) between the stem and the head. With ``side == width`` sizes say nothing."""

    def __init__(self, width):
        super().__init__()
        stem = nn.Conv2d(3, width, 2, 2), Permute(0, 2, 3, 1), nn.LayerNorm(width)
        self.features = nn.Sequential(nn.Sequential(*stem), nn.Sequential(Residual(width), Residual(width)))
        self.norm, self.permute, self.pool = nn.LayerNorm(width), Permute(0, 3, 1, 2), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.permute(self.norm(self.features(x)))
        return self.head(self.pool(x).flatten(1))


def images(side, per_class=8, channels=3):
    rows, target = clusters(3, per_class, channels * side * side, 0.7)
    return rows.view(-1, channels, side, side), target


@pytest.mark.parametrize("width", [6, 4])
def test_channels_last_layers_are_averaged_over_positions_even_where_all_sizes_are_equal(width):
    model, (inputs, target) = ChannelsLast(width), images(8)
    layers = ["features.0", "features.1", "features.1.0", "features.1.1.mlp", "features.1.0.norm", "norm"]
    features = {name: seen_by(model, name, inputs).mean(dim=(1, 2)) for name in layers}
    features["permute"] = seen_by(model, "permute", inputs).mean(dim=(2, 3))
    check(model, inputs, target, features, head="head", weight=model.head.weight)


class ResBlock1D(nn.Module):
    """Its name ends as those of torch's channels-first layers do, and so do the names of layers that are not."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x + self.conv2(self.act(self.conv1(x))))


class Attention1d(nn.Module):
    """Channels last in spite of its name."""

    def __init__(self, width):
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, x):
        return x + self.project(x)


@pytest.mark.parametrize("length", [10, 7])
def test_a_layer_behind_a_convolution_of_one_dimension_is_averaged_over_time_whatever_its_name(length):
    stem = nn.Sequential(nn.Conv1d(2, 7, 3, padding=1), nn.ReLU(), nn.Dropout())
    body = ResBlock1D(7), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(7, 3)
    model, (rows, target) = nn.Sequential(stem, *body), clusters(3, 12, 2 * length, 0.8)
    inputs = rows.view(-1, 2, length)
    features = {name: seen_by(model, name, inputs).mean(dim=2) for name in ("0", "0.1", "0.2", "1", "1.act", "2")}
    check(model, inputs, target, features, pool="mean_channels_first", head="5", weight=model[5].weight)
    if length == 7:  # behind the residual connection nothing is left but sizes, and they are equal
        with pytest.warns(UserWarning, match=r"the layers '1', '1.act', '2' are left out.* is ambiguous"):
            measure(model, [(inputs, target)], layers=list(features), progress=False)
        features = {name: features[name] for name in ("0", "0.1", "0.2")}
    check(model, inputs, target, features, head="5", weight=model[5].weight)


def test_a_layer_of_linear_layers_is_averaged_over_time_whatever_its_name():
    model = nn.Sequential(nn.Linear(5, 7), Attention1d(7), nn.ReLU(), nn.Linear(7, 4), nn.Flatten(), nn.Linear(28, 3))
    rows, target = clusters(3, 12, 35, 0.8)
    inputs = rows.view(-1, 7, 5)  # seven positions and seven features
    check(model, inputs, target, {name: seen_by(model, name, inputs).mean(dim=1) for name in ("0", "1", "2", "3")})


class Contiguous(Permute):
    def forward(self, x):
        return super().forward(x).contiguous()


@pytest.mark.parametrize("kind", [Permute, Contiguous])
@pytest.mark.parametrize("length", [5, 7])
def test_a_module_that_permutes_the_axes_is_seen_through(kind, length):
    swaps = kind(0, 2, 1), nn.GELU(), kind(0, 2, 1)
    model = nn.Sequential(nn.Linear(4, 7), *swaps, nn.Linear(7, 7), nn.Flatten(), nn.Linear(7 * length, 3))
    rows, target = clusters(3, 12, 4 * length, 0.8)
    inputs = rows.view(-1, length, 4)
    features = {name: seen_by(model, name, inputs).mean(dim=2) for name in ("1", "2")}
    features |= {name: seen_by(model, name, inputs).mean(dim=1) for name in ("0", "3", "4")}
    if length == 7:  # what follows a square tensor cannot be known
        with pytest.warns(UserWarning, match="'2' is left out: which axis"):
            measure(model, [(inputs, target)], layers=["2"], progress=False)
        del features["2"]
    check(model, inputs, target, features)


def test_maps_of_attention_are_left_out_also_where_there_are_as_many_positions_as_features():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.softmax, self.out, self.head = (
                nn.Linear(8, 8),
                nn.Softmax(-1),
                nn.Linear(8, 8),
                nn.Linear(8, 3),
            )

        def forward(self, x):
            keys, parts = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in (self.keys(x), x))
            maps = self.softmax(keys @ keys.transpose(-1, -2))  # (B, heads, T, T)
            return self.head(self.out((maps @ parts).transpose(1, 2).flatten(2)).mean(dim=1))

    rows, target = clusters(3, 12, 64, 0.8)
    model, inputs = Attention(), rows.view(-1, 8, 8)
    with pytest.warns(UserWarning, match=r"'softmax' is left out: which axis of its output \(3, 2, 8, 8\)"):
        values = measure(model, [(inputs, target)], layers=["softmax"], progress=False)
    assert not any(key.startswith("softmax/") for key in values)
    check(model, inputs, target, {name: seen_by(model, name, inputs).mean(dim=1) for name in ("keys", "out")})


class SequenceFirst(nn.Module):
    """Tokens are (T, B, d) inside, torch's default."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x.transpose(0, 1)).mean(dim=0))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_sequence_first_layer_with_as_many_positions_as_samples_is_not_mistaken_for_a_batch_of_samples():
    rows, target = clusters(3, 4, 12 * 8, 0.8)
    model, inputs = SequenceFirst(), rows.view(12, 12, 8)  # T = B
    with pytest.warns(
        UserWarning, match="'encoder' is left out: no call of 'encoder' has a row for each .* pass .* pool="
    ):
        values = measure(model, [(inputs, target)], layers=["encoder"], progress=False)
    assert not any(key.startswith("encoder/") for key in values)
    truth = {"encoder": seen_by(model, "encoder", inputs).mean(dim=0)}
    check(model, inputs, target, truth, pool=lambda tokens: tokens.mean(dim=0))


class Sorting(nn.Module):
    """Sorts its samples, as recurrent networks did by length, and puts only its outputs back in order."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.head(self.body(x[order]))[order.argsort()]


def test_rows_in_another_order_than_the_labels_are_refused():
    with pytest.raises(LookupError, match="rows of the last call of 'head' are in another order than the labels"):
        measure(Sorting(), [(ROWS, TARGET)], progress=False)

    class Beside(Sorting):
        def forward(self, x):
            super().forward(x)
            return self.last(x)

    model = Beside()
    model.last = nn.Linear(6, 3)
    with pytest.warns(UserWarning, match="the layer 'body' is left out: the rows .* in another order"):
        values = measure(model, [(ROWS, TARGET)], layers=["body"], progress=False)
    assert values == pytest.approx(expected(ROWS, TARGET, model.last.weight), rel=1e-5)


def test_a_model_that_takes_sorted_samples_only_is_measured():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.LSTM(2, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            lengths = torch.arange(len(x), 0, -1).clamp(max=5)  # pack_padded_sequence wants them to fall
            packed = nn.utils.rnn.pack_padded_sequence(x.flatten(1).view(len(x), 5, 2), lengths, batch_first=True)
            return self.head(self.body(packed)[1][0][-1])

    rows, target = clusters(3, 12, 10, 0.8)
    model = Recurrent()
    check(model, rows, target, head="head", weight=model.head.weight)


class Opaque(nn.Module):
    """Nothing in or around it says which axis holds the features: it works on parameters of its own shape."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 5, 5))
        self.mix = nn.Identity()
        self.head = nn.Linear(25, 3)

    def forward(self, x):
        return self.head(self.mix(torch.einsum("bi,itd->btd", x, self.table)).flatten(1))


def test_an_ambiguous_axis_is_refused_with_the_shape_and_the_candidates_and_can_be_chosen():
    model, message = (
        Opaque(),
        r"output \(3, 5, 5\) holds the features is ambiguous; candidates are axis 1 \(5\) and axis 2",
    )
    with pytest.warns(UserWarning, match=message):
        values = measure(model, [(ROWS, TARGET)], layers=["mix"], progress=False)
    assert values
    assert not any(key.startswith("mix/") for key in values)
    tokens = seen_by(model, "mix", ROWS)
    check(model, ROWS, TARGET, {"mix": tokens.mean(dim=1)}, pool="mean_channels_last")
    check(model, ROWS, TARGET, {"mix": tokens.mean(dim=2)}, pool="mean_channels_first")
    with pytest.raises(LookupError, match=message):
        run(Wrapped(model), NeuralCollapseCallback(layers=["model.mix"], strict=True))


# ------------------------------------------------------------------------------------------------------ 3. weights


class Wrapped(LightningModule):
    """Trains any model on pairs."""

    def __init__(self, model, lr=0.1):
        super().__init__()
        self.model, self.lr = model, lr

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


def run(module, *callbacks, data=DATA, val=None, ckpt_path=None, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(**{"max_epochs": 2, "accelerator": "cpu", "callbacks": list(callbacks), **quiet, **options})
    loader = data if isinstance(data, DataLoader) else DataLoader(data, 8, shuffle=True)
    trainer.fit(module, loader, val, ckpt_path=ckpt_path)
    return trainer


def last_row(callback, stage="train"):
    row = [row for row in callback.history if row["stage"] == stage][-1]
    return {key.removeprefix("nc/"): value for key, value in row.items() if key.startswith("nc/")}


def adapted(use_dora):
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(6, 8), nn.Tanh()))
    model.add_module("head", nn.Linear(8, 3))
    settings = peft.LoraConfig(r=2, target_modules=["head"], use_dora=use_dora, lora_dropout=0.1)
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():  # a fresh adapter adds nothing
        adapted.base_model.model.head.lora_B["default"].weight.normal_()
    return adapted


def merged(model):
    """The plain model that peft makes of an adapted one: the truth about its weight."""
    return copy.deepcopy(model).merge_and_unload().eval()


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_weight_of_an_adapted_head_is_the_one_that_it_applies_while_the_adapter_trains(use_dora):
    model = adapted(use_dora)
    plain = merged(model)
    values = measure(model, [(ROWS, TARGET)], classifier="base_model.model.head", progress=False)
    truth = expected(seen_by(plain, "body", ROWS), TARGET, plain.head.weight)
    assert values == pytest.approx(truth, rel=1e-4)
    raw = reference.direction(
        model.base_model.model.head.base_layer.weight.detach().double().numpy(),
        reference.moments(seen_by(plain, "body", ROWS), TARGET)[0],
    )
    assert values["nc3"] != pytest.approx(raw, rel=0.02)  # the raw weight, which is not applied
    assert measure(model, [(ROWS, TARGET)], progress=False) == values  # found without being named

    callback = NeuralCollapseCallback(strict=True)
    run(Wrapped(model), callback)
    plain = merged(model)
    assert last_row(callback) == pytest.approx(
        expected(seen_by(plain, "body", ROWS), TARGET, plain.head.weight), rel=1e-4
    )
    before = callback.history[0]["nc/nc3"], callback.history[-1]["nc/nc3"]
    assert before[0] != pytest.approx(before[1], rel=1e-3)  # the adapter has moved between the epochs


class Recording(Wrapped):
    """Keeps what its head receives in the training steps of an epoch, for an oracle of the online mode."""

    def __init__(self, model, head):
        super().__init__(model)
        self.received = []
        model.get_submodule(head).register_forward_pre_hook(
            lambda module, args: self.received.append(args[0].detach().clone())
        )

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.rows, self.labels = [], []
        self.received.clear()
        loss = super().training_step(batch, batch_idx)
        self.rows.append(self.received[0])
        self.labels.append(batch[1])
        return loss

    def epoch(self):
        return torch.cat(self.rows), torch.cat(self.labels)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_online_mode_reads_the_weight_of_an_adapted_head_at_the_end_of_the_epoch(use_dora):
    model = adapted(use_dora)
    callback, module = NeuralCollapseCallback(mode="online", strict=True), Recording(model, "base_model.model.head")
    run(module, callback)
    assert last_row(callback) == pytest.approx(expected(*module.epoch(), merged(model).head.weight), rel=1e-4)


class Cosine(nn.Linear):
    def forward(self, x):
        return 10 * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class Scaled(nn.Linear):
    """Applies twice its weight, and a bias that it computes."""

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight - self.weight.mean(dim=0), self.bias + 1)


def without_a_weight(model):
    """What is measured of a model whose head applies no weight; the metrics that need one are left out with a warning."""
    with pytest.warns(UserWarning, match=r"nc3, nc3_centered left out: the classifier .* does not compute x W' \+ b"):
        return measure(model, [(ROWS, TARGET)], progress=False)


def test_a_cosine_head_has_no_weight_and_the_metrics_that_need_it_are_left_out_with_a_reason():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Cosine(8, 3, bias=False))
    assert without_a_weight(model) == pytest.approx(expected(seen_by(model, "1", ROWS), TARGET), rel=1e-5)


def test_other_parameters_in_the_forward_pass_are_not_taken_for_those_of_the_module():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    average = copy.deepcopy(model)  # as an average of the weights that is kept beside the model
    nn.init.normal_(average[2].weight)
    parameters = dict(average.named_parameters())
    with pytest.warns(UserWarning, match="nc3, nc3_centered left out"):
        values = measure(
            model,
            [(ROWS, TARGET)],
            forward_fn=lambda module, batch: torch.func.functional_call(module, parameters, (batch[0],)),
            progress=False,
        )
    assert values == pytest.approx(expected(seen_by(average, "1", ROWS), TARGET), rel=1e-5)


def test_a_head_of_grouped_convolutions_has_the_weight_of_one_linear_layer():
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Conv1d(6, 3, 1, groups=3))
    weight = torch.block_diag(*model[3].weight.flatten(1))
    truth = expected(seen_by(model, "2", ROWS).mean(dim=2), TARGET, weight)
    assert measure(model, [(ROWS, TARGET)], progress=False) == pytest.approx(truth, rel=1e-4)


def test_a_head_with_a_forward_of_its_own_is_measured_with_the_weight_that_it_applies():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Scaled(8, 3))
    applied = 2 * model[2].weight - model[2].weight.mean(dim=0)
    truth = expected(seen_by(model, "1", ROWS), TARGET, applied)
    assert measure(model, [(ROWS, TARGET)], progress=False) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("change", [lambda out: 10 * out.tanh(), lambda out: out + out.square()])
def test_a_hook_that_changes_what_the_head_returns_is_not_overlooked(change):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].register_forward_hook(lambda module, args, output: change(output))
    assert without_a_weight(model) == pytest.approx(expected(seen_by(model, "1", ROWS), TARGET), rel=1e-5)


def test_a_hook_that_changes_what_the_head_receives_is_not_overlooked():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].register_forward_pre_hook(lambda module, args: (nn.functional.normalize(args[0]) ** 3,))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        values = measure(model, [(ROWS, TARGET)], progress=False)
    features = nn.functional.normalize(seen_by(model, "1", ROWS)) ** 3
    assert values == pytest.approx(expected(features, TARGET, model[2].weight), rel=1e-5)


@pytest.mark.parametrize(
    "normed", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_a_parametrized_head_is_measured_with_the_weight_of_eval_mode_while_it_trains(normed):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), normed(nn.Linear(8, 3)))
    module, exact = Recording(model, "2"), NeuralCollapseCallback(strict=True)
    run(module, exact)
    model.eval()
    assert last_row(exact) == pytest.approx(expected(seen_by(model, "1", ROWS), TARGET, model[2].weight), rel=1e-4)
    online = NeuralCollapseCallback(mode="online", strict=True)
    run(module.train(), online)
    model.eval()
    assert last_row(online) == pytest.approx(expected(*module.epoch(), model[2].weight), rel=1e-4)


def test_under_bf16_autocast_plain_heads_and_cosine_heads_are_told_apart():
    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch[0])

    for head in (nn.Linear(8, 3), parametrizations.weight_norm(nn.Linear(8, 3)), Scaled(8, 3)):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head)
        values = measure(model, [(ROWS, TARGET)], forward_fn=forward, progress=False)
        seen = []
        handle = model[2].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        forward(model, (ROWS,))
        handle.remove()
        applied = 2 * head.weight - head.weight.mean(dim=0) if isinstance(head, Scaled) else head.weight
        assert values == pytest.approx(expected(seen[0], TARGET, applied), rel=1e-2)
    model[2] = Cosine(8, 3, bias=False)
    with pytest.warns(UserWarning, match="nc3, nc3_centered left out"):
        assert "nc3" not in measure(model, [(ROWS, TARGET)], forward_fn=forward, progress=False)


# ------------------------------------------------------------------------------------------------ 5. the user's loader


class Augmented(Dataset):
    """Every access draws: another augmentation for another state of the random streams."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return ROWS[index] + torch.randn(6), TARGET[index]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2, "persistent_workers": True}, {"generator": "own"}, {"sampler": "subset"}],
    ids=["process", "persistent workers", "generator", "sampler"],
)
def test_a_loop_around_measure_keeps_its_batches_and_its_augmentations(options):
    def epochs(measuring):
        model = nn.Linear(6, 3)
        torch.manual_seed(3)
        own = {**options, "generator": torch.Generator().manual_seed(5)} if "generator" in options else options
        own = {"sampler": SubsetRandomSampler(range(40))} if "sampler" in options else {"shuffle": True, **own}
        loader, seen = DataLoader(Augmented(), 4, **own), []
        for _ in range(2):
            for step, (rows, _) in enumerate(loader):
                seen.append(rows)
                if measuring and step in (2, 7):
                    values = measure(model, loader, progress=False)
                    assert len(values) == 6
        return seen

    plain, measured = epochs(False), epochs(True)
    assert len(measured) == len(plain) == 20
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


# ------------------------------------------------------------------------------------------------ 6. process groups


@functools.cache
def ranks():
    """What ``guarantees_ranks.py`` gives on each of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launcher, str(free_port()), guarantees_ranks.__file__, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert not done.returncode, done.stderr
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(2)]


def whole(norm=False, layer="3"):
    """The truth about all samples of both ranks."""
    model = guarantees_ranks.model(norm)
    rows, target = guarantees_ranks.ROWS, guarantees_ranks.TARGET
    return expected(seen_by(model, layer, rows, output=False), target, model[3].weight)


def test_streams_that_give_the_ranks_different_classes_are_measured_together():
    first, second = (rank["streams_of_other_classes"] for rank in ranks())
    assert first == second == pytest.approx(whole(), rel=1e-6)


def test_the_buffers_of_the_first_rank_count_and_those_of_the_others_come_back():
    (first, zeros), (second, ones) = (rank["batch_norm"] for rank in ranks())
    assert (zeros, ones) == ([0] * 9, [1] * 9)
    assert {key: value for key, value in first.items() if "/" not in key} == pytest.approx(whole(norm=True), rel=1e-6)
    assert first == second


def test_one_rank_measures_alone_without_waiting_for_the_others():
    assert ranks()[0]["one_rank_alone"] == pytest.approx(whole(), rel=1e-6)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("one_fails", "ValueError: labels must lie in"),
        ("one_has_no_batch", "LookupError: the dataloader gave no batch"),
    ],
)
def test_if_one_rank_cannot_measure_all_raise_and_none_waits(part, reason):
    first, second = (rank[part] for rank in ranks())
    assert first.startswith("RuntimeError: another rank could not measure its part")
    assert second.startswith(reason)


@needs_fsdp2
def test_a_sharded_model_in_mixed_precision_is_measured_with_the_weight_that_it_applies():
    first, second = (rank["sharded_in_bfloat16"] for rank in ranks())
    assert first == second == pytest.approx(whole(), rel=5e-3)  # bfloat16 has three digits


# ---------------------------------------------------------------------------------------------------- 7. names of layers


@pytest.mark.parametrize("name", ["val", "test", "val_1", "test_12"])
def test_a_layer_whose_keys_would_read_as_those_of_a_stage_is_refused_with_a_remedy(name):
    def model():
        return nn.Sequential(nn.ModuleDict({"body": nn.Linear(6, 8)})["body"])

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(6, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(getattr(self, name)(x).relu())

    class Top(Named, LightningModule):
        training_step, configure_optimizers = Wrapped.training_step, Wrapped.configure_optimizers
        lr = 0.1

    message = f"'{name}'.* its keys would read as those of a stage; rename the module"
    with pytest.warns(UserWarning, match=message):
        values = measure(Named(), [(ROWS, TARGET)], layers=["*"], progress=False)
    assert {"nc1", "head/nc1"} <= values.keys()
    assert not any(key.startswith(f"{name}/") for key in values)
    with pytest.raises(ValueError, match=message):
        run(Top(), NeuralCollapseCallback(layers=[name], strict=True))
    module, callback = Top(), NeuralCollapseCallback(layers=["*"], stages=("train", "validate"))
    with pytest.warns(UserWarning, match=message):
        run(module, callback)
    assert not any(key.startswith(f"nc/{name}/") for row in callback.history for key in row)


# ----------------------------------------------------------------------------------------------- 8. averaged weights


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


AVERAGING = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "EMA, own buffers": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", AVERAGING)
def test_the_last_row_is_about_the_model_that_fit_leaves_whatever_averages_its_weights(kind, before):
    module, callback, average = Wrapped(net()), NeuralCollapseCallback(strict=True), AVERAGING[kind]()
    callbacks = [average, callback] if before else [callback, average]
    trainer = run(module, *callbacks, max_epochs=5)
    model = module.model
    truth = expected(seen_by(model, "2", ROWS), TARGET, model[3].weight)
    assert last_row(callback) == pytest.approx(truth, rel=1e-5)
    assert {key: float(trainer.callback_metrics[f"nc/{key}"]) for key in truth} == pytest.approx(truth, rel=1e-5)
    marked = [row.get("weights") for row in callback.history]
    if kind == "SWA":
        assert len(marked) >= 5
    else:
        assert marked == [None] * 5 + ["swapped"]
        assert callback.history[-2]["nc/nc1"] != pytest.approx(truth["nc1"], rel=1e-3)


@pytest.mark.parametrize("mode", ["exact", "online"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_validation_rows_under_an_average_are_about_the_average_and_say_so(mode, before):
    class Averaged(EMAWeightAveraging):
        """Keeps a copy of the average that validation ran with."""

        def on_validation_epoch_end(self, trainer, pl_module):
            self.used = copy.deepcopy(pl_module.model)
            super().on_validation_epoch_end(trainer, pl_module)

    module, callback, average = (
        Wrapped(net()),
        NeuralCollapseCallback(stages=("train", "validate"), mode=mode, strict=True),
        Averaged(),
    )
    rows, target = clusters(3, 9, 6, 0.6, seed=1)
    val = DataLoader(TensorDataset(rows, target), 8)
    run(
        module, *([average, callback] if before else [callback, average]), val=val, max_epochs=3, num_sanity_val_steps=0
    )
    used = average.used.eval()
    truth = expected(seen_by(used, "2", rows), target, used[3].weight)
    row = [row for row in callback.history if row["stage"] == "validate"][-1]
    assert {key: row[f"nc/val/{key}"] for key in truth} == pytest.approx(truth, rel=1e-5)
    assert row["weights"] == "swapped"


@pytest.mark.parametrize("mode", ["exact", "online"])
def test_rows_say_nothing_about_weights_where_nothing_replaces_them(mode):
    callback = NeuralCollapseCallback(stages=("train", "validate"), mode=mode, strict=True)
    run(Wrapped(net()), callback, val=DataLoader(DATA, 8), max_epochs=3)
    assert [row["stage"] for row in callback.history] == ["train", "validate"] * 3
    assert not any("weights" in row for row in callback.history)


def test_validation_in_the_middle_of_an_epoch_says_that_it_is_about_averaged_weights_too():
    callback = NeuralCollapseCallback(stages=("train", "validate"), strict=True)
    options = {"val": DataLoader(DATA, 8), "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    run(Wrapped(net()), EMAWeightAveraging(decay=0.9), callback, **options)
    rows = [(row["stage"], row.get("weights")) for row in callback.history]
    epoch = [("validate", "swapped"), ("train", None), ("validate", "swapped")]
    assert rows == [*epoch, *epoch, ("train", "swapped")]


# ------------------------------------------------------------------------------------- 9. batches mixed in the step


class Mixing(Wrapped):
    """What a training step may do with a batch before the model sees it."""

    def __init__(self, how):
        super().__init__(net())
        self.how = how

    def training_step(self, batch, batch_idx):
        x, y = batch
        order = torch.arange(len(x)).roll(1)
        if self.how == "mixup":
            out = self(0.7 * x + 0.3 * x[order])
            return 0.7 * nn.functional.cross_entropy(out, y) + 0.3 * nn.functional.cross_entropy(out, y[order])
        if self.how == "permutation":
            return nn.functional.cross_entropy(self(x[order]), y[order])
        if self.how == "cutmix":  # in place, as its authors do it
            x[:, 3:] = x[order, 3:]
        if self.how == "error":
            raise ZeroDivisionError
        if self.how == "view":
            x = x.view(-1, 2, 3).flatten(1).float()
        if self.how == "keyword":
            return nn.functional.cross_entropy(self.model(input=x), y)
        return nn.functional.cross_entropy(self(x), y)


@pytest.mark.parametrize("how", ["mixup", "permutation", "cutmix"])
def test_online_mode_warns_where_the_step_mixes_the_samples_of_a_batch(how):
    with pytest.warns(UserWarning, match="other values than those of the batch.*use mode='exact'"):
        run(Mixing(how), NeuralCollapseCallback(mode="online"))
    module, callback = Mixing(how), NeuralCollapseCallback(strict=True)
    run(module, callback)
    truth = expected(seen_by(module.model, "2", ROWS), TARGET, module.model[3].weight)
    assert last_row(callback) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("kind", ["nan", "sparse"])
def test_an_ordinary_step_on_inputs_that_cannot_be_compared_causes_no_warning(kind, recwarn):
    class Reading(Wrapped):
        def forward(self, x):
            return super().forward(x.to_dense().nan_to_num() if kind == "sparse" else x.nan_to_num())

    def collate(samples):
        rows, target = (torch.stack(part) for part in zip(*samples, strict=True))
        if kind == "sparse":
            return rows.to_sparse(), target
        return rows.masked_fill(rows > 1, math.nan), target

    run(
        Reading(net()), NeuralCollapseCallback(mode="online", strict=True), data=DataLoader(DATA, 8, collate_fn=collate)
    )
    assert [str(w.message) for w in recwarn if "other values" in str(w.message)] == []


def test_an_error_in_the_first_step_leaves_no_hook_behind():
    module = Mixing("error")
    with pytest.raises(ZeroDivisionError):
        run(module, NeuralCollapseCallback(mode="online"))
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())


@pytest.mark.parametrize("how", ["plain", "view", "keyword"])
def test_an_ordinary_step_causes_no_warning_in_online_mode(how, recwarn):
    callback = NeuralCollapseCallback(mode="online", stages=("train", "validate"), strict=True)
    run(Mixing(how), callback, val=DataLoader(DATA, 8), max_epochs=3)
    assert len(callback.history) == 6
    assert [str(w.message) for w in recwarn if "neural collapse" in str(w.message)] == []


# --------------------------------------------------------------------------------------------- 11. how often it measures


def stopping(evaluated, hook, when):
    """A module that asks for the end of the training; ``evaluated`` receives the batch sizes that it sees in eval mode."""

    class Stopping(Wrapped):
        def forward(self, x):
            if not self.training and len(x) > 3:  # three samples at most are used to look at the model
                evaluated.append(len(x))
            return super().forward(x)

    def stop(module):
        module.trainer.should_stop = when(module.current_epoch)

    setattr(Stopping, hook, stop)
    return Stopping(net())


def test_an_early_stop_that_min_epochs_holds_back_does_not_cause_a_pass_in_every_epoch():
    evaluated, callback = [], NeuralCollapseCallback(every_n_epochs=20, strict=True)
    module = stopping(evaluated, "on_train_epoch_start", lambda epoch: True)
    run(module, callback, max_epochs=100, min_epochs=60)
    assert [row["epoch"] for row in callback.history] == [0, 19, 39, 59]
    assert sum(evaluated) == 4 * len(ROWS)


def test_a_stop_after_an_epoch_that_was_not_due_is_measured_once():
    evaluated, callback = [], NeuralCollapseCallback(every_n_epochs=20, strict=True)
    module = stopping(evaluated, "on_train_epoch_end", lambda epoch: epoch >= 6)
    run(module, callback, max_epochs=100, min_epochs=5)
    assert [row["epoch"] for row in callback.history] == [0, 6]
    assert sum(evaluated) == 2 * len(ROWS)


# --------------------------------------------------------------------------------------------- 13. memory of many layers


def resident():
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_scatter_matrices_of_all_layers_together_stay_below_a_gibibyte_and_this_is_said(caplog):
    width, depth = 2048, 60  # 33 MB each, and 2 GB together
    model = nn.Sequential(nn.Linear(6, width), *[nn.Identity() for _ in range(depth)], nn.Linear(width, 3))
    taken, before = [], resident()
    model[-1].register_forward_hook(lambda *call: taken.append(resident() - before))
    with caplog.at_level("INFO"):
        values = measure(model, [(ROWS, TARGET)] * 2, layers=["*"], metrics="nc1", progress=False)
    assert max(taken) < 1.25 * 2**30
    (said,) = [record.message for record in caplog.records if "second pass" in record.message]
    assert "more than 1 GiB together" in said
    assert "fewer layers or pool='mean' avoid it" in said
    truth = reference.nc1_by_axes(seen_by(model, "0", ROWS).numpy(), TARGET.numpy())
    assert [values[f"{name}/nc1"] for name in range(depth + 1)] == [pytest.approx(truth, rel=1e-5)] * (depth + 1)


# --------------------------------------------------------------------------------------------- 14. several trainings


def test_each_of_several_trainings_has_a_history_of_its_own():
    callback = NeuralCollapseCallback(strict=True)
    finals = []
    for fold in range(3):  # cross-validation
        model = net()
        part = TensorDataset(ROWS[fold::3], TARGET[fold::3])
        run(Wrapped(model), callback, data=part, max_epochs=2)
        truth = expected(seen_by(model, "2", ROWS[fold::3]), TARGET[fold::3], model[3].weight)
        finals.append(truth)
        assert [row["epoch"] for row in callback.history] == [0, 1]
        assert {name: last_row(callback)[name] for name in truth} == pytest.approx(truth, rel=1e-5)
    assert [[row["epoch"] for row in history] for history in callback.previous_histories] == [[0, 1], [0, 1]]
    for history, truth in zip([*callback.previous_histories, callback.history], finals, strict=True):
        assert history[-1]["nc/nc1"] == pytest.approx(truth["nc1"], rel=1e-5)


def test_a_training_after_a_checkpoint_of_another_that_was_over_has_a_history_of_its_own(tmp_path):
    run(Wrapped(net()), NeuralCollapseCallback(strict=True), max_epochs=2).save_checkpoint(tmp_path / "over.ckpt")
    callback = NeuralCollapseCallback(strict=True)
    run(Wrapped(net()), callback, max_epochs=2, ckpt_path=tmp_path / "over.ckpt")  # nothing is left to train
    run(Wrapped(net()), callback, max_epochs=1)
    assert [row["epoch"] for row in callback.history] == [0]
    assert [[row["epoch"] for row in history] for history in callback.previous_histories] == [[0, 1]]


def test_training_that_goes_on_with_another_trainer_from_a_checkpoint_goes_on_with_its_history(tmp_path):
    callback, module = NeuralCollapseCallback(strict=True), Wrapped(net())
    trainer = run(module, callback, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, DataLoader(DATA, 8))
    assert [row["epoch"] for row in callback.history] == [0, 1, 2]
    again = NeuralCollapseCallback(strict=True)
    run(Wrapped(net()), again, max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert [row["epoch"] for row in again.history] == [0, 1, 2, 3]
    assert not again.previous_histories


# ---------------------------------------------------------------------------------- 16. types that torch cannot compute


def test_a_schedule_may_be_an_integer_of_numpy():
    callback = NeuralCollapseCallback(every_n_epochs=np.int64(2), num_classes=np.int64(3), strict=True)
    run(Wrapped(net()), callback, max_epochs=5)
    assert [row["epoch"] for row in callback.history] == [0, 1, 3, 4]


def test_an_exported_program_is_refused_with_the_reason():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    exported = torch.export.export(model, (ROWS[:8],)).module()
    with pytest.raises(TypeError, match=r"no eval mode.*Measure the module that it was exported from"):
        measure(exported, [(ROWS[:8], TARGET[:8])], progress=False)


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda body: torch.jit.trace(body.eval(), ROWS)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_with_a_scripted_or_traced_body_is_measured_and_left_as_it_was(compiled):
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout())
    body(ROWS)
    model = nn.Sequential(compiled(body), nn.Linear(8, 3)).train()
    before = copy.deepcopy(list(model.buffers()))
    values = measure(model, [(ROWS, TARGET)], progress=False)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert values == pytest.approx(expected(body.eval()(ROWS), TARGET, model[1].weight), rel=1e-5)


class Returning(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.to_sparse(), "dense tensor, got a sparse_coo tensor; call .to_dense"),
        (lambda x: x.to(torch.float8_e4m3fn), r"got float8_e4m3fn \(\d+, 6\); call .float\(\) first"),
        (lambda x: torch.empty(len(x), 6, device="meta"), "dense tensor, got a meta tensor; give it values first"),
        (lambda x: torch.complex(x, x), "no call of '(model.)?inner' has a row for each"),
    ],
    ids=["sparse", "float8", "meta", "complex"],
)
def test_features_that_torch_cannot_compute_with_are_left_out_with_a_remedy(function, reason):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Returning(function), nn.Linear(6, 3)

        def forward(self, x):
            self.inner(x)
            return self.head(x)

    model = Inside()
    with pytest.warns(UserWarning, match=f"'inner' is left out: .*{reason}"):
        values = measure(model, [(ROWS, TARGET)], layers=["*"], progress=False)
    assert {key: values[key] for key in PAPER} == pytest.approx(expected(ROWS, TARGET, model.head.weight), rel=1e-5)
    with pytest.raises((ValueError, LookupError), match=f"'model.inner' cannot be measured: .*{reason}"):
        run(Wrapped(model), NeuralCollapseCallback(layers=["model.inner"], strict=True))


# --------------------------------------------------------------------------------- 17. state outside of the model


class Cursor(IterableDataset):
    """A stream that goes on where it was left."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        for _ in range(40):
            self.position += 1
            yield ROWS[self.position % 45], TARGET[self.position % 45]


def test_a_stream_whose_cursor_a_measurement_moves_is_pointed_out():
    with pytest.warns(UserWarning, match="measuring moved position of the data set Cursor.*over a copy of the data"):
        run(Wrapped(net()), NeuralCollapseCallback(), data=DataLoader(Cursor(), 8))
    with pytest.warns(UserWarning, match="measuring moved position of the data set Cursor"):
        measure(net(), DataLoader(Cursor(), 8), progress=False)


def test_a_stream_without_a_cursor_causes_no_warning(recwarn):
    class Stream(IterableDataset):
        def __init__(self):
            self.temperature, self.opened = math.nan, False

        def __iter__(self):
            self.opened = True
            yield from DATA

    run(Wrapped(net()), NeuralCollapseCallback(strict=True), data=DataLoader(Stream(), 8))
    assert [str(w.message) for w in recwarn if "neural collapse" in str(w.message)] == []


class MomentumEncoder(nn.Module):
    """As in MoCo or BYOL, where the target network moves in forward, in training and in evaluation."""

    def __init__(self, always):
        super().__init__()
        self.online, self.target, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.target.requires_grad_(False)
        self.always = always

    def forward(self, x):
        if self.always or self.training:
            with torch.no_grad():
                for own, other in zip(self.target.parameters(), self.online.parameters(), strict=True):
                    own.lerp_(other, 0.1)
        return self.head(self.online(x).relu() + self.target(x).relu())


def test_a_momentum_encoder_that_a_measurement_moves_is_pointed_out(recwarn):
    with pytest.warns(UserWarning, match="forward pass of the model changes its parameters"):
        run(Wrapped(MomentumEncoder(always=True)), NeuralCollapseCallback())
    with pytest.warns(UserWarning, match="forward pass of the model changes its parameters"):
        measure(MomentumEncoder(always=True), [(ROWS, TARGET)], progress=False)
    recwarn.clear()
    measure(MomentumEncoder(always=False), [(ROWS, TARGET)], progress=False)
    assert not recwarn
