"""Nodes of a network that trains start anew, in place (paper, section 3.4)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfib.capture import capture, normalize_inputs
from fxfib.errors import InputError, RefusedError, VerifyError
from fxfib.optimizer_state import Memory, Optimizers
from fxfib.passes.backward import Continued
from fxfib.passes.units import Place, Unit, units_of
from fxfib.passes.verify import TOLERANCE, difference
from fxfib.refusals import unwrap


@dataclass(frozen=True)
class Replacement:
    """One node that started anew.

    Attributes:
        layer: the layer that makes it.
        node: its number.
        representative: the node that took over what it contributed; None: nobody did.
        change: relative change of the outputs on the example inputs, by all of a step's
            replacements; None where it was not measured.
    """

    layer: str
    node: int
    representative: int | None
    change: float | None


# A layer, a node of it, and who takes over its outgoing weights.
Chosen = tuple[str, int, int | None]


class Renewal(ABC):
    """What all ways to renew nodes share: where a node's parameters are, and how it starts anew.

    Args:
        model: trained in place; every parameter keeps its identity.  ``torch.compile`` may wrap it.
        optimizer: any of ``torch.optim`` but ``LBFGS``, or several.  State of replaced nodes'
            weights becomes that of a new parameter, gradients zero; the count of steps goes on.
        example_inputs, example_kwargs: as for :func:`fxfib.compile`.
        replacement_rate: share of the eligible nodes that is replaced, by step.  What is less than
            one node adds up.
        maturity: a node is eligible that is older than so many steps.
        every: look every so many steps (and replace so many times as many).
        generator: of the choice among eligible nodes; weights are drawn as layers do it.

    Attributes:
        units: the layers whose nodes can be replaced, with the places of their weights.
        refused: the others, and why.  Layers frozen later are left alone as long as they are.

    Raises:
        InputError: an option is out of range, or no layer's nodes can be replaced.
        RefusedError: the optimizer is not of ``torch.optim``, or the model runs on several devices.
        As :func:`fxfib.color` otherwise.
    """

    #: Whether the change of the outputs is measured.
    measures = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        example_inputs: Any,
        *,
        replacement_rate: float = 3e-4,
        maturity: int = 100,
        every: int = 1,
        example_kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= replacement_rate <= 1:
            raise InputError(f"replacement_rate must be in [0, 1], not {replacement_rate!r}.")
        if maturity < 0 or every < 1:
            raise InputError("maturity must not be negative, and every must be at least 1.")
        self.memory = Memory(optimizer)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise RefusedError(
                f"{type(model).__name__} trains copies, each of which would draw its own weights; "
                "replace nodes of the module inside, on one process, and send it to the others."
            )
        self.source = unwrap(model)
        self.rate, self.maturity, self.every = replacement_rate, maturity, every
        self.generator = generator
        with evaluating(self.source):
            captured = capture(self.source, example_inputs, example_kwargs)
        self.example = normalize_inputs(self.source, example_inputs, example_kwargs)
        self.continued = Continued(captured.graph_module)
        self.units: dict[str, Unit] = {}
        self.refused: dict[str, str] = {}
        for unit in units_of(self.continued.color()):
            reason = unit.reason or self._reason(unit)
            if reason:
                self.refused[unit.layer] = reason
            else:
                self.units[unit.layer] = unit
        if not self.units:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            raise InputError(f"no layer's nodes can be replaced ({reasons or 'there is none'}).")
        self.ages = {name: np.zeros(unit.size, np.int64) for name, unit in self.units.items()}
        self.due = dict.fromkeys(self.units, 0.0)
        self.steps = 0

    # -- what subclasses decide --------------------------------------------------------------

    @abstractmethod
    def candidates(self) -> dict[str, dict[int, int | None]]:
        """For every layer the nodes that may be replaced, and who takes over from them."""

    def order(self, layer: str, eligible: list[int]) -> list[int]:
        """Whom to replace first: anyone."""
        drawn = torch.randperm(len(eligible), generator=self.generator).tolist()
        return [eligible[k] for k in drawn]

    def tolerance(self) -> float:
        """How much the outputs may change (relative)."""
        return float("inf")

    def _reason(self, unit: Unit) -> str:
        """Why a layer's nodes cannot be replaced; empty if they can."""
        for place in (*unit.incoming, *unit.outgoing):
            tensor = self.tensor(place.name)
            if isinstance(tensor, nn.Parameter) and self.memory.group(tensor) is None:
                return f"the optimizer does not train {place.name}"
        if frozen := self._frozen(unit):
            return f"{frozen} is frozen"
        for place in unit.incoming:
            if not callable(getattr(self._owner(place), "reset_parameters", None)):
                return f"{place.name} has no initialisation of its own"
        return ""

    def _frozen(self, unit: Unit) -> str:
        """A parameter that does not train at present; empty where there is none."""
        for place in (*unit.incoming, *unit.outgoing):
            tensor = self.tensor(place.name)
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                return place.name
        return ""

    def _started(self, layer: str, nodes: list[int]) -> None:
        """Some nodes have started anew."""
        self.ages[layer][nodes] = 0

    # -- stepping ----------------------------------------------------------------------------

    def step(self, *inputs: Any, **kwargs: Any) -> tuple[Replacement, ...]:
        """Call after ``optimizer.step()``: replaces what is due.

        Args:
            inputs, kwargs: what the model was called with, for ways that look at activity.

        Raises:
            VerifyError: the outputs would change though they must not; nothing was replaced.
        """
        self.steps += 1
        for ages in self.ages.values():
            ages += 1
        mature = any((ages > self.maturity).any() for ages in self.ages.values())
        if self.steps % self.every or not mature or not self.rate:
            return ()
        chosen: list[Chosen] = []
        for name, found in self.candidates().items():
            if self._frozen(self.units[name]):
                continue
            eligible = [node for node in found if self.ages[name][node] > self.maturity]
            self.due[name] += min(1.0, self.rate * self.every) * len(eligible)
            count = min(int(self.due[name] + 1e-9), len(eligible))  # ten tenths are one
            self.due[name] -= count
            chosen += [(name, n, found[n]) for n in sorted(self.order(name, eligible)[:count])]
        return self.replace(chosen)

    def replace(self, chosen: Iterable[Chosen]) -> tuple[Replacement, ...]:
        """Start some nodes anew: layer, node, and who takes over its outgoing weights.

        Raises:
            InputError: a layer or a node that is none, twice the same, or taken over by a node that
                starts anew itself.
            RefusedError: the optimizer's state has a shape that tells no node from another.
            VerifyError: the outputs would change though they must not; nothing was replaced.
        """
        chosen = list(chosen)
        nodes = self._checked(chosen)
        if not nodes:
            return ()
        change = None
        before, saved = (self._outputs(), self._saved(nodes)) if self.measures else ([], [])
        with torch.no_grad():
            for name, node, lead in chosen:
                self._hand_over(self.units[name], node, lead)
            for name, own in nodes.items():
                self._draw(self.units[name], own)
            # Last, as a fresh row may read a node that is fresh, too.
            for name, own in nodes.items():
                self._silence(self.units[name], own)
            if self.measures:
                change = difference(before, self._outputs()).relative
                if change > self.tolerance():
                    for tensor, old in saved:
                        tensor.copy_(old)
                    raise VerifyError(
                        f"replacing {len(chosen)} nodes would change the outputs by {change:.2g} "
                        "(relative); nothing was replaced."
                    )
        for name, own in nodes.items():
            self._started(name, own)
        return tuple(Replacement(*entry, change) for entry in chosen)

    def state_dict(self) -> dict[str, Any]:
        """What to keep in a checkpoint, beside the model's and the optimizer's own."""
        ages = {name: ages.tolist() for name, ages in self.ages.items()}
        return {"steps": self.steps, "ages": ages, "due": dict(self.due)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            InputError: it is of other layers, or of another way to renew nodes.
        """
        if state.keys() != self.state_dict().keys():
            raise InputError(f"the state is none of {type(self).__name__}.")
        sizes = {name: len(ages) for name, ages in state["ages"].items()}
        if sizes != {name: unit.size for name, unit in self.units.items()}:
            raise InputError("the state is that of other layers.")
        self.steps, self.due = state["steps"], dict(state["due"])
        self.ages = {name: np.array(ages, np.int64) for name, ages in state["ages"].items()}

    # -- parameters --------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the user's model."""
        path, _, leaf = name.rpartition(".")
        return getattr(self.source.get_submodule(path), leaf)

    def _owner(self, place: Place) -> nn.Module:
        return self.source.get_submodule(place.name.rpartition(".")[0])

    def _rows(self, place: Place, nodes: list[int]) -> Tensor:
        rows = torch.from_numpy(place.positions[nodes].reshape(-1))
        return rows.to(self.tensor(place.name).device)

    def _checked(self, chosen: list[Chosen]) -> dict[str, list[int]]:
        nodes: dict[str, list[int]] = {}
        for name, node, lead in chosen:
            if name not in self.units:
                raise InputError(f"{name}: {self.refused.get(name, 'there is no such layer')}.")
            size = self.units[name].size
            if not 0 <= node < size or not (lead is None or 0 <= lead < size):
                raise InputError(f"{name} has {size} nodes; {node} or {lead} is none of them.")
            nodes.setdefault(name, []).append(node)
        for name, own in nodes.items():
            leads = {lead for layer, _, lead in chosen if layer == name}
            if len(set(own)) < len(own) or leads & set(own):
                raise InputError(
                    f"{name}: a node is replaced twice, or takes over and is replaced."
                )
            for place in (*self.units[name].incoming, *self.units[name].outgoing):
                self.memory.refuse_shapes(self.tensor(place.name), place.name)
        return nodes

    def _saved(self, layers: Iterable[str]) -> list[tuple[Tensor, Tensor]]:
        places = [p for n in layers for p in (*self.units[n].incoming, *self.units[n].outgoing)]
        tensors = list({id(t): t for t in (self.tensor(place.name) for place in places)}.values())
        more = [v for t in tensors for v in self.memory.entries(t).values()]
        more += [t.grad for t in tensors if t.grad is not None]
        return [(t, t.detach().clone()) for t in (*tensors, *more)]

    def _outputs(self) -> list[Any]:
        args, kwargs = self.example
        with evaluating(self.source), torch.no_grad(), full_precision():
            return pytree.tree_leaves(self.source(*args, **kwargs))

    def _hand_over(self, unit: Unit, node: int, lead: int | None, scale: float = 1.0) -> None:
        """What reads a node reads its representative; so do averages that the optimizer keeps."""
        if lead is None:
            return
        for place in unit.outgoing:
            tensor = self.tensor(place.name)
            own, to = self._rows(place, [node]), self._rows(place, [lead])
            for key, value in {"": tensor, **self.memory.entries(tensor)}.items():
                if key in ("", "ax"):
                    rows = value.movedim(place.axis, 0)
                    rows[to] += scale * rows[own]

    def _draw(self, unit: Unit, nodes: list[int]) -> None:
        """Fresh incoming weights, as the layers themselves draw them; biases are zero."""
        fresh: dict[str, nn.Module] = {}
        for place in unit.incoming:
            path, _, leaf = place.name.rpartition(".")
            if path not in fresh:
                fresh[path] = copy.deepcopy(self.source.get_submodule(path))
                fresh[path].reset_parameters()  # type: ignore[operator]
            rows = self._rows(place, nodes)
            drawn = getattr(fresh[path], leaf).movedim(place.axis, 0)[rows]
            zero = leaf.startswith("bias") and not isinstance(
                fresh[path], nn.modules.batchnorm._NormBase
            )
            target = self.tensor(place.name).movedim(place.axis, 0)
            target[rows] = torch.zeros_like(drawn) if zero else drawn
            self.memory.forget(self.tensor(place.name), place.axis, rows)

    def _silence(self, unit: Unit, nodes: list[int]) -> None:
        for place in unit.outgoing:
            rows = self._rows(place, nodes)
            self.tensor(place.name).movedim(place.axis, 0)[rows] = 0.0
            self.memory.forget(self.tensor(place.name), place.axis, rows)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every part is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def full_precision() -> Iterator[None]:
    """Outside of any autocast that the training loop is in."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not kinds:
        yield
        return
    with torch.autocast(kinds[0], enabled=False), torch.autocast(kinds[-1], enabled=False):
        yield


def default_tolerance(module: nn.Module) -> float:
    """The relative change of the outputs that rounding explains, by the parameters' dtypes."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    return max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=1e-4)
