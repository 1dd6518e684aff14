"""As many nodes gone, merged or dropped by us, lose no more than pruned by norms or at random."""

import numpy as np
import pytest
import torch
from torch import nn

from fxfib.coloring import ZERO, Factor
from fxfib.passes.criteria import Policy
from fxfib.passes.curves import curves_of
from fxfib.passes.forward import Analysis
from fxfib.signature import Form, color_form
from fxfib.workshop import Workshop, rewrite

LOSS = nn.functional.cross_entropy


class Pruned(Policy):
    """Drops given numbers of nodes, by a score of their rows."""

    def __init__(self, gone: dict, score: str) -> None:
        super().__init__(1.0)
        self.gone, self.score = gone, score
        self.generator = np.random.default_rng(3)

    def factor(self, analysis: Analysis, node, form: Form, size: int) -> Factor:
        exact = color_form(form, size, 0.0, "fibration", analysis.roundoff)
        rows = np.concatenate([form.rows.double().numpy(), form.offset[:, None]], 1)
        value = {"l1": np.abs(rows).sum(1), "l2": np.square(rows).sum(1),
                 "random": self.generator.random(size)}[self.score]  # fmt: skip
        labels = exact.labels.copy()
        labels[np.argsort(value)[: self.gone.get((node, form.axis), 0)]] = ZERO
        return Factor(exact.axes, labels, np.ones(size), exact.space)


def task() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(500, 3, 6, 6) * torch.rand(500, 1, 1, 1)
    y = (x[:, 0].mean((1, 2)) > 0).long() + (
        x[:, 1, :3].sum((1, 2)) > x[:, 2, 3:].sum((1, 2))
    ).long()
    return x, y


X, Y = task()


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        LOSS(model(X), Y).backward()
        optimizer.step()
    return model.eval()


def perceptron(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(108, 31), activation(), nn.Linear(31, 23), activation(),
        nn.Linear(23, 3),
    )  # fmt: skip


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 13, 3, bias=False), nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 11, 3),
        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(11, 3),
    )  # fmt: skip


NETWORKS = {
    "relu": perceptron,
    "tanh": lambda: perceptron(nn.Tanh),
    "convolutions": convolutional,
}


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_pruning_as_many_nodes_is_no_better(network: str, compensate: bool, share: float) -> None:
    torch.manual_seed(1)
    model = trained(NETWORKS[network]())
    workshop = Workshop(
        model, (X[:2],), criterion="energy", calibration=X if compensate else None,
        compensate=compensate,
    )  # fmt: skip
    curves = curves_of(workshop.graph_module, workshop.guide)
    gone = {c.ref: round(share * c.size) for c in curves if not _is_output(c.ref[0])}
    assert len(gone) == 2
    wanted = model(X).detach()

    def lost(rewriter, small) -> tuple[int, float]:
        workshop.fitted(rewriter, small)
        found = small(X)[0].detach()
        size = sum(p.numel() for p in small.parameters())
        return size, float((found - wanted).square().mean())

    size, ours = lost(*workshop.rewritten(workshop.eps_for(gone)))
    for score in ("l1", "l2", "random"):
        other, theirs = lost(*rewrite(workshop.graph_module, Pruned(gone, score)))
        assert other == size
        assert ours <= theirs * (1 + 1e-6), score


def _is_output(node) -> bool:
    return any(user.op == "output" for user in node.users)
