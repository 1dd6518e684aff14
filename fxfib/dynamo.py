"""fxfib in ``torch.compile``: merges the fibers of every captured graph, then calls a backend."""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.convert_frame import compile_lock

from fxfib.binding import Bound, Roles, bind, roles_of
from fxfib.errors import FxfibError, InputError
from fxfib.report import Report

log = logging.getLogger("fxfib")

WATCHES = ("version", "values")
# Weights that changed this often go on changing: from then on the original graph runs.
MOST_MERGES = 8


@dataclass(frozen=True)
class GraphRecord:
    """What became of one graph that was captured.

    Attributes:
        operations: how many the graph has.
        report: of the merge; None where there was none.
        note: why the graph was handed on as it is; "" where it was not.
    """

    operations: int
    report: Report | None
    note: str

    def __str__(self) -> str:
        if self.report is None or self.note:
            return f"graph of {self.operations} operations left as it is: {self.note}"
        before, after = self.report.parameters_before, self.report.parameters_after
        return f"graph of {self.operations} operations: {before:,} -> {after:,} parameters"


@dataclass(eq=False)
class Backend:
    """A backend for ``torch.compile``; see :func:`backend`.

    Attributes:
        graphs: one record for each graph so far, in the order in which they were compiled.
    """

    eps: float = 0.0
    inner: str | Callable[..., Any] = "inductor"
    inner_options: Mapping[str, Any] | None = None
    criterion: str = "fibration"
    round_to: int | None = None
    skip: tuple[str, ...] = ()
    verify: bool = True
    watch: str = "version"
    on_graph: Callable[[GraphRecord], None] | None = None
    graphs: list[GraphRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        from fxfib.api import check_options
        from fxfib.graph_pass import one_eps
        from fxfib.workshop import skip_patterns

        check_options(one_eps(self.eps), self.criterion, self.round_to)
        self.skip = skip_patterns(self.skip)
        if self.watch not in WATCHES:
            known = ", ".join(repr(name) for name in WATCHES)
            raise InputError(f"unknown watch {self.watch!r}; known: {known}.")
        if self.inner == "fxfib" or isinstance(self.inner, Backend):
            raise InputError("the inner backend is what runs the smaller graph; it is not fxfib.")
        self.__name__ = "fxfib"

    def __call__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Callable[..., Any]:
        """What ``torch.compile`` calls with every graph it captures."""
        if options:
            raise InputError("options go to fxfib.backend(...) itself; inner_options to inductor.")
        return compile_graph(self, graph_module, example_inputs, mode)

    def reset(self) -> None:
        """Forget the records, as ``torch._dynamo.reset`` forgets the graphs."""
        self.graphs.clear()

    def record(self, graph_module: fx.GraphModule, report: Report | None, note: str = "") -> None:
        """Put down what became of a graph, and say so in the log."""
        calls = sum(node.op.startswith("call_") for node in graph_module.graph.nodes)
        entry = GraphRecord(calls, report, note)
        self.graphs.append(entry)
        log.info("%s", entry)
        if self.on_graph is not None:
            self.on_graph(entry)

    def run_inner(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None
    ) -> Callable[..., Any]:
        """Hand a graph to the inner backend, inside its compilation."""
        if self.inner == "inductor":
            from torch._inductor import list_mode_options
            from torch._inductor.compile_fx import compile_fx

            patches = {**(list_mode_options(mode) if mode else {}), **(self.inner_options or {})}
            compiled = compile_fx(
                graph_module, list(example_inputs), config_patches=patches or None
            )
            assert callable(compiled)
            return compiled
        from torch._dynamo.backends.registry import lookup_backend

        extra: dict[str, Any] = {"mode": mode} if mode else {}
        if self.inner_options:
            extra["options"] = dict(self.inner_options)
        inner: Callable[..., Any] = lookup_backend(self.inner)
        return inner(graph_module, list(example_inputs), **extra)

    def compile_again(self, graph_module: fx.GraphModule, mode: str | None) -> Callable[..., Any]:
        """Hand a graph to the inner backend later, outside of the compilation it came from."""
        if self.inner == "eager":
            return graph_module
        extra: dict[str, Any] = {}
        if self.inner_options:
            # torch.compile takes one of them; a mode is a set of options.
            modes = torch._inductor.list_mode_options(mode) if mode else {}
            extra["options"] = {**modes, **self.inner_options}
        elif mode:
            extra["mode"] = mode
        return torch.compile(graph_module, backend=self.inner, **extra)


def backend(
    eps: float = 0.0,
    *,
    inner: str | Callable[..., Any] = "inductor",
    inner_options: Mapping[str, Any] | None = None,
    criterion: str = "fibration",
    round_to: int | None = None,
    skip: Iterable[str] = (),
    verify: bool = True,
    watch: str = "version",
    on_graph: Callable[[GraphRecord], None] | None = None,
) -> Backend:
    """A backend for ``torch.compile`` that merges fibers and hands the smaller graph on.

    ``torch.compile(model, backend=fxfib.backend(eps=0.0))`` is the same as
    ``torch.compile(model, backend="fxfib", options={"eps": 0.0})``, but it keeps a record of every
    graph in ``.graphs``.  Left as they are, and noted: graphs that need gradients, that train, that
    run under autocast, that change their inputs, or that :func:`fxfib.compile` would refuse.  Every
    call compares the weights with those that were merged; where they changed they are merged again.

    Args:
        eps, criterion, round_to, skip, verify: as for :func:`fxfib.compile`.
        inner: the backend that gets the smaller graph; a name or a callable.
        inner_options: its options (for inductor, of ``torch._inductor.config``).  ``{"freezing":
            True}`` lets inductor fold weights into each other and store them as kernels want them
            (under ``torch.no_grad()``): it may, as weights that change are merged again.
        watch: ``"version"`` notices whatever autograd or the address in memory shows: optimizer
            steps, ``load_state_dict``, ``copy_``, new parameters, another instance of the class.
            Writes past autograd (``w.data.mul_(2)``, through numpy or a storage) show in neither:
            ``"values"`` notices them too; it holds a copy of the weights and reads all of them in
            every call.
        on_graph: is called with every :class:`GraphRecord`.

    Raises:
        InputError: an option is out of range.
    """
    return Backend(
        eps=eps,
        inner=inner,
        inner_options=inner_options,
        criterion=criterion,
        round_to=round_to,
        skip=tuple([skip] if isinstance(skip, str) else skip),
        verify=verify,
        watch=watch,
        on_graph=on_graph,
    )


def registered(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fxfib", options={...})``: options are those of `backend`."""
    try:
        chosen = backend(**(options or {}))
    except TypeError as error:
        known = ", ".join(name for name in backend.__kwdefaults__ or ())
        raise InputError(f"options of the fxfib backend are eps, {known}: {error}.") from error
    return compile_graph(chosen, graph_module, example_inputs, mode)


def compile_graph(
    options: Backend, graph_module: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None
) -> Callable[..., Any]:
    """Merge one captured graph and compile it; as it is where that cannot be done."""
    note = _unfit(example_inputs)
    if note:
        options.record(graph_module, None, note)
        return options.run_inner(graph_module, example_inputs, mode)
    roles = roles_of(graph_module, example_inputs)
    if _unwatched(roles, example_inputs):
        note = "weights made in inference mode do not show when they change"
        options.record(graph_module, None, note)
        return options.run_inner(graph_module, example_inputs, mode)
    bound = bind(graph_module, example_inputs, roles)
    try:
        small, report = _merge(options, bound)
    except FxfibError as error:
        options.record(graph_module, None, str(error))
        return options.run_inner(graph_module, example_inputs, mode)
    if not report.merged_groups:
        options.record(graph_module, report, "no fibers")
        return options.run_inner(graph_module, example_inputs, mode)
    options.record(graph_module, report)
    weights = _Weights(bound, example_inputs, options.watch)
    run = options.run_inner(small, bound.inputs, mode)
    return MergedGraph(options, graph_module, bound, mode, weights, run)


def _unwatched(roles: Roles, arguments: Sequence[Any]) -> bool:
    """Whether a weight was made in inference mode: autograd does not count its changes."""
    return any(arguments[position].is_inference() for position in roles.weights)


def _merge(options: Backend, bound: Bound) -> tuple[fx.GraphModule, Report]:
    from fxfib.graph_pass import merge_graph

    return merge_graph(
        bound.graph_module,
        bound.inputs,
        options.eps,
        options.criterion,
        options.round_to,
        options.skip,
        options.verify,
    )


def _unfit(example_inputs: Sequence[Any]) -> str:
    """Why a graph is none that could be merged; "" where it may be one."""
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return (
            "it needs gradients; call the model under torch.no_grad() or torch.inference_mode() "
            "to have its fibers merged"
        )
    kinds = {tensor.device.type for tensor in tensors}
    if any(torch.is_autocast_enabled(kind) for kind in kinds if kind != "meta"):
        return "it runs under autocast; convert the model to the smaller dtype instead"
    return ""


# Called for every weight in every call of the graph, hence without a frame of Python's between.
_version: Callable[[Tensor], int] = vars(torch._C.TensorBase)["_version"].__get__
_address: Callable[[Tensor], int] = Tensor.data_ptr


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """What picks these of the arguments, without a frame of Python's."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda arguments: [arguments[position] for position in positions]


class _State:
    """Which tensors these are, and as of when.

    A network has hundreds of them and little of it is in the processor's cache when a call begins:
    each kind of mark is compared in one pass over the tensors, cheapest first.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.identities = list(map(id, tensors))
        self.versions = list(map(_version, tensors))
        self.addresses = list(map(_address, tensors))

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are the same and have not been written to."""
        return (
            list(map(id, tensors)) == self.identities
            and list(map(_version, tensors)) == self.versions
            and list(map(_address, tensors)) == self.addresses
        )


class _Weights:
    """What a merged graph was made from, to be recognised at every call."""

    def __init__(self, bound: Bound, arguments: Sequence[Any], watch: str) -> None:
        self.pick = _picker(bound.roles.weights)
        self.numbers = bound.numbers
        tensors = self.pick(arguments)
        # No strong references: a compiled graph must not keep a model alive.  An identity says
        # nothing once its tensor is gone, as another may get the same.
        self.alive = True
        self.references = [weakref.ref(tensor, self.gone) for tensor in tensors]
        # Nor does an address once its memory was given back: `t.data = ...` twice may end there.
        self.references += [weakref.ref(t.untyped_storage(), self.gone) for t in tensors]
        self.state = _State(tensors)
        # Tensors that the graph held before anything was bound are watched as they are.
        given = set(self.state.addresses)
        module = bound.graph_module
        held = (*module.parameters(), *module.buffers())
        self.own = [tensor for tensor in held if tensor.data_ptr() not in given]
        self.own_state = _State(self.own)
        self.copies: list[Tensor] | None = None
        if watch == "values":
            self.copies = [tensor.detach().clone() for tensor in tensors]

    def gone(self, _: object) -> None:
        """One of the tensors does not exist any more."""
        self.alive = False

    def same_tensors(self, arguments: Sequence[Any]) -> bool:
        """Whether these are the tensors, changed or not."""
        return self.alive and list(map(id, self.pick(arguments))) == self.state.identities

    def unchanged(self, arguments: Sequence[Any]) -> bool:
        """Whether these are the tensors as they were."""
        tensors = self.pick(arguments)
        return (
            self.alive
            and self.state.unchanged(tensors)
            and (not self.numbers or self.same_numbers(arguments))
            and (not self.own or self.own_state.unchanged(self.own))
            and (self.copies is None or all(map(torch.equal, tensors, self.copies)))
        )

    def same_numbers(self, arguments: Sequence[Any]) -> bool:
        """Whether what was a number in the graph is that number still."""
        return all(float(arguments[position]) == number for position, number in self.numbers)


@dataclass(frozen=True)
class _Merge:
    """What runs for one set of weights; `whole`: with all arguments, weights included."""

    weights: _Weights
    run: Callable[..., Any]
    whole: bool


class MergedGraph:
    """What Dynamo calls in place of a graph: the smaller one, while the weights are the same.

    Dynamo shares one graph between all instances of a class: each has its own merge here.
    """

    def __init__(
        self,
        options: Backend,
        graph_module: fx.GraphModule,
        bound: Bound,
        mode: str | None,
        weights: _Weights,
        run: Callable[..., Any],
    ) -> None:
        self.options = options
        self.graph_module = graph_module
        self.kept = bound.kept
        self.roles = bound.roles
        self.mode = mode
        self.latest = _Merge(weights, run, False)
        self.merges = [self.latest]
        self.changes = 0
        self.lock = threading.Lock()
        self.original: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Run on the arguments of the original graph."""
        merge = self.latest
        if not merge.weights.unchanged(arguments):
            if _unwatched(self.roles, arguments):
                return self.run_original()(*arguments)
            # Merging exports, and torch traces one thread at a time: Dynamo's lock is for that.
            with compile_lock, self.lock:
                merge = self.latest = self.find(arguments) or self.merge_again(arguments)
        if merge.whole:
            return merge.run(*arguments)
        return merge.run(*[arguments[position] for position in self.kept])

    def find(self, arguments: Sequence[Any]) -> _Merge | None:
        """The merge of these weights, as they are now."""
        return next((merge for merge in self.merges if merge.weights.unchanged(arguments)), None)

    def merge_again(self, arguments: Sequence[Any]) -> _Merge:
        """Other weights than before: merge them, or give up and run the original."""
        changed = [merge for merge in self.merges if merge.weights.same_tensors(arguments)]
        self.merges = [m for m in self.merges if m.weights.alive and m not in changed]
        self.changes += bool(changed)
        if self.changes == MOST_MERGES:
            log.warning(
                "weights changed %d times after compilation; the graph runs as it is from now on "
                "(compile the model when it is trained)",
                MOST_MERGES,
            )
        bound = bind(self.graph_module, arguments, self.roles)
        weights = _Weights(bound, arguments, self.options.watch)
        merge = None
        if self.changes < MOST_MERGES:
            merge = self.try_again(weights, bound)
        if merge is None:
            merge = _Merge(weights, self.run_original(), True)
        self.merges.append(merge)
        return merge

    def run_original(self) -> Callable[..., Any]:
        """The graph as it was captured, compiled once."""
        if self.original is None:
            self.original = self.options.compile_again(self.graph_module, self.mode)
        return self.original

    def try_again(self, weights: _Weights, bound: Bound) -> _Merge | None:
        """The merge of other weights; None where it is refused."""
        try:
            small, report = _merge(self.options, bound)
        except FxfibError as error:
            self.options.record(self.graph_module, None, str(error))
            return None
        self.options.record(self.graph_module, report)
        return _Merge(weights, self.options.compile_again(small, self.mode), False)
