"""The configurations of `ufm.py`: all settings of a run, the paper's figures, and the command line."""

import math
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from lightning_nc import theory


@dataclass(frozen=True)
class Configuration:
    """One model with its regularization, its random start and its gradient descent.

    Args:
        model: plain (eq. 3), linear (eq. 23, two levels of features) or relu (eq. 24).
        loss: mse or cross-entropy.
        num_classes: K.
        num_features: d, at least K.
        samples_per_class: n.
        lambda_w: regularization of the last layer's weight (W; W2 in the extended models).
        lambda_w1: regularization of the weight between the levels (extended models).
        lambda_h: regularization of the features (H; H1 in the extended models).
        lambda_b: regularization of the bias: inf means no bias, 0 a bias without penalty (plain model).
        scale_w: standard deviation of the last weight and of the bias at the start.
        scale_w1: standard deviation of the weight between the levels at the start.
        scale_h: standard deviation of the features at the start.
        step: step size of gradient descent.
        iterations: number of steps.
        every: number of steps between two measurements; the last iteration is always measured.
    """

    model: Literal["plain", "linear", "relu"] = "plain"
    loss: Literal["mse", "cross-entropy"] = "mse"
    num_classes: int = 4
    num_features: int = 20
    samples_per_class: int = 50
    lambda_w: float = 0.005
    lambda_w1: float = 0.005
    lambda_h: float = 0.005
    lambda_b: float = math.inf
    scale_w: float = 0.1
    scale_w1: float = 0.1
    scale_h: float = 0.1
    step: float = 0.1
    iterations: int = 40_000
    every: int = 1000

    def __post_init__(self) -> None:
        if self.num_features < self.num_classes:
            raise ValueError(
                f"the theorems need num_features >= num_classes, got {self.num_features} < {self.num_classes}; "
                f"pass --num-features {self.num_classes} or more"
            )
        if self.model != "plain" and self.lambda_b != math.inf:
            raise ValueError(
                f"the {self.model} model has no bias, got lambda_b = {self.lambda_b}; leave out --lambda-b"
            )
        if self.every < 1 or self.iterations < 1 or self.step <= 0:
            raise ValueError(
                f"expected every >= 1, iterations >= 1 and step > 0, "
                f"got every = {self.every}, iterations = {self.iterations}, step = {self.step}"
            )
        self.minimum()  # raises if a regularization or a size is out of range

    def minimum(self) -> theory.Minimum:
        """The global minimum with the MSE loss, in closed form."""
        K, n = self.num_classes, self.samples_per_class
        if self.model == "plain":
            return theory.plain_ufm(K, n, self.lambda_w, self.lambda_h, self.lambda_b)
        return theory.extended_ufm(K, n, self.lambda_w, self.lambda_w1, self.lambda_h)

    @cached_property
    def measured_at(self) -> list[int]:
        """The iterations that are measured: the start, every `every` steps, and the end."""
        return [*range(0, self.iterations, self.every), self.iterations]


unit = {"scale_w": 1.0, "scale_h": 1.0}
larger = {"num_classes": 5, "samples_per_class": 100, "lambda_h": 0.001, "every": 2000}
FIGURES = {
    1: Configuration(**unit),
    2: Configuration(**unit, lambda_b=0.0),
    3: Configuration(model="linear"),
    4: Configuration(model="relu", iterations=600_000, every=10_000),
    6: Configuration(**unit, **larger, iterations=160_000),
    7: Configuration(**unit, **larger, iterations=160_000, lambda_b=0.0),
    8: Configuration(model="linear", **larger, lambda_w1=0.0025, iterations=140_000),
    9: Configuration(model="relu", **larger, lambda_w1=0.0025, scale_h=0.2, iterations=200_000),
}


def parse(argv: Sequence[str], description: str) -> tuple[Namespace, Configuration]:
    """The options of the command line and the configuration that they describe; exits if they do not fit together."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below")
    parser.add_argument("--figure", type=int, help=f"one of {', '.join(map(str, FIGURES))}")
    parser.add_argument("--theorem", type=str, help="5.1: how noise on the features attenuates the weight")
    parser.add_argument("--sweep", type=str, help="lambda-b: the frame as a function of the bias's regularization")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds to run together, starting with --seed")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="directory for the CSV and PNG files")
    parser.add_class_arguments(Configuration)
    # Options may be written with dashes, as in --num-classes.
    argv = [re.sub(r"^--[\w-]+", lambda match: "--" + match[0][2:].replace("-", "_"), word) for word in argv]
    chosen = parser.parse_args(argv)
    _check(parser, chosen)
    # --figure, --theorem and --sweep change the defaults; options that are given explicitly still count.
    if chosen.figure:
        parser.set_defaults(asdict(FIGURES[chosen.figure]))
    elif chosen.theorem or chosen.sweep:
        parser.set_defaults(asdict(replace(FIGURES[1], iterations=100_000, every=10_000)))
    chosen = parser.parse_args(argv)
    try:
        return chosen, Configuration(**{field.name: chosen[field.name] for field in fields(Configuration)})
    except ValueError as error:
        parser.error(str(error))


def _check(parser: ArgumentParser, chosen: Namespace) -> None:
    for option, known in (("figure", FIGURES), ("theorem", ("5.1",)), ("sweep", ("lambda-b", "lambda_b"))):
        if chosen[option] is not None and chosen[option] not in known:
            listed = " ".join(map(str, known))
            hint = "; for figures 5 and 10, practical networks, run examples/resnet18.py" if option == "figure" else ""
            parser.error(f"--{option} must be one of {listed}, got {chosen[option]}{hint}")
    given = [f"--{option}" for option in ("figure", "theorem", "sweep") if chosen[option] is not None]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} cannot be combined; run them one after the other")
    if (chosen.theorem or chosen.sweep) and (chosen.model != "plain" or chosen.loss != "mse" or chosen.seeds > 1):
        parser.error(
            f"{given[0]} runs the plain model with MSE loss and one seed; leave out --model, --loss and --seeds"
        )
    if chosen.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {chosen.seeds}")
