"""Scenes of classes that collapse, for the tests of pictures."""

import torch

from lightning_nc.measuring.classes import MeasuredClasses
from lightning_nc.moments import ClassMoments
from lightning_nc.scenes import scene


def measured(features, target, classes, weight=None, chosen=(), each=40):
    """What a measurement keeps of these features, with the first samples of the chosen classes."""
    moments = ClassMoments.zeros(classes, features.shape[1], "cpu", scatter=False)
    moments.update(features, target)
    return MeasuredClasses(moments, weight, {label: features[target == label][:each] for label in chosen})


def collapsing(epochs=5, classes=6, chosen=(0, 1, 2), dimensions=8, each=12, stage="train"):
    """Scenes in which the noise within classes halves with every epoch, and features grow."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    means, weight, noise = 3 * draw(classes, dimensions), draw(classes, dimensions), draw(classes * each, dimensions)
    target = torch.arange(classes).repeat(each)
    return [
        scene(
            measured(
                (1 + epoch) * (means[target] + 2.0**-epoch * noise), target, classes, weight + epoch * means, chosen
            ),
            epoch,
            10 * epoch,
            stage,
        )
        for epoch in range(epochs)
    ]
