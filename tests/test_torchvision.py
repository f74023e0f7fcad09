import pytest
import torch
from torch import nn

from lightning_nc.features import find_classifier
from lightning_nc.probe import Probe

models = pytest.importorskip("torchvision.models")

SIZES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224}
TOO_LARGE = {"regnet_y_128gf", "vit_h_14"}  # over 600 million weights each, and the code of their smaller siblings


def last_with_ten_outputs(model):
    """From the list of modules, without a run of the model: the head is listed last, after the auxiliary ones."""
    pointwise = [(name, m.out_channels) for name, m in model.named_modules() if getattr(m, "kernel_size", 0) == (1, 1)]
    linear = [(name, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name, outputs in linear or pointwise if outputs == 10][-1]


def measured_features(model, batch, **arguments):
    """What the model gives for a batch with one sample of each label, the features that were measured, and the probe."""
    probe, moments = Probe(**arguments), {}
    with torch.no_grad():
        probe.attach(model, batch)
        probe.arm(batch)
        output = probe.forward(model, batch)
        probe.absorb(moments, 0)
    probe.detach()
    present = moments[""].counts > 0
    assert moments[""].counts[present].eq(1).all()  # so that the mean of a class is its sample
    return output, moments[""].means[present].float(), probe.classifier_parts()


@pytest.mark.parametrize("name", sorted(set(models.list_models(module=models)) - TOO_LARGE))
def test_the_classifier_of_every_torchvision_model_is_found_and_its_input_gives_the_logits(name):
    size = SIZES.get(name, 32)
    arguments = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False  # it would take minutes
    model = models.get_model(name, weights=None, num_classes=10, **arguments).eval()
    head = last_with_ten_outputs(model)
    nn.init.normal_(model.get_submodule(head).weight)  # the head of a vision transformer starts at zero

    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert find_classifier(model, lambda: model(images)) == head
    if not name.startswith("squeezenet"):  # a ReLU and a mean over positions follow its classifier
        logits, features, parts = measured_features(model, (images, torch.arange(2)), classifier=head)
        torch.testing.assert_close(features @ parts["weight"].T + parts.get("bias", 0), logits)
