"""The UFM example: its descent against naive autograd, its results against theory, its use of Lightning, its command."""

import csv
import sys
import warnings
from dataclasses import replace
from inspect import signature
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_nc import NeuralCollapseCallback, theory

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import ufm
import ufm_report
from ufm_descent import descend
from ufm_options import FIGURES, Configuration

CONFIGURATIONS = {
    "plain": FIGURES[1],
    "free bias": FIGURES[2],
    "regularized bias": replace(FIGURES[1], lambda_b=0.3),
    "linear": FIGURES[3],
    "relu": FIGURES[4],
}
SMALL = Configuration(
    num_classes=3,
    num_features=5,
    samples_per_class=4,
    lambda_w=0.02,
    lambda_w1=0.02,
    lambda_h=0.02,
    scale_w=0.5,
    scale_w1=0.5,
    scale_h=0.5,
    iterations=4000,
    every=500,
)


def trainer(tmp_path, epochs, *callbacks, **options):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **({"enable_checkpointing": False} | options),
    )


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*Checkpoint directory.*")
        yield


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_descent_follows_naive_autograd_for_a_thousand_steps(name, loss):
    c = replace(CONFIGURATIONS[name], loss=loss)
    naive, fast = ufm.build(c, 3), ufm.build(c, 3)
    optimizer = torch.optim.SGD(naive.parameters(), lr=c.step)
    for _ in range(4):
        for _ in range(250):
            optimizer.zero_grad()
            naive.objective().backward()
            optimizer.step()
        descend([fast], 250)
        for expected, got in zip(naive.parameters(), fast.parameters(), strict=True):
            assert (got - expected).norm() < 1e-12 * expected.norm()
    assert abs(fast.objective() / naive.objective() - 1) < 1e-12


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_seeds_that_descend_together_end_where_they_end_alone(name):
    c = CONFIGURATIONS[name]
    together = [ufm.build(c, seed) for seed in range(3)]
    descend(together, 300)
    for seed, model in enumerate(together):
        alone = ufm.build(c, seed)
        descend([alone], 300)
        for expected, got in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_the_objective_is_the_equation_of_the_paper_term_by_term():
    for model in ("plain", "linear", "relu"):
        c = replace(SMALL, model=model, lambda_b=0.7 if model == "plain" else float("inf"))
        m = ufm.build(c, 1)
        expected = 0.0
        for i, label in enumerate(m.labels):
            h = m.features[i]
            if model != "plain":
                h = m.hidden.weight @ h
            if model == "relu":
                h = h.clamp(min=0)
            output = m.classifier.weight @ h + (m.classifier.bias if model == "plain" else 0)
            expected += ((output - torch.eye(3, dtype=torch.float64)[label]) ** 2).sum() / (2 * len(m.labels))
        factors = {0.02: [m.features, m.classifier.weight] + ([] if model == "plain" else [m.hidden.weight])}
        factors[0.7] = [m.classifier.bias] if model == "plain" else []
        expected += sum(weight / 2 * (x**2).sum() for weight, group in factors.items() for x in group)
        assert m.objective().item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize(
    ("figure", "iterations", "frame"), [(1, 30_000, "nc2_of"), (2, 30_000, "nc2_etf"), (3, 25_000, "nc2_of")]
)
def test_the_figures_reach_the_minimum_and_the_frame_of_the_theory(figure, iterations, frame):
    c = replace(FIGURES[figure], iterations=iterations, every=5000)
    model, table = ufm.run(c, 0)
    assert table[-1]["objective"] == pytest.approx(c.minimum().objective, rel=1e-9)
    assert table[-1]["nc1"] < 1e-12
    assert table[-1][frame] < 1e-6
    assert table[-1]["nc3"] < 1e-6
    assert "reached the global minimum to 1e-09" in ufm_report.verdict(model, table[-1])


