"""PyTorch 2.11 gives the last states of an LSTM a dimension too many while it traces."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

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
