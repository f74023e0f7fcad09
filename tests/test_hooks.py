"""Hooks on named modules: what they record, and that nothing of them is left."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from conftest import hooks_of
from torch import nn

from lightning_nc.measuring.hooks import Recorder, named_modules, tensors_in, trace


def keep(name, tensor):
    return tensor.clone()


def test_a_recorder_sees_keyword_arguments_leaves_no_hook_behind_and_records_nothing_in_copies():
    layer = nn.Linear(6, 3)
    x = torch.randn(4, 6)
    recorder = Recorder({}, inputs={"fc": layer})
    layer(x)
    assert recorder.stop() == []
    recorder.start(keep)
    layer(input=x)
    copy.deepcopy(layer)(x)
    pickle.loads(pickle.dumps(layer))(x)
    ((name, seen),) = recorder.stop()
    assert name == "fc"
    assert torch.equal(seen, x)
    recorder.remove()
    assert hooks_of(layer) == []


def test_outputs_and_inputs_are_recorded_in_the_order_of_the_calls():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    recorder = Recorder({"body": model[0]}, {"head": model[2]})
    recorder.start(keep)
    x = torch.randn(5, 6)
    model(x)
    model(2 * x)
    calls = recorder.stop()
    assert [name for name, _ in calls] == ["body", "head"] * 2
    for (_, body), (_, head), rows in zip(calls[::2], calls[1::2], (x, 2 * x), strict=True):
        torch.testing.assert_close(body, model[0](rows))
        torch.testing.assert_close(head, model[0](rows).relu())
    recorder.remove()


def test_an_output_is_kept_before_the_next_layer_changes_it_in_place():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True))
    recorder = Recorder({"body": model[0]})
    recorder.start(keep)
    x = torch.randn(5, 6)
    model(x)
    ((_, seen),) = recorder.stop()
    assert seen.min() < 0
    torch.testing.assert_close(seen, model[0](x))


def test_a_recorder_that_is_paused_keeps_what_it_has_and_records_no_more():
    layer = nn.Linear(6, 3)
    recorder = Recorder({"fc": layer})
    recorder.start(keep)
    layer(torch.zeros(2, 6))
    recorder.pause()
    layer(torch.zeros(3, 6))
    assert [tuple(tensor.shape) for _, tensor in recorder.stop()] == [(2, 3)]


def test_an_error_in_a_hook_reaches_the_caller_of_stop_and_not_the_step():
    layer = nn.Linear(6, 3)
    recorder = Recorder({"fc": layer})

    def fails(name, tensor):
        raise ZeroDivisionError(name)

    recorder.start(fails)
    assert layer(torch.zeros(2, 6)).shape == (2, 3)
    with pytest.raises(ZeroDivisionError, match="fc"):
        recorder.stop()
    recorder.start(keep)
    layer(torch.zeros(2, 6))
    assert len(recorder.stop()) == 1


def test_a_call_without_a_floating_tensor_is_recorded_as_none():
    layer = nn.Identity()
    recorder = Recorder({"ids": layer})
    recorder.start(keep)
    layer(torch.arange(3))
    assert recorder.stop() == [("ids", None)]


def test_a_trace_lists_every_call_as_it_finishes_and_removes_its_hooks():
    model = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.ReLU()))
    x = torch.randn(5, 6)
    output, calls = trace(model, lambda: model(x))
    assert [call.name for call in calls] == ["0", "1.0", "1", ""]
    assert calls[0].input is x
    assert calls[-1].output is output
    assert calls[0].module is model[0]
    with pytest.raises(RuntimeError):
        trace(model, lambda: model(torch.randn(5, 7)))
    assert hooks_of(model) == []


def test_a_module_with_two_names_is_traced_under_the_first():
    model = nn.Sequential(nn.Linear(6, 6))
    model.again = model[0]
    _, calls = trace(model, lambda: model[0](torch.randn(5, 6)))
    assert [call.name for call in calls] == ["0"]


def test_names_do_not_show_the_wrappers_of_compilation_and_checkpointing():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3))
    plain = list(named_modules(model))
    head = model[2]
    model[1] = torch.compile(model[1], backend="eager")
    model[2] = checkpoint_wrapper(model[2])
    assert list(named_modules(model)) == plain
    assert named_modules(model)["2"] is head


def test_tensors_are_found_in_nested_outputs():
    @dataclass
    class Output:
        logits: torch.Tensor
        extra: tuple

    first, second, third = torch.zeros(1), torch.ones(2), torch.arange(3)
    assert [id(t) for t in tensors_in(Output(first, ({"a": second}, [third, "text", None])))] == [
        id(first),
        id(second),
        id(third),
    ]
    assert list(tensors_in("text")) == list(tensors_in(Output)) == []
