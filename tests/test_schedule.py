"""Which epochs are measured."""

import math

import pytest

from lightning_nc import log_spaced
from lightning_nc.schedule import check_schedule, is_due


def due(every, epochs):
    return [epoch for epoch in range(epochs) if is_due(every, epoch, last=epoch == epochs - 1)]


def test_the_first_the_last_and_those_of_the_schedule_are_due():
    assert due(1, 4) == [0, 1, 2, 3]
    assert due(3, 8) == [0, 2, 5, 7]
    assert due(100, 5) == [0, 4]
    assert due(lambda epoch: epoch in (1, 2), 6) == [0, 1, 2, 5]
    assert due(lambda epoch: False, 1) == [0]


@pytest.mark.parametrize("per_decade", [1, 3, 10])
def test_a_log_spaced_schedule_has_as_many_measurements_in_every_tenfold(per_decade):
    epochs = [epoch + 1 for epoch in range(100_000) if log_spaced(per_decade)(epoch)]
    decades = [[e for e in epochs if 10**d <= e < 10 ** (d + 1)] for d in range(2, 5)]
    assert [len(decade) for decade in decades] == [per_decade] * 3
    ideal = [10 ** (i / per_decade) for i in range(2 * per_decade, 5 * per_decade)]
    assert [e for decade in decades for e in decade] == [math.ceil(e - 1e-6) for e in ideal]


@pytest.mark.parametrize(
    ("every", "stages", "message"),
    [
        (0, ("train",), "positive integer or a callable from epoch to bool, got 0"),
        (1.5, ("train",), "positive integer or a callable"),
        (log_spaced, ("train",), r"write log_spaced\(\)"),
        (1, "train", "stages must be a sequence of any of 'train', 'validate', 'test', got 'train'"),
        (1, (), "stages must be a sequence"),
        (1, ("fit",), "stages must be a sequence"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(every, stages, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(every, stages)


def test_the_number_of_measurements_in_a_tenfold_is_a_positive_integer():
    with pytest.raises(ValueError, match="per_decade must be a positive integer, got 0"):
        log_spaced(0)
