"""Recurrent layers while they are traced: shapes of one step stand for those of all."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._decomp import decompositions


@contextlib.contextmanager
def right_lstm_shapes() -> Iterator[None]:
    """h_n and c_n are ``[layers, batch, hidden]`` for fake tensors too, as they are for real ones.

    In 2.11 the Python form of ``aten.lstm`` takes the wrong dimension of size one away, unless the
    batch is one.  Later versions are right, and nothing changes there.
    """
    one_layer = decompositions.one_layer_lstm

    def right(*args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, states = one_layer(*args, **kwargs)
        return output, tuple(s.squeeze(0) if s.ndim == 3 else s for s in states)

    with mock.patch.object(decompositions, "one_layer_lstm", right):
        yield


def _forget_loops() -> None:
    """The ONNX exporter puts loops in place of these layers and takes them out again, but from
    where they were once called they stay: in the cache of what an op dispatches to.
    """
    for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        getattr(operator, "_dispatch_cache", {}).clear()


@contextlib.contextmanager
def no_loops() -> Iterator[None]:
    """Keep the ONNX exporter from tracing these layers as loops where sizes are free.

    A loop wants states that lie in memory as those of the next step do, and refuses others, such
    as a learned state that is expanded over the batch.
    """
    from torch.onnx._internal.exporter import _capture_strategies

    name = "patch_dynamic_shape_rnn_decompositions"
    if not hasattr(_capture_strategies, name):  # before torch had them
        yield
        return
    with mock.patch.object(_capture_strategies, name, contextlib.nullcontext):
        yield


@contextlib.contextmanager
def shapes_of_recurrent_layers() -> Iterator[None]:
    """While a model is exported: a recurrent layer of any number of steps costs one.

    The layers stay whole in the graph; their Python forms only tell shapes, and would go through
    all steps for it, which fixes how many there are.  Nothing real may run through them meanwhile:
    every step but the first is left empty.
    """
    _forget_loops()
    with right_lstm_shapes():
        originals = {
            name: getattr(decompositions, name) for name in ("one_layer_lstm", "one_layer_rnn")
        }

        def shapes_of(one_layer: Any) -> Any:
            def one_step(inp: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
                output, states = one_layer(inp.select(0, 0).unsqueeze(0), *args, **kwargs)
                return output.new_empty((inp.shape[0], *output.shape[1:])), states

            return one_step

        with contextlib.ExitStack() as stack:
            for name, original in originals.items():
                stack.enter_context(mock.patch.object(decompositions, name, shapes_of(original)))
            yield
