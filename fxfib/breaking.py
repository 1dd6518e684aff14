"""Giving capacity back while training: breaking covers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfib.capture import normalize_inputs
from fxfib.errors import InputError
from fxfib.optimizer_state import Optimizers
from fxfib.passes.cover import labels_of
from fxfib.passes.units import Place, Unit
from fxfib.renewal import Renewal, Replacement, default_tolerance, evaluating, full_precision
from fxfib.substitutes import Substitute, substitutes
from fxfib.units_at_work import activations, into_bias, plain, takes_constants


class SymmetryBreaker(Renewal):
    r"""Breaks covers to keep a network able to learn.

    Nodes of one cover learn the same for ever.  All but one of them are redundant: the outgoing
    weights of such a node are added to its representative's (the oldest), so the function is kept
    (checked), its incoming weights are drawn afresh from the layer's own initialisation (biases are
    zero), its outgoing weights are zero, and the optimizer forgets about it::

        breaker = fxfib.SymmetryBreaker(model, optimizer, images)
        ...
        optimizer.step()
        breaker.step()

    Linear layers, convolutions (a flatten behind, batch norm, pooling and activations between) and
    recurrent layers are covered; layers that are not are in ``refused``, with the reason.  Of a
    cover of three, one replaced node ends the cover: the representative's error has doubled, and it
    parts from the third by itself.

    Weights alone say what is equal for *every* input.  With ``criterion="energy"`` a node is
    redundant that is so on the inputs that the model is trained on, ``breaker.step(images)``:
    one other node of the layer, or a constant, does what it does,
    :math:`h_i \approx a h_j + b`, and by that the reader loses at most the share ``eps`` of

    .. math::
        \sum_k \lVert w^{out}_k\rVert^2 \operatorname{Var}(h_k).

    Dead units are such nodes (their share is 0).  The outgoing weights times :math:`a` go to the
    other node, times :math:`b` into the reader's bias; what costs least is replaced first.  The
    layers' nodes must be read by one linear layer or convolution.

    Args:
        eps, opfiber_eps, criterion: how near activations and errors must be; see
            :func:`fxfib.color`.  At 0 the outputs must not change; above, the change stands in
            every :class:`Replacement`.
        examples: with ``"energy"``, how many recent examples are kept to look at.
        Others as for :class:`Renewal`.
    """

    measures = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        example_inputs: Any,
        *,
        eps: float = 0.0,
        opfiber_eps: float | None = None,
        criterion: str = "fibration",
        every: int = 100,
        examples: int = 512,
        **options: Any,
    ) -> None:
        from fxfib.api import check_options

        if isinstance(eps, Mapping):
            raise InputError("covers take one number as eps.")
        if examples < 2 or (criterion == "energy" and opfiber_eps is not None):
            raise InputError("examples must be at least 2; 'energy' has no eps for opfibers.")
        for value in (eps, eps if opfiber_eps is None else opfiber_eps):
            check_options(value, criterion, None)
        self.eps, self.opfiber_eps, self.criterion = float(eps), opfiber_eps, criterion
        super().__init__(model, optimizer, example_inputs, every=every, **options)
        self.examples = examples
        self.recent: list[tuple[int, Any]] = []
        self._found: dict[str, dict[int, Substitute]] = {}

    def covers(self) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
        """Labels of the nodes of every layer that can be replaced; not for ``"energy"``.

        Raises:
            InputError: redundant nodes are told by energy, in which there are no classes.
        """
        if self.criterion == "energy":
            raise InputError("'energy' tells which nodes others can stand for, not classes.")
        now = {
            **dict(self.source.named_parameters(remove_duplicate=False)),
            **dict(self.source.named_buffers(remove_duplicate=False)),
        }
        analysis = self.continued.color(self.eps, self.opfiber_eps, self.criterion, weights=now)
        found = labels_of(analysis, self.continued.values, "cover")
        return {name: found[name] for name in self.units}

    def step(self, *inputs: Any, **kwargs: Any) -> tuple[Replacement, ...]:
        """Call after ``optimizer.step()``, with what the model was called with: see the class.

        Raises:
            VerifyError: the outputs would change though they must not; nothing was replaced.
        """
        if self.criterion == "energy" and (inputs or kwargs):
            self._remember(inputs, kwargs)
        return super().step(*inputs, **kwargs)

    def _remember(self, inputs: Any, kwargs: Any) -> None:
        """Keep a copy of a batch, as loops may write the next one into the same memory."""
        batch = normalize_inputs(self.source, inputs, kwargs)
        count = _count(batch)
        if count:
            self.example = pytree.tree_map(
                lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, batch
            )
            self.recent.append((count, self.example))
            seen = sum(count for count, _ in self.recent)
            while seen - self.recent[0][0] >= self.examples:
                seen -= self.recent.pop(0)[0]

    def candidates(self, *, everyone: bool = False) -> dict[str, dict[int, int | None]]:
        """All but the oldest node of every cover, or all that others can stand for."""
        if self.criterion == "energy":
            self._found = self.substitutes(everyone=everyone)
            return {name: {n: s.node for n, s in own.items()} for name, own in self._found.items()}
        found: dict[str, dict[int, int | None]] = {}
        for name, labels in self.covers().items():
            lead: dict[int, int] = {}
            for node in np.argsort(-self.ages[name], kind="stable"):
                lead.setdefault(int(labels[node]), int(node))
            leads = [lead[int(label)] for label in labels]
            found[name] = {node: lead for node, lead in enumerate(leads) if lead != node}
        return found

    def order(self, layer: str, eligible: list[int]) -> list[int]:
        """By energy, what costs least; of covers, anyone."""
        if self.criterion == "energy":
            return sorted(eligible, key=lambda node: self._found[layer][node].cost)
        return super().order(layer, eligible)

    def substitutes(self, *, everyone: bool = True) -> dict[str, dict[int, Substitute]]:
        """What can stand for which node on the recent examples, by layer; or for mature ones."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.units}
        handles = []
        for name, unit in self.units.items():
            place = unit.outgoing[0]
            hook = partial(_keep, place, seen[name])
            handles.append(self._owner(place).register_forward_pre_hook(hook))
        try:
            # Compiled calls need not run hooks.
            eager = torch.compiler.set_stance("force_eager")
            with evaluating(self.source), torch.no_grad(), full_precision(), eager:
                for _, (args, kwargs) in self.recent or [(1, self.example)]:
                    self.source(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for name, unit in self.units.items():
            place, reader = unit.outgoing[0], self._owner(unit.outgoing[0])
            weight = self.tensor(place.name).detach().movedim(place.axis, 0)
            columns = weight[torch.from_numpy(place.positions).to(weight.device)]
            young = torch.from_numpy(self.ages[name] <= (-1 if everyone else self.maturity))
            found[name] = substitutes(
                torch.cat(seen[name], 2), columns.double().square().flatten(1).sum(1),
                self.eps, young.to(weight.device), constants=takes_constants(reader),
            )  # fmt: skip
        return found

    def break_all(self) -> tuple[Replacement, ...]:
        """The one-shot form of the paper: every redundant node starts anew, now.

        Raises:
            VerifyError: the outputs would change though they must not; nothing was replaced.
        """
        found = self.candidates(everyone=True)
        found = {name: own for name, own in found.items() if not self._frozen(self.units[name])}
        return self.replace((name, *pair) for name, own in found.items() for pair in own.items())

    def tolerance(self) -> float:
        """That of rounding at eps = 0; above, where a cover is only nearly one, no limit."""
        return float("inf") if self.eps or self.opfiber_eps else default_tolerance(self.source)

    def state_dict(self) -> dict[str, Any]:
        """What to keep in a checkpoint; with ``"energy"`` the recent examples are part of it."""
        return {**super().state_dict(), "recent": list(self.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self.recent = list(state["recent"])
        self.example = self.recent[-1][1] if self.recent else self.example

    def _reason(self, unit: Unit) -> str:
        readers = [self._owner(place) for place in unit.outgoing]
        if self.criterion == "energy" and (len(readers) > 1 or not plain(readers[0])):
            return "it is not read by one linear layer or convolution"
        return super()._reason(unit)

    def _hand_over(self, unit: Unit, node: int, lead: int | None, scale: float = 1.0) -> None:
        found = self._found.get(unit.layer, {}).get(node)
        if found is None or found.node != lead:
            super()._hand_over(unit, node, lead, scale)
            return
        super()._hand_over(unit, node, lead, found.scale)
        into_bias(unit.outgoing[0], self._owner(unit.outgoing[0]), node, found.constant)

    def _started(self, layer: str, nodes: list[int]) -> None:
        super()._started(layer, nodes)
        self._found.pop(layer, None)


def _keep(place: Place, own: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    own.append(activations(place, module, args[0]))


def _count(example: Any) -> int:
    tensors = [x for x in pytree.tree_leaves(example) if isinstance(x, Tensor) and x.ndim]
    return len(tensors[0]) if tensors else 1
