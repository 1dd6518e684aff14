"""Rules that are wrong on purpose: each must be caught by an oracle on the examples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxfib import signature
from fxfib.coloring import FIRST_FREE, Factor
from fxfib.passes import forward, heads, layout, liveness, plan, rewrite, summed
from fxfib.passes.relations import Refine
from fxfib.passes.rules import (
    activation,
    all_rules,
    attention,
    base,
    batch_norm,
    concatenation,
    convolution,
    elementwise,
    linear,
    movement,
    norm,
    parametric,
    pooling,
    recurrence,
    recurrent,
    recurrent_cell,
    reduction,
    slicing,
)
from fxfib.passes.rules.examples import CHANNELS, SHAPES, Example, Sandwich
from fxfib.signature import Form

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Wrong:
    """What is wrong, how, and where it must show.

    Attributes:
        rule: class name of a rule whose examples are used, or "" with an example of its own.
        cases: names of the cases of these examples that the wrong rule must fail on.
    """

    patch: Patch
    rule: str
    cases: tuple[str, ...]


WRONG: dict[str, Wrong] = {}


def wrong(rule: str, *cases: str) -> Callable[[Patch], Patch]:
    """Decorator: name the examples on which a wrong rule must be caught."""

    def add(patch: Patch) -> Patch:
        WRONG[patch.__name__] = Wrong(patch, rule, cases)
        return patch

    return add


class Unshifted(Form):
    """A form that forgets what is added to it."""

    def shifted(self, *_: Any, **__: Any) -> Form:
        return self


@wrong("Linear", "bias")
def bias_ignored_in_linear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(linear, "Form", Unshifted)


@wrong("Convolution", "bias")
def bias_ignored_in_convolution(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(convolution, "Form", Unshifted)


@wrong("Convolution", "weight")
def only_the_first_tap(patch: pytest.MonkeyPatch) -> None:
    right = convolution.collapse_columns

    def collapse(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        first = weight.clone()
        first.flatten(2)[..., 1:] = 0.0
        return right(first, *args, **kwargs)

    patch.setattr(convolution, "collapse_columns", collapse)


def _ignore_statistic(name: str) -> Patch:
    def forget(patch: pytest.MonkeyPatch) -> None:
        right = norm.parameter_values

        def numbers(analysis: Any, node: Any, size: int, default: float) -> Any:
            if node is not None and str(node.target).endswith(f".{name}"):
                return np.full(size, default)
            return right(analysis, node, size, default)

        patch.setattr(batch_norm, "parameter_values", numbers)

    forget.__name__ = f"{name}_ignored_in_batch_norm"
    return forget


for _name in ("weight", "bias", "running_mean", "running_var"):
    wrong("BatchNorm", f"near_{_name}")(_ignore_statistic(_name))


@wrong("LayerNorm", "near_weight", "near_bias")
def affine_ignored_in_layer_norm(patch: pytest.MonkeyPatch) -> None:
    right = norm.color_form

    def color(form: Form, *args: Any) -> Factor:
        return right(replace(form, rows=torch.ones_like(form.rows)), *args)

    patch.setattr(norm, "color_form", color)


@wrong("LayerNorm", "equal", "after_tanh", "not_affine")
def layer_norm_uncounted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout.Layout, "even", property(lambda self: True))


@wrong("RMSNorm", "equal", "not_affine", "written_out", "divided")
def rms_norm_uncounted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout.Layout, "even", property(lambda self: True))


@wrong("RMSNorm", "equal", "written_out")
def gain_of_a_norm_kept(patch: pytest.MonkeyPatch) -> None:
    """The inputs are scaled by what they count for, and the result is not scaled back."""
    patch.setattr(norm, "Times", lambda reducer, factors: reducer)
    patch.setattr(norm.np, "broadcast_to", lambda array, shape: np.ones(shape))


@wrong("LayerNorm", "equal", "two_axes")
def mean_of_a_norm_uncounted(patch: pytest.MonkeyPatch) -> None:
    def plain(rewriter: Any, node: Any, value: Any, axis: int, axes: Any) -> Any:
        return rewriter.call(torch.ops.aten.mean.dim, (value, list(axes), True))

    patch.setattr(norm, "weighted_mean", plain)


@wrong("Embedding", "tied_equal")
def tied_head_uncounted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        rewrite.Rewriter,
        "counts",
        lambda self, node, axis, rank, total=False: self.new_constant(
            node, np.ones((1,) * rank), "count", dtype=node.meta["val"].dtype
        ),
    )


@wrong("GroupNorm", "one", "two")
def group_norm_uncounted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout.Layout, "even", property(lambda self: True))


@wrong("Mean", "mean_on", "mean_all_on")
def mean_uncounted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reduction.Mean, "rewrite", lambda self, rewriter, node: rewriter.repeat(node))


@wrong("Mean", "sum_on", "sum_kept_on")
def sum_uncounted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reduction.Sum, "rewrite", lambda self, rewriter, node: rewriter.repeat(node))


@wrong("Linear", "plain", "affine")
def columns_averaged(patch: pytest.MonkeyPatch) -> None:
    right = layout.Total.apply

    def average(self: layout.Total, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        shape = [1] * tensor.ndim
        shape[axis] = -1
        return right(self, tensor, axis) / torch.from_numpy(self.layout.counts).reshape(shape)

    patch.setattr(layout.Total, "apply", average)


@wrong("Linear", "plain", "affine")
def rows_summed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout.MergeLayout, "rows", lambda self, *_: layout.Total(self, None))


@wrong("Linear", "plain")
def columns_of_a_color_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layout.MergeLayout, "columns", lambda self, scales: self.first)


@wrong("Rearrange", "flatten", "reshape", "view")
def flatten_mixes_up_positions(patch: pytest.MonkeyPatch) -> None:
    right = movement.moved_factor

    def moved(factor: Factor, out: tuple[int, ...], index: Any, beside: Any = ()) -> Factor:
        if len(factor.axes) > len(out):
            index = np.sort(index.reshape(factor.labels.shape[::-1]).T.reshape(-1))[
                np.arange(index.size).reshape(factor.labels.shape[0], -1).T.reshape(-1)
            ]
        return right(factor, out, index, beside)

    patch.setattr(movement, "moved_factor", moved)


@wrong("Concatenate", "channels")
def cat_without_offsets(patch: pytest.MonkeyPatch) -> None:
    right = concatenation.Concatenate.joined

    def joined(self: Any, analysis: Any, node: fx.Node, operands: Any, axis: int) -> Any:
        factor = right(self, analysis, node, operands, axis)
        labels = [analysis.factor(operand, axis).labels for operand in operands]
        return replace(factor, labels=np.concatenate(labels))

    patch.setattr(concatenation.Concatenate, "joined", joined)


@wrong("Concatenate", "cut_tanh", "cut_shifted")
def labels_of_two_results_mixed_up(patch: pytest.MonkeyPatch) -> None:
    from fxfib import coloring

    patch.setattr(coloring, "renumbered", lambda space: space)
    right = elementwise.Elementwise.along

    def along(self: Any, analysis: Any, node: fx.Node, operands: Any, axis: int) -> Any:
        found = right(self, analysis, node, operands, axis)
        return found and replace(found, space=str(node.target))

    patch.setattr(elementwise.Elementwise, "along", along)

    def opened(factor: Factor, **options: Any) -> Factor:
        from fxfib.coloring import unique_rows

        labels = unique_rows(factor.labels, factor.scales) + 2
        return Factor(factor.axes, labels, np.ones(labels.shape), "opened")

    patch.setattr(elementwise, "opened", opened)


@wrong("Add", "colorsbias", "form_and_color")
def first_operand_decides(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        elementwise, "joint_colors", lambda seen, unscaled=(): (seen[0].labels, seen[0].scales)
    )
    patch.setattr(Form, "plus", lambda self, other: self)


@wrong("Add", "bias_of_second", "weight_of_second")
def first_form_decides(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Form, "plus", lambda self, other: self)


@wrong("Convolution", "depthwiseFalse")
def groups_ignored(patch: pytest.MonkeyPatch) -> None:
    right = convolution.Convolution.form

    def form(self: Any, analysis: Any, node: fx.Node, tensor: torch.Tensor, *rest: Any) -> Form:
        found = right(self, analysis, node, tensor, *rest)
        return replace(found, must_match=None)

    patch.setattr(convolution.Convolution, "form", form)


@wrong("", "unknown")
def unknown_is_elementwise(patch: pytest.MonkeyPatch) -> None:
    right = base.find_rule
    guess = all_rules()[torch.ops.aten.tanh.default]

    def find(node: fx.Node) -> Any:
        found = right(node)
        return guess if found is None and node.op == "call_function" else found

    for module in (forward, liveness, rewrite):
        patch.setattr(module, "find_rule", find)


@wrong("Convolution", "padded", "same")
def constants_folded_despite_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(convolution.Convolution, "borders", staticmethod(lambda analysis, node: False))


@wrong("MaxPool", "average_padded")
def padding_does_not_count_in_pools(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pooling.AveragePool, "keeps_constants", lambda self, analysis, node: True)


@wrong("Unary", "sigmoid_default", "tanh_default", "gelu_default")
def scale_passes_a_sigmoid(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(activation.Unary, "homogeneity", "joint")


@wrong("Unary", "sigmoid_default", "cos_default")
def constants_stay_what_they_were(patch: pytest.MonkeyPatch) -> None:
    def evaluate(self: Any, node: fx.Node, operands: Any, numbers: Any) -> Any:
        return np.asarray(numbers[0])

    patch.setattr(elementwise.Elementwise, "evaluate", evaluate)


@wrong("PReLU", "slopesTrue")
def first_slope_for_all(patch: pytest.MonkeyPatch) -> None:
    right = parametric.unique_rows
    patch.setattr(parametric, "unique_rows", lambda labels, *rest: right(labels))


@wrong("Rearrange", "slice", "slice_end", "narrow")
def slice_keeps_its_literals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slicing.Slice, "sizes", lambda self, rewriter, node: {})


@wrong("Rearrange", "roll_cut")
def classes_reach_across_a_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slicing, "Refine", lambda ref, labels: Refine(ref, np.zeros(len(labels), int)))


@wrong("Linear", "weight")
def tolerance_too_large(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(signature, "ROUNDING_MULTIPLE", 1e15)


@wrong("Linear", "plain")
def live_mask_inverted(patch: pytest.MonkeyPatch) -> None:
    right = linear.LinearMap.reads

    def reads(self: Any, analysis: Any, node: fx.Node, live: Any) -> Iterator[Any]:
        for ref, mask in right(self, analysis, node, live):
            yield ref, ~mask

    patch.setattr(linear.LinearMap, "reads", reads)


RECURRENT = ("LSTM", "GRU", "tanh", "relu")
CELLS = ("LSTMCell", "GRUCell", "tanh", "relu")


def _last_gate_ignored(patch: pytest.MonkeyPatch) -> None:
    right = recurrence._beside
    patch.setattr(
        recurrence,
        "_beside",
        lambda kind, gates, sides, offsets, bounds, size: right(
            kind, gates[:1], sides, offsets[:1], bounds[:1], size
        ),
    )


@wrong("LongShortTermMemory", "LSTM_bias", "GRU_recurrence")
def last_gate_ignored(patch: pytest.MonkeyPatch) -> None:
    _last_gate_ignored(patch)


@wrong("LongShortTermMemoryCell", "LSTMCell_bias", "GRUCell_recurrence")
def last_gate_of_a_cell_ignored(patch: pytest.MonkeyPatch) -> None:
    _last_gate_ignored(patch)


@wrong("LongShortTermMemory", *(f"{mode}_bias" for mode in RECURRENT))
def biases_of_gates_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recurrence, "_offset", lambda terms, bias, bound, roundoff: (terms[0], bound))


def _recurrence_ignored(patch: pytest.MonkeyPatch) -> None:
    right = recurrence.gate_forms

    def gate_forms(kind: Any, weights: Any, inputs: Any, state: Any, roundoff: float) -> Any:
        nothing = (torch.zeros_like(state[0]), *state[1:])
        return right(kind, weights, inputs, nothing, roundoff)

    for module in (recurrence, recurrent_cell):
        patch.setattr(module, "gate_forms", gate_forms)


@wrong("LongShortTermMemory", *(f"{mode}_recurrence" for mode in RECURRENT))
def recurrence_ignored(patch: pytest.MonkeyPatch) -> None:
    _recurrence_ignored(patch)


@wrong("LongShortTermMemoryCell", *(f"{mode}_recurrence" for mode in CELLS))
def recurrence_of_a_cell_ignored(patch: pytest.MonkeyPatch) -> None:
    _recurrence_ignored(patch)


@wrong("GatedRecurrentUnit", "GRU_split")
def biases_of_a_product_added(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recurrent.GatedRecurrentUnit, "kind", replace(recurrence.GRU, apart=False))


@wrong("GatedRecurrentUnitCell", "GRUCell_split")
def biases_of_a_product_in_a_cell_added(patch: pytest.MonkeyPatch) -> None:
    kind = replace(recurrence.GRU, apart=False)
    patch.setattr(recurrent_cell.GatedRecurrentUnitCell, "kind", kind)


def _all_start_alike(patch: pytest.MonkeyPatch) -> None:
    for module in (recurrent, recurrent_cell):
        patch.setattr(module, "met", lambda found: np.full(len(found[0].labels), FIRST_FREE))


@wrong("LongShortTermMemory", *(f"{mode}_start" for mode in RECURRENT))
def first_state_ignored(patch: pytest.MonkeyPatch) -> None:
    _all_start_alike(patch)


@wrong("LongShortTermMemoryCell", *(f"{mode}_start" for mode in CELLS))
def first_state_of_a_cell_ignored(patch: pytest.MonkeyPatch) -> None:
    _all_start_alike(patch)


@wrong("LongShortTermMemory", *RECURRENT)
def columns_of_a_state_averaged(patch: pytest.MonkeyPatch) -> None:
    columns_averaged(patch)


def _columns_of_the_recurrence_ignored(patch: pytest.MonkeyPatch) -> None:
    right = recurrent.smaller

    def smaller(rewriter: Any, layer: Any, *rest: Any) -> Any:
        reduced = right(rewriter, layer, *rest)
        rows = rewriter.layout(layer.ih, 0)
        axes = {0: rows.rows(np.ones(rows.full)), 1: rewriter.layout(layer.hh, 1).first}
        return reduced | {layer.hh: rewriter.constant(layer.hh, axes)}

    for module in (recurrent, recurrent_cell):
        patch.setattr(module, "smaller", smaller)


@wrong("LongShortTermMemory", *RECURRENT)
def columns_of_the_recurrence_ignored(patch: pytest.MonkeyPatch) -> None:
    _columns_of_the_recurrence_ignored(patch)


@wrong("LongShortTermMemoryCell", *CELLS)
def columns_of_the_recurrence_of_a_cell_ignored(patch: pytest.MonkeyPatch) -> None:
    _columns_of_the_recurrence_ignored(patch)


class Reversed:
    """A role in attention whose heads stand in another order than they do."""

    def __init__(self, role: Any) -> None:
        self.role = role

    def refs(self) -> list[Any]:
        return list(self.role.refs())[::-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.role, name)


@wrong("Attention", "fused")
def order_of_query_heads_mixed_up(patch: pytest.MonkeyPatch) -> None:
    right = attention._contract
    patch.setattr(attention, "_contract", lambda analysis, role: right(analysis, Reversed(role)))


@wrong("Attention", "fused")
def order_of_value_heads_mixed_up(patch: pytest.MonkeyPatch) -> None:
    right = heads.roles_of

    def roles_of(analysis: Any, node: fx.Node) -> Any:
        roles, reasons = right(analysis, node)
        turned = [
            replace(role, blocks=role.blocks[::-1]) if hasattr(role, "blocks") else role
            for role in roles
        ]
        return turned, reasons

    patch.setattr(heads, "roles_of", roles_of)


@wrong("Attention", "fused")
def scale_of_the_smaller_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention.Attention, "rewrite", base.Rule.rewrite)


@wrong("Attention", "fused")
def keys_of_equal_queries_averaged(patch: pytest.MonkeyPatch) -> None:
    right = attention._contract

    def contract(analysis: Any, contraction: Any) -> None:
        right(analysis, contraction)
        for rows in analysis.heads.summed.values():
            rows.chosen[:] = False

    patch.setattr(attention, "_contract", contract)


@wrong("Attention", "fused_near")
def bias_of_a_query_ignored(patch: pytest.MonkeyPatch) -> None:
    def color_root(analysis: Any, node: fx.Node) -> None:
        form = analysis.value(node).form
        attention.color_root(analysis, node)
        zero = np.zeros(len(form.offset))
        bare = replace(form, offset=zero, offset_bound=zero)
        colors = signature.color_form(bare, len(zero), 0.0, "fibration", analysis.roundoff)
        analysis.heads.colors[node] = colors

    patch.setattr(forward, "color_root", color_root)


@wrong("Attention", "fused")
def heads_mixed_up(patch: pytest.MonkeyPatch) -> None:
    """What merges in one head is merged in the next one."""
    right = attention._contract

    def contract(analysis: Any, contraction: Any) -> None:
        pairs = (*contraction.pairs[1:], contraction.pairs[0])
        right(analysis, replace(contraction, pairs=pairs))

    patch.setattr(attention, "_contract", contract)


@wrong("Attention", "rotary_half")
def rotary_pairs_split(patch: pytest.MonkeyPatch) -> None:
    """A channel is turned with itself, so it merges without its partner."""
    right = concatenation.Concatenate.joined

    def joined(self: Any, analysis: Any, node: fx.Node, operands: list[fx.Node], axis: int) -> Any:
        return right(self, analysis, node, operands[::-1], axis)

    patch.setattr(concatenation.Concatenate, "joined", joined)
    sources = summed._sources

    def turned(analysis: Any, node: fx.Node) -> list[fx.Node]:
        found = sources(analysis, node)
        return found[::-1] if isinstance(base.find_rule(node), concatenation.Concatenate) else found

    patch.setattr(summed, "_sources", turned)


@wrong("Attention", "rotary_other_speed")
def speeds_of_pairs_ignored(patch: pytest.MonkeyPatch) -> None:
    def plain(tensor: torch.Tensor, axis: int | None, size: int) -> Any:
        return elementwise._plain(np.full(size, FIRST_FREE, dtype=np.int64))

    def blank(tensor: torch.Tensor, axis: int, name: str) -> Factor:
        size = tensor.shape[axis]
        return Factor((axis,), np.full(size, FIRST_FREE), np.ones(size), ("blank", name))

    patch.setattr(elementwise, "_of_constant", plain)
    patch.setattr(summed, "constant_factor", blank)


@wrong("MatrixProduct", "batch_norm")
def gains_behind_a_sum_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(summed._Follower, "pass_gain", lambda *_: None)


@wrong("Einsum", "einsum")
def summed_keys_averaged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(heads.Heads, "sum_rows", lambda *_: None)


@wrong("", "shared")
def shared_weight_decided_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plan, "guard_shared_parameters", lambda analysis, tables: None)


class Shared(nn.Module):
    """One layer on two values; a node is constant, or scaled, in one of them alone."""

    def __init__(self) -> None:
        super().__init__()
        sandwich = Sandwich(torch.add, "linear", 5, fronts=2)
        self.stem, self.front = sandwich.stem, sandwich.front
        self.shared = nn.Linear(CHANNELS, 6, dtype=torch.float64)
        for front, scale in zip(self.front, (3.0, 5.0), strict=True):
            front.weight.data[5] = scale * front.weight.data[3]
            front.bias.data[5] = scale * front.bias.data[3]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = torch.relu(self.stem(x))
        return tuple(self.shared(torch.relu(front(hidden))) for front in self.front)


def own_examples() -> dict[str, Example]:
    """Examples of what is no rule's own."""
    x = torch.randn(
        SHAPES["linear"], generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    unknown = Sandwich(lambda v: torch.cumprod(v, -1), "linear", 4, unread=())
    whole = tuple(range(CHANNELS))
    return {
        "unknown": Example("unknown", unknown.eval(), (x,), {("front.0.weight", 0): whole}),
        "shared": Example("shared", Shared().eval(), (x,), {}),
    }
