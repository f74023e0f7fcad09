"""The configuration that logs the ResNet18 example to Weights & Biases, with the real client, offline."""

import json
import sys
from pathlib import Path

import pytest

from lightning_nc import History
from lightning_nc.__main__ import main
from lightning_nc.runs import metrics_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import resnet18

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
RECIPE = f"fit --config {CONFIGS / 'digits.yaml'} --config {CONFIGS / 'wandb.yaml'}"
QUICK = (
    "--trainer.max_epochs 1 --trainer.accelerator cpu --trainer.enable_progress_bar false --model.width 4 "
    "--trainer.enable_model_summary false --data.samples_per_class 20 --trainer.limit_val_batches 0"
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_a_run_stays_on_this_machine_and_its_values_and_pictures_are_those_of_the_csv_file(directory):
    import wandb

    resnet18.main(f"{RECIPE} {QUICK}".split())
    wandb.teardown()  # waits until the file is closed
    (run,) = directory.glob("results/wandb/offline-run-*")
    known, found = History.read("results/resnet18/version_0"), History.read(run)
    assert [metrics_of(row) for row in found] == [pytest.approx(metrics_of(row), rel=1e-6) for row in known]
    pictures = {file.name.rpartition("_")[0].rpartition("_")[0] for file in run.rglob("media/images/figures/*.png")}
    assert {"neural_collapse", "class_means"} <= pictures
    (table,) = run.rglob("media/table/figures/final_values*.json")
    assert dict(json.loads(table.read_text())["data"])["nc/nc1"] == pytest.approx(known[-1]["nc/nc1"])
    assert Path("results/resnet18/version_0/checkpoints/last.ckpt").is_file()
    assert main(["plot", str(run), "-o", "wandb.png"]) == 0
    assert Path("wandb.png").is_file()


@pytest.mark.parametrize(("option", "offline"), [("", True), ("--trainer.logger.init_args.offline false", False)])
def test_one_option_decides_whether_the_run_goes_to_the_server(option, offline, capsys):
    with pytest.raises(SystemExit, match="0"):
        resnet18.main(f"{RECIPE} {option} --print_config".split())
    text = capsys.readouterr().out.partition("WandbLogger")[2].partition("callbacks:")[0]
    assert f"offline: {str(offline).lower()}" in text
    assert "name: null" in text  # W&B names every run itself
