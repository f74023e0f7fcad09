import pytest
import torch
from conftest import found, measured_features
from torch import nn

models = pytest.importorskip("torchvision.models")

SIZES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224}
TOO_LARGE = {"regnet_y_128gf", "vit_h_14"}  # over 600 million weights each, and the code of their smaller siblings


def last_with_ten_outputs(model):
    """From the list of modules, without a run of the model: the head is listed last, after the auxiliary ones."""
    pointwise = [(name, m.out_channels) for name, m in model.named_modules() if getattr(m, "kernel_size", 0) == (1, 1)]
    linear = [(name, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name, outputs in linear or pointwise if outputs == 10][-1]


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
        assert found(model, lambda: model(images)) == head
    if not name.startswith("squeezenet"):  # a ReLU and a mean over positions follow its classifier
        logits, features, parts = measured_features(model, (images, torch.arange(2)), classifier=head)
        torch.testing.assert_close(features @ parts[0].T + (0 if parts[1] is None else parts[1]), logits)
