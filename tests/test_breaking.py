"""Breaking covers in place: the function is kept, the node learns something of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from breaking_models import convolutional, mlp, train
from torch import nn

import fxfib
from fxfib.errors import InputError, RefusedError, VerifyError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=False),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}


def test_every_optimizer_of_torch_is_known() -> None:
    """The table above has all there are; the others are refused with the reason."""
    there = {
        name for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    } - {"Optimizer"}  # fmt: skip
    assert there - {"LBFGS", "SparseAdam", "Muon"} == set(OPTIMIZERS)
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    with pytest.raises(RefusedError, match="history"):
        fxfib.SymmetryBreaker(model, torch.optim.LBFGS(model.parameters()), (x,))
    with pytest.raises(InputError, match="no optimizer"):
        fxfib.SymmetryBreaker(model, [], (x,))
    sparse = torch.optim.SparseAdam(list(model.parameters()))  # has no state before a sparse step
    assert fxfib.SymmetryBreaker(model, sparse, (x,), eps=1e-9).break_all()


def test_several_optimizers_share_a_model() -> None:
    """Muon takes matrices alone, so another one trains the biases."""
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    both = [
        torch.optim.Muon(matrices, lr=0.01),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1], lr=0.01),
    ]
    with pytest.raises(InputError, match=r"does not train 0\.bias"):
        fxfib.SymmetryBreaker(model, both[0], (x,))
    for _ in range(3):
        (model(x) - 1).square().mean().backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    breaker = fxfib.SymmetryBreaker(model, both, (x,), eps=1e-6)
    before = model(x).detach()
    done = breaker.break_all()
    assert {(r.layer, r.node) for r in done} == {("0", 4), ("2", 2), ("2", 5)}
    assert torch.allclose(model(x), before, rtol=0, atol=1e-6)
    momentum = both[0].state[model[0].weight]["momentum_buffer"]
    assert not momentum[4].any() and momentum[1].any()
    average = both[1].state[model[0].bias]["exp_avg"]
    assert average[4] == 0 != average[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_shot_keeps_the_function_and_frees_the_nodes(name: str) -> None:
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, 3)
    parameters = list(model.parameters())
    breaker = fxfib.SymmetryBreaker(model, optimizer, (x,), eps=1e-9)
    before = model(x).detach()
    if name == "ASGD":
        average = optimizer.state[model[4].weight]["ax"][:, [0, 2, 5]].sum(1)
    done = breaker.break_all()
    assert [(r.layer, r.node, r.representative) for r in done] == [
        ("0", 4, 1), ("2", 2, 0), ("2", 5, 0),
    ]  # fmt: skip
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not torch.allclose(model[0].weight[4], model[0].weight[1])
    assert bool((model[2].weight[:, 4] == 0).all())
    assert float(model[0].bias[4].detach()) == 0
    assert bool((model[0].weight.grad[4] == 0).all())
    for key, value in optimizer.state[model[0].weight].items():
        if value is None or value.ndim == 0 or len(value) == 1:  # what all rows share
            continue
        if key == "ax":
            assert torch.equal(value[4], model[0].weight[4].detach())
        else:
            start = {"sum": 0.5, "step_size": 0.01}.get(key, 0.0)
            assert bool((value[4] == start).all()), key
            assert bool((value[1] != start).any()), key
    if name == "ASGD":  # the averaged network is kept, too
        averages = optimizer.state[model[4].weight]["ax"]
        assert torch.allclose(averages[:, 0], average, rtol=0, atol=1e-12)
    train(model, optimizer, x, 5)
    covers = breaker.covers()
    assert len(set(covers["0"].tolist())) == 5
    assert len(set(covers["2"].tolist())) == 7


def test_convolution_batch_norm_pooling_and_flatten() -> None:
    model, x = convolutional(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    breaker = fxfib.SymmetryBreaker(model, optimizer, (x,))
    before = model(x).detach()
    (done,) = breaker.break_all()
    assert (done.layer, done.node, done.representative) == ("0", 3, 1)
    assert done.change < 1e-12
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
    assert bool((model[5].weight[:, 12:16] == 0).all())
    assert float(model[1].running_mean[3]) == 0
    assert not model.training


def test_rate_and_maturity() -> None:
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    breaker = fxfib.SymmetryBreaker(
        model, optimizer, (x,), replacement_rate=0.1, maturity=4, every=2
    )
    happened = {step: breaker.step() for step in range(1, 31)}
    replaced = {step: [(r.layer, r.node) for r in done] for step, done in happened.items() if done}
    # The first look at nodes older than 4 is at step 6.  Two of layer 2 are eligible: 0.4 are due,
    # 0.8, 1.2; then its cover is broken, and the third node is none of it.  One of layer 0: at 1.0.
    assert list(replaced) == [10, 14]
    assert replaced[10] in ([("2", 2)], [("2", 5)])
    assert replaced[14] == [("0", 4)]


def test_state_goes_on() -> None:
    x = torch.randn(9, 3, dtype=torch.float64)
    breakers = []
    for _ in range(2):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        breakers.append(fxfib.SymmetryBreaker(model, optimizer, (x,), maturity=3, every=1,
                                              replacement_rate=0.2))  # fmt: skip
    straight = [breakers[0].step() for _ in range(4)]
    assert not any(straight)
    breakers[1].load_state_dict(copy.deepcopy(breakers[0].state_dict()))
    torch.manual_seed(3)
    one = [[(r.layer, r.node) for r in breakers[0].step()] for _ in range(6)]
    torch.manual_seed(3)
    two = [[(r.layer, r.node) for r in breakers[1].step()] for _ in range(6)]
    assert one == two
    with pytest.raises(InputError, match="other layers"):
        breakers[0].load_state_dict({**breakers[0].state_dict(), "ages": {"0": [1]}})


def test_what_would_change_the_function_is_undone() -> None:
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    breaker = fxfib.SymmetryBreaker(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(VerifyError, match="nothing was replaced"):
        breaker.replace([("0", 2, 0)])  # no cover
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_training_with_everything_goes_on_from_a_checkpoint(compiled: bool) -> None:
    """Groups, accumulated gradients, torch.compile; the second half again from a checkpoint."""
    torch.manual_seed(5)
    batches = torch.randn(12, 2, 9, 3, dtype=torch.float64)

    def start() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, fxfib.SymmetryBreaker]:
        model = mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()},
                  {"params": model[4].parameters(), "weight_decay": 0.01}]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        breaker = fxfib.SymmetryBreaker(
            run, optimizer, batches[0, 0], replacement_rate=0.1, maturity=2, every=2, eps=1e-9
        )
        return model, run, optimizer, breaker

    def go(run: nn.Module, optimizer: torch.optim.Optimizer, breaker: fxfib.SymmetryBreaker,
           some: torch.Tensor) -> list[tuple[str, int]]:  # fmt: skip
        done = []
        for micro in some:
            for x in micro:
                ((run(x) - 1).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            before = run(batches[0, 0]).detach()
            done += (now := breaker.step())
            assert torch.allclose(run(batches[0, 0]), before, rtol=0, atol=1e-9)
            assert all(r.change < 1e-9 for r in now)
        return [(r.layer, r.node) for r in done]

    model, run, optimizer, breaker = start()
    assert not go(run, optimizer, breaker, batches[:5])  # 0.4 of a node is due
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), breaker.state_dict()))
    torch.manual_seed(7)
    late = go(run, optimizer, breaker, batches[5:])
    assert len(late) == 1
    assert run.training
    again, run, optimizer, breaker = start()
    for one, state in zip((again, optimizer, breaker), saved, strict=True):
        one.load_state_dict(state)
    torch.manual_seed(7)
    assert go(run, optimizer, breaker, batches[5:]) == late
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("criterion", ["fibration", "energy"])
def test_mixed_precision_with_a_scaler(criterion: str) -> None:
    """Weights are float32, the forward pass is bfloat16, gradients are scaled until the step."""
    model, x = mlp().float(), torch.randn(64, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    breaker = fxfib.SymmetryBreaker(
        model, optimizer, (x,), eps=1e-5, criterion=criterion, every=4, maturity=2,
        replacement_rate=1.0,
    )  # fmt: skip
    done = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x) - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        before = model(x).detach()
        now = breaker.step(x)
        bound = 1e-4 if criterion == "fibration" else 0.05
        assert float((model(x).detach() - before).norm() / before.norm()) <= bound
        done += now
    assert {("0", 4), ("2", 2), ("2", 5)} <= {(r.layer, r.node) for r in done} or len(done) >= 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_wrong_choices_and_optimizers_are_refused() -> None:
    model, x = mlp(), torch.randn(9, 3, dtype=torch.float64)
    breaker = fxfib.SymmetryBreaker(model, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
    for chosen, why in (
        ([("9", 0, 1)], "no such layer"),
        ([("4", 0, 1)], "output of the network"),
        ([("2", 7, 0)], "7 nodes"),
        ([("2", 2, 0), ("2", 2, 5)], "replaced twice"),
        ([("2", 2, 5), ("2", 5, 0)], "takes over and is replaced"),
    ):
        with pytest.raises(InputError, match=why):
            breaker.replace(chosen)

    class Own(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(model.parameters(), {})

    with pytest.raises(RefusedError, match="how Own starts"):
        fxfib.SymmetryBreaker(model, Own(), (x,))
    with pytest.raises(RefusedError, match="each of which would draw"):
        fxfib.SymmetryBreaker(nn.DataParallel(model), torch.optim.SGD(model.parameters()), (x,))
    with pytest.raises(InputError, match="replacement_rate"):
        fxfib.SymmetryBreaker(model, torch.optim.SGD(model.parameters()), (x,), replacement_rate=2)
