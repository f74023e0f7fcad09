"""The grammar of keys."""

import pytest

from lightning_nc.keys import STAGES, Key, is_reserved, make_key, natural_order, parse_key


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("nc/nc1", ("train", 0, "", "nc1")),
        ("nc/layer3/nc1", ("train", 0, "layer3", "nc1")),
        ("nc/val/net.2/nc1", ("validate", 0, "net.2", "nc1")),
        ("nc/val_1/nc1", ("validate", 1, "", "nc1")),
        ("nc/test_12/net.2/nc1", ("test", 12, "net.2", "nc1")),
        ("nc/test_block/nc1", ("train", 0, "test_block", "nc1")),
        ("nc/value/nc1", ("train", 0, "value", "nc1")),
        ("nc1", ("train", 0, "", "nc1")),
        ("layer3/nc1", ("train", 0, "layer3", "nc1")),
    ],
)
def test_a_key_splits_into_stage_dataloader_layer_and_metric(key, parts):
    assert parse_key(key) == Key(*parts)


@pytest.mark.parametrize(("stage", "loader"), [(s, n) for s in STAGES for n in (0, 1, 10) if s != "train" or n == 0])
@pytest.mark.parametrize("layer", ["", "layer3", "net.2", "a/b"])
def test_a_key_that_was_made_reads_back_as_its_parts(stage, loader, layer):
    assert parse_key(make_key("nc1", layer, stage, loader)) == Key(stage, loader, layer, "nc1")


def test_a_layer_whose_key_would_read_as_a_stage_is_reserved():
    for layer in ("val", "test", "val_1", "test_12", "val/x"):
        assert is_reserved(layer)
        assert parse_key(make_key("nc1", layer, "train")).layer != layer
    for layer in ("nc", "nc/x"):
        assert is_reserved(layer)
        assert parse_key(make_key("nc1", layer)).layer != layer
    for layer in ("", "value", "val_x", "test_block", "network.val", "ncs", "network.nc"):
        assert not is_reserved(layer)


def test_numbers_in_names_are_ordered_by_value():
    names = ["layer10", "layer9", "", "a.2.b", "layer1", "a.10.b", "2"]
    assert sorted(names, key=natural_order) == ["", "2", "a.2.b", "a.10.b", "layer1", "layer9", "layer10"]


def test_digits_that_are_no_decimal_numbers_are_letters():
    assert natural_order("m²") == ["m²"]
    assert sorted(["x10²", "x9²"], key=natural_order) == ["x9²", "x10²"]


def test_the_parts_of_a_key_have_names():
    key = parse_key("nc/val_1/layer3/nc1")
    assert (key.stage, key.loader, key.layer, key.metric) == ("validate", 1, "layer3", "nc1")
    assert make_key("nc1") == "nc1"
