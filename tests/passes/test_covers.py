"""Planted covers over the whole generator; what once was missed or went wrong."""

from __future__ import annotations

import adjoint_checks
import cover_checks
import covering_checks
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxfib
from fxfib.capture import capture
from fxfib.passes.cover import labels_of
from fxfib.passes.rules import derivative


@pytest.mark.parametrize("seed", [2, 5, 6, 11])
def test_planted_covers(seed: int) -> None:
    """More: ``python bench/fuzz.py --covers``."""
    outcome = covering_checks.check_covers(seed, thorough=False)
    assert not outcome.failures
    assert outcome.redundant


def test_ignored_flavors_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = covering_checks.Subject.of(2)
    covering_checks.one_sided(subject)
    monkeypatch.setattr(derivative, "flavors_along", lambda *_: (None, None))
    with pytest.raises(AssertionError):
        covering_checks.one_sided(subject.anew())


class Tied(nn.Module):
    """A table that is looked up in and read as the head."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(tokens, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.inner(self.table(x))), self.table.weight)


@pytest.mark.parametrize("tokens", [7, 5])
def test_a_tied_table_has_nodes_on_both_axes(tokens: int) -> None:
    """Channels of the embedding and tokens of the head are not one layer's nodes."""
    torch.manual_seed(0)
    model = Tied(tokens, 5).double()
    with torch.no_grad():
        for own in (
            model.table.weight.T,
            model.inner.weight,
            model.inner.bias,
            model.inner.weight.T,
        ):
            own[3] = own[1]
    for symmetry in ("fiber", "opfiber", "cover", "stable"):
        found = fxfib.color(model, (torch.arange(tokens)[None],), symmetry=symmetry).labels
        assert found["table"].tolist() == [0, 1, 2, 1, 3], symmetry
        assert found["inner"].tolist() == [0, 1, 2, 1, 3], symmetry
        assert found["table (call 2)"].tolist() == list(range(tokens)), symmetry


class Crossed(nn.Module):
    """Attention to another input: queries, and keys and values together, from one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.attention(x, y, y)[0]


@pytest.mark.parametrize("symmetry", ["opfiber", "cover"])
def test_parts_of_a_packed_projection_are_other_nodes(symmetry: str) -> None:
    inputs = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    found = fxfib.color(Crossed(), inputs, symmetry=symmetry).labels
    assert sorted(map(len, found.values())) == [6, 6, 12]


class Packed(nn.Module):
    """Queries, keys and values from one matrix: taken by ``select``, or apart by ``unbind``."""

    def __init__(self, *, module: bool) -> None:
        super().__init__()
        self.module = module
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        own = self.attention
        if self.module:
            return (self.head(own(x, x, x, need_weights=False)[0]),)
        rows = F.linear(x, own.in_proj_weight, own.in_proj_bias).unflatten(-1, (3, 2, 3))
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (self.head(own.out_proj(mixed)),)


@pytest.mark.parametrize("module", [True, False])
def test_queries_keys_and_values_of_one_matrix_have_covers_of_their_own(module: bool) -> None:
    """Copies among the values of the first head, and among queries and keys of the second."""
    torch.manual_seed(3)
    model = Packed(module=module).double()
    rows, shift = model.attention.in_proj_weight, model.attention.in_proj_bias
    columns = model.attention.out_proj.weight
    with torch.no_grad():
        for first, copy in ((12, 13), (3, 4), (9, 10)):
            rows[copy], shift[copy] = rows[first], shift[first]
        columns[:, 1] = columns[:, 0]
    planted = np.arange(18)
    planted[[13, 4, 10]] = [12, 3, 9]
    inputs = (torch.randn(4, 5, 6, dtype=torch.float64),)
    captured = capture(model.eval(), inputs)
    errors = adjoint_checks.errors_of(captured)
    assert adjoint_checks.emitted_as_autograd(errors) > 8
    adjoint_checks.equal_in_opfibers(errors)
    pairs = cover_checks.gradients_equal(errors.analysis, errors.continued, model, inputs)
    assert pairs >= 3

    def matrix(found: dict[str, np.ndarray]) -> list[int]:
        (labels,) = (own for own in found.values() if len(own) == 18)
        return labels.tolist()

    packed = np.unique(planted, return_inverse=True)[1].tolist()
    for symmetry in ("cover", "stable"):
        assert matrix(cover_checks.covers_of(errors.continued, symmetry)) == packed
    before = cover_checks.covers_of(errors.continued, "stable")
    cover_checks.train(model, inputs, torch.optim.Adam(model.parameters(), 1e-2), 20)
    after = labels_of(errors.continued.color(1e-7), errors.continued.values, "cover")
    assert not cover_checks.coarsens(after, before)
    # What is read otherwise is no copy any more.
    with torch.no_grad():
        columns[:, 1] += 0.1
    planted[13] = 13
    apart = labels_of(errors.continued.color(1e-7), errors.continued.values, "cover")
    assert matrix(apart) == np.unique(planted, return_inverse=True)[1].tolist()


class FromZeros(nn.Module):
    """A cell called step by step, without a first state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(3, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state)


def test_biases_of_a_cell_add_up_in_its_first_step_too() -> None:
    """Its state is zero there, so that only biases are left of the rows that read it."""
    torch.manual_seed(1)
    model = FromZeros().double()
    with torch.no_grad():
        for own in (model.cell.weight_ih, model.cell.weight_hh, model.cell.weight_hh.T,
                    model.cell.bias_ih, model.cell.bias_hh, model.head.weight.T):  # fmt: skip
            own[3] = own[1]
        model.cell.bias_ih[3] += 0.5
        model.cell.bias_hh[3] -= 0.5
    inputs = (torch.randn(4, 3, 3, dtype=torch.float64),)
    errors = adjoint_checks.errors_of(capture(model, inputs))
    adjoint_checks.emitted_as_autograd(errors)
    for labels in cover_checks.covers_of(errors.continued).values():
        assert labels.tolist() in ([0, 1, 2, 1, 3], [0, 1])


class Masked(nn.Module):
    """Attention whose mask is computed from a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)
        self.out = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x)[:, None] for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, mask[:, None, None] * 2)[:, 0])


def test_a_mask_that_is_computed_hides_no_other_error() -> None:
    torch.manual_seed(2)
    model = Masked().double()
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):
            layer.weight[2], layer.bias[2] = layer.weight[0], layer.bias[0]
        model.out.weight[:, 2] = model.out.weight[:, 0]
    inputs = (torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64))
    errors = adjoint_checks.errors_of(capture(model, inputs))
    assert adjoint_checks.emitted_as_autograd(errors) > 8
    found = labels_of(errors.analysis, errors.continued.values, "cover")
    assert all(np.array_equal(found[name], [0, 1, 0]) for name in "qkv")