def test_the_callback_measures_the_same_as_the_formulas_on_all_features(tmp_path):
    for model in ("plain", "linear", "relu"):
        m = ufm.build(replace(SMALL, model=model, every=50), 0)
        layers = {"plain": None, "linear": ["first"], "relu": ["first", "hidden"]}[model]
        collapse = NeuralCollapseCallback(layers=layers, metrics=tuple(ufm.METRICS), strict=True)
        trainer(tmp_path, 3, collapse).fit(m)
        expected = ufm.measure_now(m, 150)
        values = {key: value for key, value in collapse.history[-1].items() if key.startswith("nc/")}
        # The callback has no weight for an inner layer, so only the example computes its NC3.
        inner = {"plain": 0, "linear": 1, "relu": 2}[model]
        assert len(values) == 5 + 4 * inner
        for key, value in values.items():
            assert value == pytest.approx(expected[ufm.COLUMNS[key]], rel=1e-9, abs=1e-14)


def test_a_block_of_iterations_is_one_global_step(tmp_path):
    m, alone = ufm.build(SMALL, 0), ufm.build(SMALL, 0)
    run = trainer(tmp_path, 2)
    run.fit(m)
    assert run.global_step == 2
    descend([alone], 2 * SMALL.every)
    torch.testing.assert_close(m.features, alone.features, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("iterations", "every", "measured"), [(25, 10, [0, 10, 20, 25]), (3, 100, [0, 3]), (2, 1, [0, 1, 2])]
)
def test_a_run_takes_exactly_its_iterations_and_measures_after_the_last(iterations, every, measured):
    c = replace(SMALL, model="linear", iterations=iterations, every=every)
    naive = ufm.build(c, 0)
    optimizer = torch.optim.SGD(naive.parameters(), lr=c.step)
    for _ in range(iterations):
        optimizer.zero_grad()
        naive.objective().backward()
        optimizer.step()
    model, table = ufm.run(c, 0)
    models, tables = ufm.run_together([c, c], [0, 1])
    for end, rows in ((model, table), (models[0], tables[0])):
        assert [row["iteration"] for row in rows] == measured
        assert rows[-1]["objective"] == pytest.approx(naive.objective().item(), rel=1e-12)
        torch.testing.assert_close(end.features, naive.features, rtol=1e-11, atol=1e-13)


