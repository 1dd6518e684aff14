"""What others can stand for on recent inputs: planted, near misses, the function kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfib
from fxfib.errors import InputError, VerifyError
from fxfib.substitutes import substitutes


def planted() -> nn.Sequential:
    """Node 4 is 2 h_1 (up to a ReLU), 3 is dead, 6 is the constant 0.7, 0 is hardly read."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 2 * model[0].weight[1], 2 * model[0].bias[1]
        model[0].weight[3], model[0].bias[3] = 0.1, -50.0
        model[0].weight[6], model[0].bias[6] = 0.0, 0.7
        model[2].weight[:, 0] = 1e-5
    return model.double()


def breaker(model: nn.Module, x: torch.Tensor, **options: object) -> fxfib.SymmetryBreaker:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    made = {"criterion": "energy", "maturity": 0, "every": 1} | options
    return fxfib.SymmetryBreaker(model, optimizer, (x,), **made)


def test_planted_nodes_are_found_and_the_function_is_kept() -> None:
    model, x = planted(), torch.randn(40, 3, dtype=torch.float64)
    own = breaker(model, x, replacement_rate=1.0)
    before = model(x).detach()
    done = own.step(x)
    found = {(r.layer, r.node): r.representative for r in done}
    assert set(found) == {("0", 1), ("0", 3), ("0", 6)} or set(found) == {
        ("0", 4), ("0", 3), ("0", 6),
    }  # fmt: skip
    assert found[("0", 3)] is None and found[("0", 6)] is None
    assert found.get(("0", 1), 1) == (4 if ("0", 1) in found else 1)
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
    assert all(r.change < 1e-12 for r in done)
    assert float(model[0].bias[6].detach()) == 0  # drawn anew


def test_eps_bounds_what_is_lost_and_the_cheapest_go_first() -> None:
    model, x = planted(), torch.randn(40, 3, dtype=torch.float64)
    free = set(breaker(model, x, eps=0.0).substitutes()["0"])
    some = breaker(model, x, eps=1e-6).substitutes()["0"]
    assert set(some) == free | {0}
    assert 1e-13 < some[0].cost <= 1e-6
    many = breaker(model, x, eps=1e-6, replacement_rate=0.75)  # of four
    assert {r.node for r in many.step(x)} == free


def test_what_stands_for_a_node_stays() -> None:
    torch.manual_seed(0)
    h = torch.randn(7, 1, 300, dtype=torch.float64)
    h[2] = -3 * h[1] + 4
    h[5] = 0.5 * h[1]
    h[6] = 0.25
    young = torch.zeros(7, dtype=torch.bool)
    found = substitutes(h, torch.ones(7), 0.0, young)
    assert len(found) == 3 and found[6].node is None
    assert not {s.node for s in found.values()} & set(found)
    for node, own in found.items():
        base = 0 if own.node is None else h[own.node]
        assert torch.allclose(own.scale * base + own.constant[:, None], h[node])
    # No constants: what is shifted can stand for nothing, and the constant stays.
    assert len(substitutes(h, torch.ones(7), 0.0, young, constants=False)) == 1
    # The young neither go nor stand for others.
    young[1] = young[2] = True
    assert set(substitutes(h, torch.ones(7), 0.0, young)) == {6}
    # A near miss costs what it says.
    h[5] += 1e-3 * torch.randn(1, 300)
    young[:] = False
    assert 5 not in substitutes(h, torch.ones(7), 0.0, young)
    assert not substitutes(h * torch.nan, torch.ones(7), 1.0, young)


def test_on_new_inputs_other_nodes_are_redundant() -> None:
    """What is dead on one distribution is alive on the next: recent inputs decide."""
    model, x = planted(), torch.randn(40, 3, dtype=torch.float64)
    own = breaker(model, x, replacement_rate=0.0, examples=60)
    own.step(x)
    assert 3 in own.substitutes()["0"]
    own.step(x + 1000)
    assert len(own.recent) == 2
    assert 3 not in own.substitutes()["0"]
    own.step(x)
    own.step(x)
    assert len(own.recent) == 2
    assert 3 in own.substitutes()["0"]


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_models(how: str) -> None:
    model, x = planted(), torch.randn(40, 3, dtype=torch.float64)
    run = model
    if how == "wrapped":
        run = torch.compile(model, backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
    own = breaker(run, x)
    before = run(x).detach()
    done = own.break_all()
    assert len(done) == 3 and all(r.change < 1e-12 for r in done)
    assert torch.allclose(run(x), before, rtol=0, atol=1e-12)


def test_padding_takes_no_constants() -> None:
    """Beside zeros of a padding a constant node is no bias."""
    torch.manual_seed(1)
    for padding, goes in ((0, {2}), (1, set())):
        model = nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 3, 3, padding=padding), nn.Flatten(1)
        ).double()
        with torch.no_grad():
            model[0].weight[2], model[0].bias[2] = 0.0, 0.4
        x = torch.randn(4, 2, 7, 7, dtype=torch.float64)
        own = breaker(model, x)
        assert set(own.substitutes()["0"]) == goes
        before = model(x).detach()
        own.break_all()
        assert torch.allclose(model(x), before, rtol=0, atol=1e-12)


def test_state_goes_on_and_options_are_checked() -> None:
    x = torch.randn(6, 40, 3, dtype=torch.float64)
    one, two = planted(), planted()
    runs = [breaker(m, x[0], eps=1e-2, replacement_rate=0.1, maturity=1) for m in (one, two)]
    for k in range(3):
        runs[0].step(x[k])
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    runs[1].load_state_dict(copy.deepcopy(runs[0].state_dict()))
    late = []
    for own in runs:
        torch.manual_seed(9)
        late.append([own.step(x[k]) for k in range(3, 6)])
    assert late[0] == late[1] and any(late[0])
    with pytest.raises(InputError, match="classes"):
        runs[0].covers()
    with pytest.raises(InputError, match="opfibers"):
        breaker(planted(), x[0], opfiber_eps=0.1)
    with pytest.raises(VerifyError, match="nothing was replaced"):
        breaker(planted(), x[0], eps=0.0).replace([("0", 2, 5)])


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_examples_tell_nothing(count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    breaker = fxfib.SymmetryBreaker(
        model, optimizer, torch.randn(count, 3), criterion="energy", eps=1e-3,
        replacement_rate=1.0, maturity=0,
    )  # fmt: skip
    assert breaker.step() == ()


def test_recent_batches_are_copies_counted_by_examples() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.b(self.a(batch["x"]).tanh())

    model, x = Nested(), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    breaker = fxfib.SymmetryBreaker(
        model, optimizer, ({"x": x},), criterion="energy", eps=1e-3, examples=16
    )
    for k in range(5):
        breaker.step({"x": x.fill_(k).requires_grad_()})
        x = x.detach()
    breaker.step({"x": x[:0]})
    assert [count for count, _ in breaker.recent] == [8, 8]
    assert [float(args[0]["x"][0, 0]) for _, (args, _) in breaker.recent] == [3, 4]
    assert not any(args[0]["x"].requires_grad for _, (args, _) in breaker.recent)
