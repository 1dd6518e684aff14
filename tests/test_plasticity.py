"""Continual backpropagation, and what it shares with other ways to keep a network learning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from breaking_models import convolutional, mlp, smooth
from torch import nn

import fxfib
from fxfib.errors import InputError, RefusedError, VerifyError


def test_adaptable_contribution() -> None:
    model, x = smooth(), torch.randn(3, 9, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with observing(model, optimizer, x[0], decay=0.9) as breaker:
        utility = mean = 0.0
        for count, batch in enumerate(x, 1):
            model(batch)
            h = model[:4](batch).detach()
            mean = 0.9 * mean + 0.1 * h.mean(0)
            now = (h - mean / (1 - 0.9**count)).abs().mean(0)
            now = now * model[4].weight.abs().sum(0) / model[2].weight.abs().sum(1)
            utility = 0.9 * utility + 0.1 * now.detach()
        fxfib.color(model, (x[0],), symmetry="cover")  # runs the model, and is not seen either
        model.eval()
        model(x[0] + 5)  # not seen
        assert torch.allclose(breaker.utility("2"), utility / (1 - 0.9**3), rtol=1e-9)
        # What a node contributed on average goes into the bias.
        weight, bias = model[4].weight[:, 3].detach().clone(), model[4].bias.detach().clone()
        breaker.replace([("2", 3, None)])
        assert torch.allclose(model[4].bias, bias + weight * (mean / (1 - 0.9**3))[3])
        assert bool((model[4].weight[:, 3] == 0).all())
        assert bool(breaker.utility("2").isnan()[3])
    assert not model[4]._forward_pre_hooks


@contextmanager
def observing(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, **options: Any
) -> Iterator[fxfib.ContinualBackpropagation]:
    breaker = fxfib.ContinualBackpropagation(model, optimizer, (x,), **options)
    yield breaker
    breaker.close()


def test_continual_backpropagation_replaces_the_least_useful() -> None:
    model, x = smooth(), torch.randn(9, 3, dtype=torch.float64)
    with torch.no_grad():
        model[4].weight[:, 3] = 1e-6
        model[2].bias[5] = 30.0  # saturated: much is read, but it never changes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"replacement_rate": 0.05, "maturity": 5}
    with observing(model, optimizer, x, **options) as breaker:
        found = {}
        for step in range(1, 13):
            model(x)
            breaker.load_state_dict(copy.deepcopy(breaker.state_dict()))
            for r in breaker.step():
                if r.layer == "2":
                    found[step] = (r.node, r.representative, r.change)
        # Seven nodes: 0.35 due at step 6, 0.7, 1.05; one is young then, 0.3 a step.
        assert found == {8: (5, None, None), 12: (3, None, None)}
    with pytest.raises(RefusedError, match="hooks"):
        compiled = torch.compile(model, backend="eager")
        fxfib.ContinualBackpropagation(compiled, optimizer, (x,))


def test_continual_backpropagation_behind_a_flatten() -> None:
    model, x = convolutional().train(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model[5].weight[:, 8:12] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with observing(model, optimizer, x, replacement_rate=0.2, maturity=0) as breaker:
        model(x)
        assert int(breaker.utility("0").argmin()) == 2
        assert [(r.layer, r.node) for r in breaker.step()] == [("0", 2)]


def test_shrink_and_perturb() -> None:
    model = mlp()
    with pytest.raises(RefusedError, match="in_proj_weight"):
        fxfib.ShrinkAndPerturb(nn.MultiheadAttention(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    breaker = fxfib.ShrinkAndPerturb(model, shrink=0.5, perturb=0.0, every=2)
    breaker.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    breaker.step()
    assert all(torch.allclose(a / 2, b) for a, b in zip(before, model.parameters(), strict=True))
    perturbed = fxfib.ShrinkAndPerturb(model, shrink=1.0, perturb=2.0)
    perturbed.step()  # a linear layer of 5 inputs draws within 1 / sqrt(5)
    assert 0.5 < float(model[2].weight.detach().abs().max()) * 5**0.5 / 2 <= 1.0


WAYS = (fxfib.SymmetryBreaker, fxfib.ContinualBackpropagation, fxfib.ShrinkAndPerturb)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("late", [False, True])
def test_frozen_layers_are_left_alone(way: Any, late: bool) -> None:
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = {} if way is fxfib.ShrinkAndPerturb else {"replacement_rate": 1.0, "maturity": 0}
    if not late:
        model[0].requires_grad_(False)
    breaker = way(model, optimizer, x, **own)
    model[0].requires_grad_(False)
    frozen, free = model[0].weight.clone(), model[4].weight.clone()
    model(x).square().mean().backward()
    breaker.step()
    if way is fxfib.SymmetryBreaker:
        breaker.break_all()
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[4].weight, free)
    if own and not late:
        assert breaker.refused["0"] == "0.bias is frozen"


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, None])
def test_one_batch_that_overflows_or_is_empty_does_not_spoil_utilities(
    broken: float | None,
) -> None:
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    breaker = fxfib.ContinualBackpropagation(
        model, optimizer, x, replacement_rate=0.5, maturity=0
    )  # fmt: skip
    model(x)
    before = breaker.utility("0").clone()
    model(x[:0] if broken is None else x * broken)
    assert bool(torch.isfinite(breaker.utility("0")).all())
    assert torch.allclose(breaker.utility("0"), before)
    assert breaker.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_the_outputs_are_compared_outside_of_autocast() -> None:
    model, x = mlp().float(), torch.randn(9, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    breaker = fxfib.SymmetryBreaker(model, optimizer, x, replacement_rate=1.0, maturity=0, every=1)
    seen = []
    model[4].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        breaker.tolerance = lambda: -1.0  # type: ignore[method-assign]
        with pytest.raises(VerifyError):
            breaker.step()
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("wrong", [None, "Adam", [None]])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="no optimizer"):
        fxfib.SymmetryBreaker(mlp(), wrong, torch.randn(9, 3, dtype=torch.float64))


def test_states_of_another_kind_are_refused() -> None:
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one = fxfib.SymmetryBreaker(model, optimizer, x)
    other = fxfib.ContinualBackpropagation(model, optimizer, x)
    monitor = fxfib.Monitor(model, x)
    for into, state in (
        (one, other.state_dict()), (other, one.state_dict()), (monitor, one.state_dict()),
        (one, {}), (monitor, {}),
    ):  # fmt: skip
        with pytest.raises(InputError, match="the state is none of"):
            into.load_state_dict(state)
