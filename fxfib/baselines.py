"""Published baselines of keeping a network able to learn, called like the breaker of covers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxfib.errors import InputError, RefusedError
from fxfib.optimizer_state import Optimizers
from fxfib.passes.units import Place, Unit
from fxfib.refusals import unwrap
from fxfib.renewal import Renewal, Replacement
from fxfib.units_at_work import activations, into_bias, plain


class ContinualBackpropagation(Renewal):
    r"""The published baseline: the least useful mature nodes start anew, in covers or not.

    The utility of a node is its adaptable contribution,
    :math:`\overline{|h - \bar h|}\,\sum|w_{out}| / \sum|w_{in}|`, averaged over the batches that
    the model sees in training (running means, corrected for their start).  The mean of what a
    replaced node contributed goes into the bias that follows; the rest is lost.

    Layers that one ``nn.Linear`` or ``nn.Conv*`` reads are covered.  Forward hooks observe the
    activations (:meth:`close` takes them off), which is why a compiled model is refused.

    Args:
        decay: of the running means, in [0, 1).
        Others as for :class:`Renewal`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        example_inputs: Any,
        *,
        decay: float = 0.99,
        **options: Any,
    ) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay must be in [0, 1), not {decay!r}.")
        if unwrap(model) is not model:
            raise RefusedError(
                f"{type(model).__name__} need not run the hooks that observe activations; "
                "give the module inside, and train that."
            )
        super().__init__(model, optimizer, example_inputs, **options)
        self.decay = decay
        self.running = {name: self._unseen(unit) for name, unit in self.units.items()}
        self._handles = [
            self._owner(unit.outgoing[0]).register_forward_pre_hook(self._observe(unit))
            for unit in self.units.values()
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def candidates(self) -> dict[str, dict[int, int | None]]:
        """Every node whose activations were seen; nobody takes over."""
        return {
            name: dict.fromkeys(torch.nonzero(own["seen"]).flatten().tolist())
            for name, own in self.running.items()
        }

    def order(self, layer: str, eligible: list[int]) -> list[int]:
        """The least useful first."""
        utility = self.utility(layer)[eligible]
        return [eligible[k] for k in torch.argsort(utility, stable=True).tolist()]

    def utility(self, layer: str) -> Tensor:
        """Adaptable contribution of a layer's nodes, float64 ``[nodes]``; NaN before any batch."""
        own = self.running[layer]
        return own["utility"] / (1 - self.decay ** own["seen"])

    def state_dict(self) -> dict[str, Any]:
        """What to keep in a checkpoint, the running means included."""
        running = {n: {k: v.clone() for k, v in own.items()} for n, own in self.running.items()}
        return {**super().state_dict(), "running": running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        for name, own in self.running.items():
            for key, value in own.items():
                value.copy_(state["running"][name][key])

    def _reason(self, unit: Unit) -> str:
        readers = [self._owner(place) for place in unit.outgoing]
        if len(readers) > 1 or not plain(readers[0]):
            return "it is not read by one linear layer or convolution"
        return super()._reason(unit)

    def _unseen(self, unit: Unit) -> dict[str, Tensor]:
        device = self.tensor(unit.outgoing[0].name).device
        shape = unit.outgoing[0].positions.shape
        shapes = {"utility": shape[:1], "seen": shape[:1], "mean": shape}
        return {k: torch.zeros(s, dtype=torch.float64, device=device) for k, s in shapes.items()}

    def _observe(self, unit: Unit) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        place = unit.outgoing[0]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module.training and torch.is_grad_enabled():  # somebody learns
                observe(module, args)

        @torch.no_grad()
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            own, h = self.running[unit.layer], activations(place, module, args[0])
            if not h.numel():
                return
            # What overflows (as it may in mixed precision) would stay in the means for ever.
            fine = torch.isfinite(h).all(2).all(1)
            h = torch.where(fine[:, None, None], h, 0.0)
            weight = (1 - self.decay) * fine.double()
            own["seen"] += fine
            own["mean"].lerp_(h.mean(2).double(), weight[:, None].expand_as(own["mean"]))
            center = own["mean"] / (1 - self.decay ** own["seen"].clamp_min(1))[:, None]
            spread = (h - center.to(h.dtype)[:, :, None]).abs().mean((1, 2)).double()
            incoming = self._size(unit.incoming).clamp_min(1e-12)
            own["utility"].lerp_(spread * self._size(unit.outgoing) / incoming, weight)

        return hook

    def _size(self, places: list[Place]) -> Tensor:
        """Sum of the absolute weights of every node, over its matrices."""
        total = torch.zeros(())
        for place in places:
            weight = self.tensor(place.name).detach()
            if weight.ndim > 1:
                sums = weight.movedim(place.axis, 0).flatten(1).abs().double().sum(1)
                rows = self._rows(place, list(range(len(place.positions))))
                own = sums[rows].view(len(place.positions), -1).sum(1)
                total = own + total.to(own.device)
        return total

    def _hand_over(self, unit: Unit, node: int, lead: int | None, scale: float = 1.0) -> None:
        super()._hand_over(unit, node, lead, scale)
        place, own = unit.outgoing[0], self.running[unit.layer]
        if lead is None and own["seen"][node]:
            mean = own["mean"][node] / (1 - self.decay ** own["seen"][node])
            into_bias(place, self._owner(place), node, mean)

    def _started(self, layer: str, nodes: list[int]) -> None:
        super()._started(layer, nodes)
        for value in self.running[layer].values():
            value[nodes] = 0.0


class ShrinkAndPerturb:
    """The other baseline: all parameters shrink and get a little of a new initialisation.

    ``p <- (1 - shrink) p + perturb * fresh``, where ``fresh`` is drawn by the modules' own
    ``reset_parameters``; frozen parameters stay as they are.

    Args:
        model: trained in place.
        optimizer, example_inputs: not used; so that one way can stand for another.
        shrink: in [0, 1].
        perturb: not negative.
        every: every so many steps.

    Raises:
        InputError: an option is out of range.
        RefusedError: a parameter has no initialisation of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers | None = None,
        example_inputs: Any = None,
        *,
        shrink: float = 1e-4,
        perturb: float = 1e-4,
        every: int = 1,
    ) -> None:
        if not (0 <= shrink <= 1 and 0 <= perturb < float("inf") and every >= 1):
            raise InputError(
                "shrink must be in [0, 1], perturb not negative and finite, every at least 1."
            )
        self.source = unwrap(model)
        self.shrink, self.perturb, self.every = shrink, perturb, every
        self.steps = 0
        self._fresh = copy.deepcopy(self.source)
        for path, module in self._fresh.named_modules():
            for name in dict(module.named_parameters(recurse=False)):
                if not callable(getattr(module, "reset_parameters", None)):
                    full = f"{path}.{name}" if path else name
                    raise RefusedError(f"{full} has no initialisation of its own.")

    def step(self, *inputs: Any, **kwargs: Any) -> tuple[Replacement, ...]:
        """Call after ``optimizer.step()``; no single node is replaced."""
        self.steps += 1
        if self.steps % self.every:
            return ()
        for module in self._fresh.modules():
            if dict(module.named_parameters(recurse=False)):
                module.reset_parameters()  # type: ignore[operator]
        with torch.no_grad():
            for old, new in zip(self.source.parameters(), self._fresh.parameters(), strict=True):
                if old.requires_grad:
                    old.mul_(1 - self.shrink).add_(new.to(old), alpha=self.perturb)
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What to keep in a checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.steps = state["steps"]
