"""Latency against width: what is drawn from the times, and that there are times."""

import pytest
import torch

import fxfib
from fxfib.widths import _onnx_bytes

RANGE = range(33, 97)


def found(linear, convolution=None) -> fxfib.Widths:
    kinds = {"linear": linear} | ({"convolution": convolution} if convolution else {})
    times = {kind: {width: time(width) for width in RANGE} for kind, time in kinds.items()}
    return fxfib.Widths("onnxruntime", times, "somewhere")


def tiles(size):
    """A kernel that computes whole tiles."""
    return lambda width: float(-(-width // size) * size)


def cliff(size):
    """A kernel that takes a slow way where the width is no multiple."""
    return lambda width: width * (1.0 if width % size == 0 else 1.5)


@pytest.mark.parametrize(
    ("time", "best"),
    [(tiles(1), 2), (tiles(8), 8), (tiles(16), 16), (cliff(4), 4), (cliff(8), 8), (cliff(2), 4)],
)
def test_the_multiple_that_pays(time, best):
    assert found(time).best() == best


def test_costs_are_those_of_rounding_up():
    widths = found(tiles(8))
    assert widths.cost("linear", 1) == widths.cost("linear", 8) == 1.0
    rounded = sum(-(-width // 32) * 32 for width in RANGE)
    assert widths.cost("linear", 32) == pytest.approx(
        rounded / sum(-(-width // 8) * 8 for width in RANGE)
    )


def test_kinds_count_by_their_work():
    widths = found(tiles(1), tiles(16))
    assert widths.best({"linear": 1.0, "convolution": 0.0}) == 2
    assert widths.best({"linear": 0.0, "convolution": 1.0}) == 16
    assert widths.best({"linear": 1.0, "convolution": 20.0}) == 16
    assert widths.best({}) == 1, "no layers that were measured"
    assert "convolution" in str(widths) and "best 16" in str(widths)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_measured_here(runtime):
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    widths = fxfib.measure_widths(runtime, widths=range(31, 34), rounds=2, threads=threads)
    assert set(widths.milliseconds) == {"linear", "convolution"}
    for times in widths.milliseconds.values():
        assert list(times) == [31, 32, 33] and all(time > 0 for time in times.values())
    assert widths.best() in (1, 2, 4, 8, 16, 32)
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_the_file_that_is_timed_is_the_stack():
    import onnxruntime
    from torch import nn

    stack = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Linear(49, 49)
    )
    for part, shape in ((stack[:2], (1, 3, 7, 7)), (stack[3:], (5, 49))):
        example = torch.randn(shape)
        session = onnxruntime.InferenceSession(
            _onnx_bytes(part, shape), providers=["CPUExecutionProvider"]
        )
        (out,) = session.run(None, {"x": example.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), part(example).detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "abacus"}, "not in 'abacus'"),
        ({"kinds": ["pooling"]}, "unknown kind of layer 'pooling'"),
        ({"widths": []}, "consecutive"),
        ({"widths": [32, 34]}, "consecutive"),
        ({"widths": [33, 34]}, "reach a multiple of 32"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(fxfib.InputError, match=message):
        fxfib.measure_widths(**options)
