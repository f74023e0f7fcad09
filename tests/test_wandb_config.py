"""The configuration that logs the ResNet18 example to Weights & Biases, with the real client, offline."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from lightning_nc import History
from lightning_nc.__main__ import main
from lightning_nc.runs import metrics_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import resnet18

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"
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


@pytest.mark.slow
def test_a_run_stays_on_this_machine_and_holds_the_values_of_the_csv_file_and_the_figures_of_the_page(directory):
    import wandb

    resnet18.main(f"{RECIPE} {QUICK}".split())
    wandb.teardown()  # waits until the file is closed
    (run,) = directory.glob("results/wandb/offline-run-*")
    known, logged = History.read("results/resnet18/version_0"), History.read(run)
    assert [metrics_of(row) for row in logged] == [pytest.approx(metrics_of(row), rel=1e-6) for row in known]
    page = (ROOT / "docs" / "wandb.md").read_text(encoding="utf-8")
    for kind, folder in {"image": "images", "table": "table"}.items():
        found = {re.sub(r"_\d+_\w+$", "", file.name.split(".")[0]) for file in run.rglob(f"media/{folder}/figures/*")}
        assert found == set(re.findall(rf"\| `figures/(\w+)` \| {kind}", page))
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


def test_the_command_of_the_sweep_on_the_page_is_one_that_the_example_takes(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "wandb.md").read_text(encoding="utf-8")
    sweep = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    *_, program, subcommand, first, second, online, _ = sweep["command"]
    chosen = [f"--{name}={choice['values'][0]}" for name, choice in sweep["parameters"].items()]
    assert (program, Path(sweep["program"])) == ("${program}", Path("examples/resnet18.py"))
    with pytest.raises(SystemExit, match="0"):
        resnet18.main([subcommand, first, second, online, *chosen, "--print_config"])
    text = capsys.readouterr().out
    assert "offline: false" in text
    assert "weight_decay: 0.0005" in text
    assert sweep["metric"]["name"] == "nc/nc1"