def test_early_stopping_on_nc1_ends_a_run_and_checkpoints_keep_the_best(tmp_path):
    stop = EarlyStopping("nc/nc1", stopping_threshold=1e-3, patience=1000, mode="min")
    keep = ModelCheckpoint(tmp_path, monitor="nc/nc1", mode="min", filename="best")
    run = trainer(tmp_path, 200, NeuralCollapseCallback(), stop, keep, enable_checkpointing=True)
    m = ufm.build(replace(SMALL, iterations=20_000, every=100), 0)
    run.fit(m)
    assert run.current_epoch < 200
    assert run.callback_metrics["nc/nc1"] < 1e-3
    best = torch.load(keep.best_model_path, weights_only=False)["state_dict"]["features"]
    torch.testing.assert_close(best, m.features.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("model", ["plain", "linear", "relu"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, model):
    c = replace(SMALL, model=model, every=100)
    whole = ufm.build(c, 0)
    collapse = NeuralCollapseCallback()
    trainer(tmp_path, 6, collapse).fit(whole)
    save = ModelCheckpoint(tmp_path / model, filename="third", save_on_train_epoch_end=True)
    trainer(tmp_path, 3, NeuralCollapseCallback(), save, enable_checkpointing=True).fit(ufm.build(c, 0))
    resumed, again = ufm.build(c, 1), NeuralCollapseCallback()
    runner = trainer(tmp_path, 6, again)
    since_2_6 = "weights_only" in signature(runner.fit).parameters
    trusted = {"weights_only": False} if since_2_6 else {}
    runner.fit(resumed, ckpt_path=save.best_model_path, **trusted)
    for expected, got in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, got)
    assert again.history == collapse.history


def test_a_dead_sample_is_counted_and_its_level_named():
    c = replace(SMALL, model="relu", iterations=40_000)
    m = ufm.build(c, 0)
    minimum = c.minimum()
    with torch.no_grad():
        m.classifier.weight.copy_(minimum.weight(5))
        m.hidden.weight.copy_(minimum.first_weight(5))
        m.features.copy_(minimum.first_class_means(5).repeat_interleave(4, dim=0))
        m.features[2] = -m.features[2]
    descend([m], 40_000)
    assert ufm_report.dead_samples(m) == [1, 0, 0]
    said = ufm_report.verdict(m, ufm.measure_now(m, 40_000))
    assert "stuck at the level of 1 dead sample (per class [1, 0, 0])" in said


def test_the_levels_of_dead_samples_belong_to_the_squared_error_alone():
    names = {}
    for loss in ("mse", "cross-entropy"):
        m = ufm.build(replace(SMALL, model="relu", loss=loss), 0)
        with torch.no_grad():
            m.hidden.weight.copy_(torch.eye(5))
            m.features.abs_()
            m.features[2].neg_()
        names[loss] = list(ufm_report.dead_levels([m]))
    assert names == {"mse": ["1 dead"], "cross-entropy": []}


def test_a_unit_that_two_classes_share_keeps_its_imbalance_and_slows_descent_to_one_over_t():
    c = replace(SMALL, model="relu")
    m, minimum = ufm.build(c, 0), c.minimum()
    with torch.no_grad():
        m.classifier.weight.copy_(minimum.weight(5))
        m.hidden.weight.copy_(minimum.first_weight(5))
        m.features.copy_(minimum.first_class_means(5).repeat_interleave(4, dim=0))
        for weight in (m.classifier.weight.T, m.hidden.weight):  # the fourth unit answers to the first two classes
            weight[3] = 0.1 * weight[0] + 0.0999 * weight[1]
    squares = []
    for _ in range(4):
        descend([m], 5000)
        squares.append(m.levels()[""][0].detach()[[0, 4], 3].square())
    first, second = torch.stack(squares).T
    assert (first - second).tolist() == pytest.approx([(first - second)[0].item()] * 4, rel=1e-2)
    grown = (1 / second).diff()
    assert grown.tolist() == pytest.approx([grown.mean().item()] * 3, rel=1e-2)
    said = ufm_report.verdict(m, ufm.measure_now(m, 20_000))
    assert (
        "slowly approaching the global minimum, orthogonal frame: two classes still share each of 1 hidden unit" in said
    )


def test_a_rank_deficient_start_is_named_as_the_stationary_point_it_ends_at():
    c = replace(SMALL, model="linear")
    m = ufm.build(c, 0)
    with torch.no_grad():
        m.classifier.weight[2] = 0
        m.features[8:] = 0
    descend([m], 20_000)
    assert "stuck at a stationary point of rank 2" in ufm_report.verdict(m, ufm.measure_now(m, 20_000))


def test_an_unfinished_run_says_to_which_tolerance_it_has_not_converged():
    m = ufm.build(SMALL, 0)
    assert "not converged to 1e-09 after 0 iterations; pass more --iterations" in ufm_report.verdict(
        m, ufm.measure_now(m, 0)
    )


def test_a_run_that_diverges_is_told_to_take_smaller_steps():
    m = ufm.build(replace(SMALL, step=100.0), 0)
    descend([m], 500)
    assert "diverged; pass a --step smaller than 100" in ufm_report.verdict(m, ufm.measure_now(m, 500))


def test_too_strong_a_regularization_descends_to_zero():
    c = replace(SMALL, lambda_w=0.2, lambda_h=0.2, iterations=2000)
    m = ufm.build(c, 0)
    descend([m], 10_000)
    assert c.minimum().frame == "zero"
    assert m.features.norm() < 1e-6
    assert m.objective().item() == pytest.approx(0.5, abs=1e-12)


def test_cross_entropy_knows_the_etf_and_the_square_that_is_below_it():
    known = ufm_report.levels(replace(FIGURES[3], loss="cross-entropy"))
    assert known["simplex ETF"] == pytest.approx(0.258692, abs=5e-7)
    assert known["regular 4-gon, rank 2"] == pytest.approx(0.257330, abs=5e-7)


@pytest.mark.parametrize("model", ["plain", "linear"])
def test_descent_with_cross_entropy_ends_at_a_known_level(model):
    c = replace(FIGURES[3], loss="cross-entropy", model=model, scale_w=0.1)
    m = ufm.build(c, 1)
    descend([m], 40_000)
    assert m.objective().item() == pytest.approx(
        min(ufm_report.levels(c).values(), key=lambda x: abs(x - m.objective())), rel=1e-6
    )


def test_within_class_variability_at_the_start_differs_between_the_levels():
    # Appendix D claims that they are equal at a random start: the pseudoinverse of a product says otherwise.
    row = ufm.measure_now(ufm.build(FIGURES[3], 0), 0)
    assert row["nc1"] / row["nc1_h1"] > 1.5


def test_a_figure_writes_its_table_and_its_picture_and_says_what_was_reached(tmp_path, capsys):
    ufm.main(["--figure", "4", "--iterations", "200", "--every", "100", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "figure4.csv").open()))
    assert [row["iteration"] for row in rows] == ["0", "100", "200"]
    deepest = ["iteration", "objective", "nc1", "nc2_of", "nc2_etf", "nc2_etf_centered", "nc3"]
    others = [name + suffix for suffix in ("_h1", "_pre") for name in deepest[2:]]
    assert list(rows[0]) == deepest + others
    assert (tmp_path / "figure4.png").stat().st_size > 10_000
    assert "theory 0.107735715649" in capsys.readouterr().out


