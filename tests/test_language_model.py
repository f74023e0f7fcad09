"""The language model example: its tokens, its labels, its statistics of single tokens, and its command."""

import csv
import math
import sys
from argparse import Namespace
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from reference import all_metrics
from torch.utils.data import DataLoader

from lightning_nc import NeuralCollapseCallback

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import language_model
import language_model_report

TEXT = "The cat sat on the mat. The cat ate the rat; the rat sat on the cat."


def tiny(classes, **options):
    settings = {"width": 8, "heads": 2, "layers": 1, "context": 6, "lr": 1e-3, "weight_decay": 0.1}
    return language_model.GPT(classes, Namespace(**settings | options)).eval()


def fit(model, loader, callbacks, max_epochs):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    Trainer(max_epochs=max_epochs, enable_model_summary=False, callbacks=callbacks, **options).fit(model, loader)


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------ the text and its tokens


@pytest.mark.parametrize("size", [20, 25, 1000])
def test_the_tokens_spell_the_text_and_are_at_most_as_many_as_asked_for(size):
    tokens = language_model.tokenize(TEXT, size)
    assert "".join(tokens) == TEXT
    assert len(set(tokens)) <= size
    assert not any(" " in token[1:] for token in tokens)


def test_the_first_token_of_two_characters_is_the_most_frequent_pair_within_a_word():
    pairs = Counter(left + right for left, right in pairwise(TEXT) if right.isalpha())
    (best, times), (_, fewer) = pairs.most_common(2)
    tokens = Counter(language_model.tokenize(TEXT, len(set(TEXT)) + 1))
    assert times > fewer
    assert {token: n for token, n in tokens.items() if len(token) > 1} == {best: times}


def test_overlapping_pairs_are_joined_from_the_left():
    assert language_model.merge(list("aaaaa"), "a", "a") == ["aa", "aa", "a"]
    assert language_model.merge(["a", "b", "a", "b"], "a", "b") == ["ab", "ab"]


def test_a_vocabulary_smaller_than_the_alphabet_is_an_error_that_says_the_smallest():
    with pytest.raises(ValueError, match=f"--vocabulary {len(set(TEXT))} or more"):
        language_model.tokenize(TEXT, 5)


