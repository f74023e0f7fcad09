"""The pictures of docs/gallery.md: one training on scikit-learn's digits, and every figure of it.

    python examples/gallery.py                             # a minute on one core
    python examples/gallery.py --out docs/images/gallery   # the pictures of the documentation

The picture of the report is a screenshot, so it is made only if selenium and Chromium are installed.
"""

import os
import shutil
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapseCallback, log_spaced
from lightning_nc.__main__ import main as lightning_nc

METRICS = ("nc1", "nc2_etf_centered", "nc2_of", "nc3_centered", "ncc_error")
FIGURES = ("panels", "depth", "frames", "classes", "geometry", "space")


class Perceptron(LightningModule):
    """Four hidden layers with batch normalization and ReLU, and a linear classifier."""

    def __init__(self, weight_decay: float) -> None:
        super().__init__()
        self.weight_decay = weight_decay
        self.body = nn.Sequential(
            *[nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(4)]
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 64) pixels to (B, 10) logits."""
        return self.head(self.body(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, target = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, target)
        values = {"train_loss": loss, "train_accuracy": (logits.argmax(dim=1) == target).float().mean()}
        self.log_dict(values, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict:
        """SGD with momentum and weight decay; the learning rate falls as a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def train(
    run: Path, epochs: int, seed: int, weight_decay: float = 5e-3, classes: Sequence[int] = (0, 1, 2)
) -> NeuralCollapseCallback:
    """Train on the digits, with values and a checkpoint in the directory ``run``; the callback has the measurements."""
    seed_everything(seed, verbose=False)
    images, target = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset((images.float() - images.mean()) / images.std(), target)
    schedule = log_spaced(16)
    callback = NeuralCollapseCallback(["body.?"], metrics=METRICS, every_n_epochs=schedule, geometry=classes)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        logger=CSVLogger(run, name="", version=""),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Perceptron(weight_decay), DataLoader(data, 100, shuffle=True, drop_last=True))
    return callback


def draw(out: Path, epochs: int) -> None:
    """Every figure of a training, and one of several trainings; their files are below the current directory."""
    plane = train(Path("digits"), epochs, seed=0)
    space = train(Path("space"), epochs, seed=0, classes=(0, 1, 2, 3))
    drawn = (
        plane.plot,
        plane.plot_depth,
        plane.plot_frames,
        plane.plot_classes,
        plane.plot_geometry,
        space.plot_geometry,
    )
    for name, figure in zip(FIGURES, drawn, strict=True):
        figure().savefig(out / f"{name}.png", dpi=100)
    plane.animate(out / "collapse.gif")

    runs = {f"weight decay {decay} seed {seed}": (decay, seed) for decay in (5e-3, 5e-4) for seed in (0, 1, 2)}
    for run, (decay, seed) in runs.items():
        train(Path(run), epochs // 2, seed, decay)
    shown = ("nc1", "nc2_etf_centered", "nc2_of", "nc3_centered")
    lightning_nc(["plot", *runs, "--overlay", "--group", "--metrics", *shown, "-o", str(out / "overlay.png")])

    lightning_nc(["report", "digits", "-o", "report.html"])
    photograph(Path("report.html"), out / "report.png")


def photograph(page: Path, picture: Path) -> None:
    """The top of a page as Chromium shows it."""
    driver = shutil.which("chromedriver")
    if driver is None or find_spec("selenium") is None:
        print(f"{picture} is not drawn: it needs selenium and chromedriver")
        return
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for option in ("headless=new", "no-sandbox", "hide-scrollbars", "window-size=700,1200"):
        options.add_argument(f"--{option}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.get(page.resolve().as_uri())
    browser.save_screenshot(str(picture))
    browser.quit()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and draw."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100, help="passes over the digits")
    parser.add_argument("--out", type=Path, default=Path("results/gallery"), help="directory of the pictures")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    home, out = Path.cwd(), args.out.resolve()
    with TemporaryDirectory() as scratch:
        os.chdir(scratch)  # so that the report names the run and not where its files happen to be
        try:
            draw(out, args.epochs)
        finally:
            os.chdir(home)
    print(f"pictures in {args.out}")


if __name__ == "__main__":
    main()