def test_many_seeds_a_yaml_and_dashes_give_one_table_of_all(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: linear\nnum_classes: 3\nlambda_w: 0.01\nevery: 50\n")
    options = "--samples-per-class 6 --iterations=100 --seeds 3 --seed 5"
    ufm.main(["--config", str(tmp_path / "mine.yaml"), *options.split(), "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "linear-seeds.csv").open()))
    assert [row["seed"] for row in rows] == ["5"] * 3 + ["6"] * 3 + ["7"] * 3
    minimum = theory.extended_ufm(3, 6, 0.01, 0.005, 0.005)
    assert f"theory {minimum.objective:.12f}" in capsys.readouterr().out


def test_the_sweep_over_lambda_b_writes_descent_beside_theory(tmp_path, capsys):
    ufm.main(["--sweep", "lambda-b", "--iterations", "30000", "--every", "30000", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "sweep-lambda-b.csv").open()))
    assert all(abs(float(row["objective"]) / float(row["theory"]) - 1) < 1e-4 for row in rows)
    assert float(rows[0]["nc2_etf"]) < 1e-3 < float(rows[-1]["nc2_etf"])
    assert "threshold 0.1647" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figure", "3", "--sweep", "lambda-b"], "--figure and --sweep cannot be combined"),
        (["--sweep", "lambda-b", "--model", "relu"], "--sweep runs the plain model"),
        (
            ["--figure", "5"],
            "--figure must be one of 1 2 3 4 6 7 8 9, got 5; for figures 5 and 10, practical networks, run",
        ),
        (["--theorem", "3.1"], "--theorem must be one of 5.1, got 3.1"),
        (["--sweep", "lambda-w"], "--sweep must be one of lambda-b"),
        (["--num-features", "3"], "got 3 < 4; pass --num-features 4 or more"),
        (["--lambda-w", "-1"], "lambda_w must be a positive, finite number, got -1.0"),
        (["--model", "relu", "--lambda-b", "0"], "the relu model has no bias, got lambda_b = 0.0"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--every", "0"], "expected every >= 1"),
    ],
)
def test_options_that_cannot_be_run_get_a_clear_message(arguments, message, capsys):
    with pytest.raises(SystemExit):
        ufm.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())
