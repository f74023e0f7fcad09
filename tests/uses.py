"""One real use of the plain install and of each extra: ``python uses.py plain`` or the name of an extra.

It is run where only that extra is installed, so it imports nothing else, and neither conftest nor pytest.
"""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]


def data():
    """Three classes of four features, labels and rows in one data set."""
    generator, target = torch.Generator().manual_seed(0), torch.arange(3).repeat(20)
    return TensorDataset(torch.eye(3, 4)[target] + 0.1 * torch.randn(60, 4, generator=generator), target)


def fit(logger):
    """Train for two epochs with the callback, which is returned."""
    from lightning.pytorch import LightningModule, Trainer

    from lightning_nc import NeuralCollapseCallback

    class Classifier(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = NeuralCollapseCallback(geometry=(0, 1, 2), strict=True)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", logger=logger, callbacks=[callback], **options)
    trainer.fit(Classifier(), DataLoader(data(), 10))
    assert [row["epoch"] for row in callback.history] == [0, 1]
    assert float(trainer.callback_metrics["nc/nc1"]) == callback.history[-1]["nc/nc1"] > 0
    return callback


def saved_run():
    """A CSV file of two epochs."""
    from lightning_nc import History

    history = History("run.csv")
    for epoch in range(2):
        history.append({"nc1": 0.5**epoch, "nc2_etf": 0.4**epoch, "nc3": 0.3**epoch}, epoch=epoch)
    return history


def command(*arguments):
    """Run ``lightning-nc``."""
    from lightning_nc.__main__ import main

    assert main(arguments) == 0


def refused(*arguments):
    """What ``lightning-nc`` says where it fails."""
    from lightning_nc.__main__ import main

    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(arguments) == 1
    return said.getvalue()


def images():
    """A module of one's own with the data of a model."""
    Path("images.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "def loader():\n    return DataLoader(TensorDataset(torch.randn(9, 3, 32, 32), torch.arange(3).repeat(3)), 3)\n"
    )
    return ("--data", "images:loader")


def plain():
    """Fit, measure, keep and read rows with torch, Lightning and torchmetrics. What needs more says how to install it."""
    from lightning.pytorch.loggers import CSVLogger

    import lightning_nc
    from lightning_nc import NC1, History, measure

    assert (Path(lightning_nc.__file__).parent / "py.typed").exists()
    callback = fit(CSVLogger(".", name="fit"))
    assert History.read("fit/version_0")[-1]["nc/nc1"] == callback.history[-1]["nc/nc1"]
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    rows, target = data().tensors
    metric = NC1(3, 8)
    metric.update(model[:2](rows), target)
    history = History("own.csv")
    history.append(measure(model, DataLoader(data(), 10), progress=False), epoch=0)
    assert abs(float(metric.compute()) / history[0]["nc/nc1"] - 1) < 1e-5
    assert History.read("own.csv") == history
    script = Path(sysconfig.get_path("scripts")) / "lightning-nc"
    assert "report" in subprocess.check_output([script, "--help"], text=True)
    Path("run-1.wandb").touch()
    torch.save(model.state_dict(), "model.pt")
    assert "needs matplotlib: pip install matplotlib" in refused("plot", "own.csv")
    assert 'a report needs matplotlib: pip install "lightning-neural-collapse[report]"' in refused("report", "own.csv")
    assert 'needs wandb: pip install "lightning-neural-collapse[wandb]"' in refused("plot", "run-1.wandb")
    for library, install in (("timm", "timm"), ("transformers", '"lightning-neural-collapse[huggingface]"')):
        said = refused("measure", "model.pt", "--model", f"{library}:resnet18", *images())
        assert f"needs {library}: pip install {install}" in said
    with contextlib.suppress(ImportError):
        import lightning_nc.huggingface

        raise AssertionError("transformers is installed")


def examples():
    """A figure, and the first example."""
    saved_run().plot().savefig("own.png")
    command("plot", "run.csv", "-o", "plot.png")
    sys.path.insert(0, str(ROOT / "examples"))
    sys.argv = [
        "resnet18.py",
        "fit",
        "--config",
        str(ROOT / "examples/configs/digits.yaml"),
        "--trainer.fast_dev_run=true",
    ]
    runpy.run_path(str(ROOT / "examples/resnet18.py"), run_name="__main__")
    assert all(Path(name).stat().st_size for name in ("own.png", "plot.png"))


def wandb():
    """Log a run to W&B without a server, with its figures, and plot what was logged."""
    from lightning.pytorch.loggers import WandbLogger

    from lightning_nc import History

    logger = WandbLogger(project="uses", offline=True, save_dir=".")
    callback = fit(logger)
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    assert list((folder / "files").rglob("*.png"))
    logged, kept = ([row["nc/nc1"] for row in rows] for rows in (History.read(folder), callback.history))
    assert logged == kept
    command("plot", str(folder), "-o", "wandb.png")


def report():
    """A report and a film."""
    saved_run()
    command("report", "run.csv", "-o", "report.html")
    assert "plotly" in Path("report.html").read_text(encoding="utf-8")
    assert fit(False).animate("film.mp4").stat().st_size


def huggingface():
    """The callback of the Trainer of transformers."""
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    from lightning_nc.huggingface import NeuralCollapseCallback

    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_attention_heads=2, num_labels=3, **size))
    images = [{"pixel_values": torch.randn(1, 8, 8), "labels": number % 3} for number in range(12)]
    callback = NeuralCollapseCallback(strict=True)
    options = {"num_train_epochs": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    Trainer(model, TrainingArguments("out", **options), train_dataset=images, callbacks=[callback]).train()
    assert callback.history[-1]["nc/nc1"] > 0


def zoo():
    """A model of timm by its name on the command line, and one that PEFT has adapted."""
    import timm
    from peft import LoraConfig, get_peft_model

    from lightning_nc import measure

    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "model.pt")
    command("measure", "model.pt", "--model", "timm:test_resnet", *images(), "-o", "nc.csv")
    assert "nc/nc1" in Path("nc.csv").read_text()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    assert measure(adapted, DataLoader(data(), 10), progress=False)["nc1"] > 0


def docs():
    """Build the pages."""
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", ROOT / "docs", "html"], check=True
    )
    assert Path("html/index.html").exists()


def main(extra):
    """Run one use in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        globals()[extra]()
        os.chdir(ROOT)


if __name__ == "__main__":
    main(sys.argv[1])
