"""What the steps of a random network pass on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from planting import Copies, Network
from torch import Tensor, nn


@dataclass(frozen=True)
class Val:
    """A value of both networks: ``[N, C, *space]`` (``first``) or ``[N, *space, C]``."""

    name: str
    copies: Copies
    space: tuple[int, ...] = ()
    first: bool = True

    @property
    def axis(self) -> int:
        return 1 if self.first or not self.space else 1 + len(self.space)

    def then(self, name: str, **changes: Any) -> Val:
        return replace(self, name=name, **changes)


@dataclass
class Planted:
    """What ``plant`` gives.

    Attributes:
        base, wide: float64 modules in eval mode that compute the same.
        inputs: example inputs in float64 (and int64).
        unclaimed: why a merge of ``wide`` may leave more parameters than ``base`` has; empty: it
            must not.
        log: the steps in words.
        near: the parameter that was changed, and how, for a near miss.
    """

    base: Network
    wide: Network
    inputs: tuple[Tensor, ...]
    unclaimed: list[str]
    log: list[str]
    near: str = ""


def assign(module: nn.Module, **values: Any) -> nn.Module:
    """Fill parameters and buffers with float64 numbers."""
    for name, value in values.items():
        old = getattr(module, name)
        new = torch.as_tensor(np.asarray(value), dtype=torch.float64).reshape(
            old.shape if old is not None and old.numel() == np.size(value) else np.shape(value)
        )
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new.clone()))
        else:
            setattr(module, name, new.clone())
    return module
