"""Models of torchvision, timm and transformers with random weights: the classifier is found, and its input measured.

Three of each kind are quick; all others are slow.
"""

import numpy as np
import pytest
import reference
import torch
from conftest import fit, measured_features, name_of_classifier
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_nc import NeuralCollapseCallback, measure

models = pytest.importorskip("torchvision.models")

QUICK = {
    *("resnet18", "vit_b_16", "squeezenet1_1"),
    *("resnet10t", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    *("BertForSequenceClassification", "GPT2ForSequenceClassification", "ViTForImageClassification"),
}
TORCHVISION_SIZES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224}
TOO_LARGE = {"regnet_y_128gf", "vit_h_14"}  # over 600 million weights each, and the code of their smaller siblings
TIMM = [
    "resnet10t",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "efficientnet_lite0",
    "mobilenetv3_small_050",
    "mixer_s32_224",
    "regnetx_002",
    "densenet121",
    "maxvit_rmlp_pico_rw_256",
    "coat_lite_tiny",
    "eca_nfnet_l0",
    "beit_base_patch16_224",
    "repvgg_a0",
    "ghostnet_050",
    "cait_xxs24_224",
    "mobilevit_xxs",
    "poolformer_s12",
    "efficientvit_b0",
    "caformer_s18",
]
TWO_HEADS = {
    "deit_tiny_distilled_patch16_224": "'head', 'head_dist'",
    "levit_128s": "'head.linear', 'head_dist.linear'",
    "crossvit_tiny_240": "'head.0', 'head.1'",
}
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 50, "num_labels": 4, "pad_token_id": 0}
IMAGE = {"image_size": 32, "num_labels": 4}
TRANSFORMERS = {
    "BertForSequenceClassification": ("classifier", TEXT | WIDTHS),
    "RobertaForSequenceClassification": ("classifier.out_proj", TEXT | WIDTHS),
    "DistilBertForSequenceClassification": (
        "classifier",
        TEXT | {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "GPT2ForSequenceClassification": ("score", TEXT | {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    "LlamaForSequenceClassification": ("score", TEXT | WIDTHS),
    "ViTForImageClassification": ("classifier", IMAGE | WIDTHS),
    "DeiTForImageClassification": ("classifier", IMAGE | WIDTHS),
    "SwinForImageClassification": (
        "classifier",
        IMAGE | {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNextForImageClassification": (
        "classifier",
        IMAGE | {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "ResNetForImageClassification": (
        "classifier.1",
        IMAGE | {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
}


def marked(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in names]


def last_with_ten_outputs(model):
    """From the list of modules, without a run of the model: the head is listed last, after the auxiliary ones."""
    pointwise = [(name, m.out_channels) for name, m in model.named_modules() if getattr(m, "kernel_size", 0) == (1, 1)]
    linear = [(name, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name, outputs in linear or pointwise if outputs == 10][-1]


def of_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    size = model.pretrained_cfg["input_size"][1] if model.pretrained_cfg.get("fixed_input_size") else 128
    return model, torch.randn(2, 3, size, size)


def of_transformers(name):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    return kind(kind.config_class(**TRANSFORMERS[name][1])).eval()


def samples(name, count=24):
    """As a tokenizer and a collator leave them: sentences of several lengths, padded at the right, or images."""
    labels = torch.arange(count) % 4
    if "Image" in name:
        return [{"pixel_values": torch.randn(3, 32, 32) + label, "labels": label} for label in labels]
    lengths = 4 + torch.arange(count) % 7
    masks = (torch.arange(10) < lengths[:, None]).long()
    return [
        {
            "input_ids": torch.randint(5 + 10 * label, 15 + 10 * label, (10,)) * mask,
            "attention_mask": mask,
            "labels": label,
        }
        for mask, label in zip(masks, labels, strict=True)
    ]


@pytest.mark.parametrize("name", marked(sorted(set(models.list_models(module=models)) - TOO_LARGE)))
def test_the_classifier_of_every_torchvision_model_is_found_and_its_input_gives_the_logits(name):
    size = TORCHVISION_SIZES.get(name, 32)
    arguments = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False  # it would take minutes
    model = models.get_model(name, weights=None, num_classes=10, **arguments).eval()
    head = last_with_ten_outputs(model)
    nn.init.normal_(model.get_submodule(head).weight)  # the head of a vision transformer starts at zero

    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert name_of_classifier(model, lambda: model(images)) == head
    if not name.startswith("squeezenet"):  # a ReLU and a mean over positions follow its classifier
        logits, features, parts = measured_features(model, (images, torch.arange(2)), classifier=head)
        torch.testing.assert_close(features @ parts[0].T + (0 if parts[1] is None else parts[1]), logits)


@pytest.mark.parametrize("name", marked(TIMM))
def test_the_classifier_of_timm_models_is_found_and_its_input_gives_the_logits(name):
    model, images = of_timm(name)
    head = last_with_ten_outputs(model)
    nn.init.normal_(model.get_submodule(head).weight)  # some heads start at zero
    with torch.no_grad():
        assert name_of_classifier(model, lambda: model(images)) == head
    logits, features, parts = measured_features(model, (images, torch.arange(2)))
    torch.testing.assert_close(features @ parts[0].T + (0 if parts[1] is None else parts[1]), logits)


@pytest.mark.parametrize("name", marked(TWO_HEADS))
def test_two_heads_whose_average_is_the_output_are_named_and_either_can_be_chosen(name):
    model, images = of_timm(name)
    with torch.no_grad(), pytest.raises(LookupError, match=f"several linear layers, {TWO_HEADS[name]}; name one"):
        name_of_classifier(model, lambda: model(images))
    logits, halves = None, []
    for head in TWO_HEADS[name].replace("'", "").split(", "):
        logits, features, parts = measured_features(model, (images, torch.arange(2)), classifier=head)
        halves.append(features @ parts[0].T + parts[1])
    torch.testing.assert_close(sum(halves) / 2, logits)


@pytest.mark.parametrize("name", marked(TRANSFORMERS))
@pytest.mark.filterwarnings("ignore:.*the classifier 'score' is called on every position")
def test_transformers_are_measured_from_batches_as_they_are_trained_on(name):
    model = of_transformers(name)
    head, inputs = model.get_submodule(TRANSFORMERS[name][0]), []
    rows = samples(name)
    loader = DataLoader(rows, 8)
    with torch.no_grad():
        assert name_of_classifier(model, lambda: model(**next(iter(loader)))) == TRANSFORMERS[name][0]
        handle = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for batch in loader:
            model(**batch)
        handle.remove()
    features = torch.cat(inputs).double().numpy()
    if features.ndim == 3:
        mask = np.array([row["attention_mask"].numpy() for row in rows])
        features = np.stack([row[kept == 1].mean(axis=0) for row, kept in zip(features, mask, strict=True)])
    labels, weight = np.arange(24) % 4, head.weight.detach().double().numpy()
    values = measure(model, loader, progress=False)
    expected = reference.all_metrics(features, labels, weight, np.zeros(4))
    assert values["nc1"] == pytest.approx(expected["nc1"], rel=1e-3)
    for metric in ("nc2_etf", "nc2_etf_centered", "nc2_of", "nc3", "nc3_centered"):
        assert values[metric] == pytest.approx(expected[metric], rel=1e-4)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertForSequenceClassification"])
def test_the_input_of_the_classifier_of_a_transformer_gives_the_logits(name):
    model = of_transformers(name)
    output, features, parts = measured_features(model, next(iter(DataLoader(samples(name), 4))))
    torch.testing.assert_close(features @ parts[0].T + parts[1], output.logits)


def test_the_token_that_a_language_model_classifies_from_can_be_chosen():
    model = of_transformers("LlamaForSequenceClassification")
    batch = next(iter(DataLoader(samples("text"), 4)))
    batch["input_ids"], batch["attention_mask"] = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    output, features, parts = measured_features(model, batch, pool="last")
    torch.testing.assert_close(features @ parts[0].T, output.logits)
    with pytest.warns(UserWarning, match="'score' is called on every position of a sequence.*pool='last'"):
        measure(model, [batch], progress=False)


def test_the_mean_of_a_layer_over_a_sequence_leaves_the_padding_out():
    model, hidden = of_transformers("BertForSequenceClassification"), []
    rows = samples("text")
    layer = model.bert.encoder.layer[1]
    handle = layer.register_forward_hook(
        lambda module, args, output: hidden.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        for batch in DataLoader(rows, 8):
            model(**batch)
    handle.remove()
    means = [
        tokens[: int(row["attention_mask"].sum())].mean(axis=0)
        for tokens, row in zip(torch.cat(hidden).double().numpy(), rows, strict=True)
    ]
    values = measure(model, DataLoader(rows, 8), layers=["bert.encoder.layer.1"], progress=False)
    expected = reference.nc1(np.array(means), np.arange(24) % 4)
    assert values["bert.encoder.layer.1/nc1"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"mode": "online"}], ids=["exact", "online"])
def test_a_transformer_is_measured_while_lightning_trains_it(tmp_path, arguments):
    class Classifier(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = of_transformers("BertForSequenceClassification")

        def forward(self, **batch):
            return self.model(**batch)

        def training_step(self, batch, batch_idx):
            return self(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    callback = NeuralCollapseCallback(layers=["*encoder.layer.1"], strict=True, **arguments)
    model, loader = Classifier(), DataLoader(samples("text"), 8)
    fit(tmp_path, [callback], data=loader, model=model, max_epochs=2)
    assert [row["epoch"] for row in callback.history] == [0, 1]
    last = callback.history[-1]
    assert np.isfinite([value for key, value in last.items() if key.startswith("nc/")]).all()
    assert "nc/model.bert.encoder.layer.1/nc1" in last
    if not arguments:
        alone = measure(model, loader, layers=["*encoder.layer.1"], progress=False)
        assert {key: last[f"nc/{key}"] for key in alone} == pytest.approx(alone, rel=1e-5)