def test_a_text_is_read_paragraph_by_paragraph_and_repeated_ones_once(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Title\n=====\n\nTwo  lines\n   of text.\n\n\nEnd — ü.\n\nTwo lines of text.\n", encoding="utf-8")
    assert language_model.read_text(file) == "Title\nTwo lines of text.\nEnd — ü."


def test_the_label_of_a_position_is_the_token_that_follows():
    inputs, labels = language_model.blocks(torch.arange(100, 123), 5).tensors
    assert inputs.tolist() == [[100 + 5 * row + at for at in range(5)] for row in range(4)]
    assert torch.equal(labels, inputs + 1)
    with pytest.raises(ValueError, match="--context"):
        language_model.blocks(torch.arange(5), 5)


# ------------------------------------------------------------------------------------------------------------- the model


def test_the_model_does_not_see_the_tokens_that_follow():
    torch.manual_seed(0)
    model, tokens = tiny(11), torch.randint(11, (3, 6))
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    assert torch.equal(model(tokens)[:, :4], model(changed)[:, :4])
    assert not torch.allclose(model(tokens)[:, 4:], model(changed)[:, 4:])


# --------------------------------------------------------------------------------------------- statistics of single tokens


def test_statistics_of_each_token_are_those_of_all_its_positions():
    torch.manual_seed(0)
    model = tiny(5)
    data = language_model.blocks(torch.randint(5, (200,)), 6)
    metric, loss, correct = language_model_report.per_token(model, DataLoader(data, 4))
    with torch.no_grad():
        features = model.features(data.tensors[0]).flatten(0, 1).double().numpy()
        logits = model(data.tensors[0]).flatten(0, 1).double().numpy()
    target = data.tensors[1].flatten().numpy()
    surprise = numpy.log(numpy.exp(logits).sum(axis=1)) - logits[numpy.arange(len(target)), target]
    for k in range(5):
        own = features[target == k]
        assert metric.counts[k] == len(own)
        numpy.testing.assert_allclose(metric.means[k], own.mean(axis=0), atol=1e-6)
        assert float(metric.spread[k]) == pytest.approx(((own - own.mean(axis=0)) ** 2).sum(), rel=1e-5)
        assert float(loss[k]) == pytest.approx(surprise[target == k].sum(), rel=1e-5)
        assert correct[k] == (logits.argmax(axis=1) == target)[target == k].sum()


def test_training_is_bit_for_bit_the_same_with_and_without_the_statistics_of_tokens():
    train, validation = (language_model.blocks(torch.arange(size) ** 2 % 11 % 7, 6) for size in (400, 60))
    statistics = language_model_report.TokenStatistics("abcdefg", train, validation, lambda trainer: True)
    weights = []
    for callbacks in ([], [statistics]):
        torch.manual_seed(0)
        model = tiny(7).train()
        fit(model, DataLoader(train, 8, shuffle=True), callbacks, max_epochs=3)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert list(statistics.tokens) == [0, 9, 10, 18, 20, 27]
    assert torch.equal(*weights)


def test_variability_does_not_depend_on_how_often_a_token_occurs():
    """Gaussian classes of known scatter and distance, with 3 to 300 samples each: the truth on average, at every size."""
    generator = numpy.random.default_rng(0)
    sizes, width = numpy.array([3, 3, 10, 30, 300]), 6
    centers, scale = generator.normal(size=(5, width)), numpy.array([1.0, 0.5, 1.5, 1.0, 0.7])
    distances = ((centers[:, None] - centers) ** 2).sum(axis=2)
    truth = scale**2 * width / (distances.sum(axis=1) / 4)
    shares = []
    for _ in range(400):
        samples = [c + s * generator.normal(size=(n, width)) for c, s, n in zip(centers, scale, sizes, strict=True)]
        means = numpy.array([own.mean(axis=0) for own in samples])
        spread = numpy.array([((own - mean) ** 2).sum() for own, mean in zip(samples, means, strict=True)])
        parts = (torch.from_numpy(part) for part in (sizes.astype(float), means, spread))
        shares.append(language_model_report.variability(*parts).numpy())
    # The ratio of two unbiased estimates is unbiased only to first order, hence the median over trials and the tolerance.
    numpy.testing.assert_allclose(numpy.median(shares, axis=0), truth, rtol=0.15)


def test_variability_of_points_by_hand():
    # Class 0: 0 and 2, mean 1, variance 2. Class 1: 10 and 10. Squared distance of the means 81, less 2/2 for their errors.
    values = language_model_report.variability(
        torch.tensor([2.0, 2.0]).double(), torch.tensor([[1.0], [10.0]]).double(), torch.tensor([2.0, 0.0]).double()
    )
    assert values.tolist() == pytest.approx([2 / 80, 0])


def test_a_token_whose_mean_cannot_be_told_from_the_others_is_nan_and_left_out(capsys):
    # Means 0 and 1, variances 4 with two samples each: the errors of the means, 2 + 2, exceed the squared distance 1.
    counts, means, spread = torch.tensor([2.0, 2.0]), torch.tensor([[0.0], [1.0]]), torch.tensor([4.0, 4.0])
    values = language_model_report.variability(counts, means, spread).tolist()
    assert all(math.isnan(value) for value in values)
    table = [{"token": "a", "variability": values[0]}, {"token": "b", "variability": 0.5}]
    assert language_model_report.certain({0: table}) == {0: table[1:]}
    assert "1 tokens are left out" in capsys.readouterr().out


def test_the_partial_correlation_is_that_of_the_ranks_after_regression_on_the_control():
    generator = numpy.random.default_rng(2)
    control = generator.normal(size=60)
    columns = {"variability": control + generator.normal(size=60), "count": control + generator.normal(size=60)}
    columns["preceding"] = control
    table = [{"count": columns["count"][k], "preceding": control[k]} for k in range(60)]
    ranks = {name: numpy.argsort(numpy.argsort(column)) for name, column in columns.items()}
    design = numpy.stack([numpy.ones(60), ranks["preceding"]], axis=1)
    rests = [ranks[name] - design @ numpy.linalg.lstsq(design, ranks[name])[0] for name in ("variability", "count")]
    values = language_model_report.correlations(columns["variability"].tolist(), table)
    assert values["count"] == pytest.approx(numpy.corrcoef(ranks["variability"], ranks["count"])[0, 1])
    assert values["count | preceding"] == pytest.approx(numpy.corrcoef(*rests)[0, 1])


# ----------------------------------------------------------------------------------------------------------- the command


def help_tokens():
    """The tokens of the run below, and the different ones."""
    tokens = language_model.tokenize(language_model.read_text(None), 150)[:4000]
    return tokens, set(tokens)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command on 4,000 tokens of the help texts."""
    out = tmp_path_factory.mktemp("language_model")
    options = "--tokens 4000 --vocabulary 150 --width 16 --layers 1 --heads 2 --context 32 --epochs 3 --out"
    language_model.main([*options.split(), str(out)])
    return out


def test_the_command_writes_its_tables_and_figures(run):
    measured = rows_of(run / "metrics.csv")
    assert [row["step"] for row in measured] == ["0", "7", "10", "14", "20", "21"]
    between = [row for row in measured if row["step"] in ("10", "20")]  # the callback measures at the end of an epoch
    for row in measured:
        assert all(math.isfinite(float(value)) for key, value in row.items() if not key.startswith("nc/"))
        assert all(math.isnan(float(row[key])) == (row in between) for key in row if key.startswith("nc/"))
    # An untrained network guesses: the loss is that of equal probabilities.
    assert float(measured[0]["loss"]) == pytest.approx(math.log(len(help_tokens()[1])), rel=0.02)
    assert float(measured[-1]["loss"]) < float(measured[0]["loss"]) - 0.2
    for name in ("metrics.png", "tokens.png"):
        assert (run / name).stat().st_size > 20_000


def test_the_table_of_tokens_has_every_token_that_is_frequent_enough(run):
    tokens = help_tokens()[0]
    positions = (4000 - 400 - 1) // 32 * 32
    counts = Counter(tokens[1 : positions + 1])
    frequent = {token: n for token, n in counts.items() if n >= language_model_report.LEAST}
    for step in ("0", "7", "10", "14", "20", "21"):
        table = [row for row in rows_of(run / "tokens.csv") if row["step"] == step]
        assert {row["token"]: int(row["count"]) for row in table} == frequent
        assert all(float(row["variability"]) > 0 and 0 <= float(row["accuracy"]) <= 1 for row in table)
    for row in table:
        before = Counter(tokens[at] for at in range(positions) if tokens[at + 1] == row["token"])
        shares = numpy.array(list(before.values())) / before.total()
        assert float(row["preceding"]) == pytest.approx(numpy.prod(shares**-shares))


def test_the_callback_measures_every_position_of_the_training_text():
    torch.manual_seed(0)
    model, data = tiny(5), language_model.blocks(torch.randint(5, (400,)), 6)
    callback = NeuralCollapseCallback(metrics=language_model.METRICS)
    fit(model.train(), DataLoader(data, 8), [callback], max_epochs=1)
    with torch.no_grad():
        features = model.double().features(data.tensors[0]).flatten(0, 1).numpy()
    expected = all_metrics(features, data.tensors[1].flatten().numpy(), model.head.weight.detach().numpy(), 0)
    for name in language_model.METRICS:
        assert callback.history[-1][f"nc/{name}"] == pytest.approx(expected[name], rel=1e-4), name


def test_a_width_that_the_heads_do_not_divide_is_an_error(capsys):
    with pytest.raises(SystemExit):
        language_model.main(["--width", "10", "--heads", "4"])
    assert "multiple of --heads" in capsys.readouterr().err


def test_a_text_with_too_few_frequent_tokens_is_an_error_before_the_training(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    options = f"--text {tmp_path / 'text.txt'} --context 4 --vocabulary 200 --out {tmp_path}"
    with pytest.raises(ValueError, match="use more text or a smaller --vocabulary"):
        language_model.main(options.split())
