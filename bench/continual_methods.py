"""The methods of bench/continual.py, and the options among which tuning chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from continual_tasks import Setting
from torch import Tensor, nn

import fxfib

Options = dict[str, Any]
Made = tuple[torch.optim.Optimizer, Any]


def _optimizer(model: nn.Module, setting: Setting, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), setting.lr, momentum=setting.momentum, weight_decay=decay
    )


def sgd(model: nn.Module, images: Tensor, setting: Setting, options: Options) -> Made:
    """Nothing beside the optimizer."""
    return _optimizer(model, setting), None


def l2(model: nn.Module, images: Tensor, setting: Setting, options: Options) -> Made:
    """Weight decay."""
    return _optimizer(model, setting, options["decay"]), None


def shrink(model: nn.Module, images: Tensor, setting: Setting, options: Options) -> Made:
    """Shrink and perturb."""
    optimizer = _optimizer(model, setting)
    return optimizer, fxfib.ShrinkAndPerturb(model, optimizer, images, **options)


def backprop(model: nn.Module, images: Tensor, setting: Setting, options: Options) -> Made:
    """Continual backpropagation; with weight decay, if asked for."""
    optimizer = _optimizer(model, setting, options.pop("decay", 0.0))
    return optimizer, fxfib.ContinualBackpropagation(model, optimizer, (images,), **options)


def breaking(model: nn.Module, images: Tensor, setting: Setting, options: Options) -> Made:
    """Covers are broken; with weight decay, if asked for."""
    optimizer = _optimizer(model, setting, options.pop("decay", 0.0))
    return optimizer, fxfib.SymmetryBreaker(model, optimizer, (images,), **options)


METHODS: dict[str, Callable[[nn.Sequential, Tensor, Setting, Options], Made]] = {
    "sgd": sgd, "l2": l2, "shrink": shrink, "backprop": backprop, "breaking": breaking,
    "covers": breaking,
}  # fmt: skip
# The first is the published one, or the usual.
OPTIONS: dict[str, list[Options]] = {
    "sgd": [{}],
    "l2": [{"decay": decay} for decay in (1e-4, 3e-4, 1e-3, 3e-3)],
    "shrink": [
        {"shrink": s, "perturb": p}
        for s, p in ((1e-5, 1e-4), (1e-5, 1e-3), (1e-4, 1e-3), (1e-4, 1e-4))
    ],
    "backprop": [
        *({"replacement_rate": rate} for rate in (3e-4, 3e-5, 1e-4, 1e-3, 3e-3, 1e-2)),
        {"replacement_rate": 3e-3, "maturity": 1000},
        {"replacement_rate": 1e-3, "decay": 3e-4},
    ],
    "breaking": [
        {"criterion": "energy", "every": 50, "examples": 256, "replacement_rate": rate, "eps": eps}
        | more
        for rate, eps, more in (
            (1e-2, 1e-3, {}), (1e-2, 1e-4, {}), (1e-2, 3e-3, {}), (1e-3, 1e-3, {}),
            (3e-3, 1e-3, {}), (3e-3, 1e-4, {}), (3e-3, 1e-6, {}), (3e-3, 1e-2, {}),
            (3e-3, 1e-3, {"maturity": 1000}), (1e-2, 1e-3, {"maturity": 1000}),
            (3e-3, 1e-3, {"decay": 3e-4}),
        )
    ],
    "covers": [
        {"criterion": "cosine", "replacement_rate": rate, "eps": eps, "opfiber_eps": other}
        for rate, eps, other in (
            (3e-4, 0.8, 0.5), (3e-3, 0.8, 0.5), (3e-4, 0.4, 0.5), (3e-3, 0.4, 0.5),
        )
    ],
}  # fmt: skip
# For the network that takes long: what mattered with the other.
FEWER: dict[str, list[Options]] = {
    "backprop": [{"replacement_rate": 3e-4}, {"replacement_rate": 1e-3}],
    "breaking": [
        {"criterion": "energy", "every": 50, "examples": 256, "replacement_rate": 3e-3, "eps": eps}
        for eps in (1e-3, 1e-6)
    ],
}  # fmt: skip


def options_of(setting: str, method: str) -> list[Options]:
    """Among which tuning chooses."""
    return (FEWER if setting == "cifar" else OPTIONS).get(method, OPTIONS[method])


def name_of(options: Options) -> str:
    """A short name of some options, for a CSV's cell and a file."""
    return " ".join(f"{key}={value}" for key, value in options.items())
