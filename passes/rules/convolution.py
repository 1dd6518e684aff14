"""Convolutions: channels are the nodes, kernel positions are kept apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxfib.coloring import ONE, ZERO, Factor, Value, unique_rows
from fxfib.passes.regression import Regression, Window, convolution_regression
from fxfib.passes.relations import Full, Keep, Move, Ref, Refine, Same
from fxfib.passes.rules.base import Barrier, Mask, Rule, columns_read, overloads, register
from fxfib.signature import ROUNDING_MULTIPLE, Form, collapse_columns

if TYPE_CHECKING:
    from fxfib.passes.backward import Adjoint, Error
    from fxfib.passes.forward import Analysis
    from fxfib.passes.rewrite import Rewriter


def _each(given: Any, count: int) -> list[int]:
    """One number for all dimensions, or one for each."""
    numbers = list(given) if isinstance(given, (list, tuple)) else [given]
    return numbers * count if len(numbers) == 1 else numbers


def grid_of(axis: Ref, groups: Ref, inside: Ref, sizes: tuple[int, int]) -> Move:
    """A channel axis as the grid (group, channel in group): its layout must be a product."""
    index = np.arange(sizes[0] * sizes[1])
    return Move((axis,), ((groups, inside),), index)


def depthwise_form(
    tensor: torch.Tensor,
    factor: Factor | None,
    axis: int,
    offset_constants: bool,
    roundoff: float,
    space: Any,
) -> Form:
    """Rows of a depthwise convolution: each node reads one channel, whose color must match."""
    groups, outs = tensor.shape[:2]
    rows = tensor.reshape(groups * outs, -1)
    zero = np.zeros(groups * outs)
    if factor is None:
        return Form(axis, rows, zero, None, zero, np.repeat(np.arange(groups), outs), space)
    labels = np.repeat(factor.labels, outs)
    scales = np.repeat(factor.scales, outs)
    offset, offset_bound, bound = zero, zero, None
    dead = labels == ZERO
    if offset_constants:
        known = labels == ONE
        taps = rows.to(torch.float64)
        offset = np.where(known, taps.sum(1).numpy() * scales, 0.0)
        offset_bound = np.where(
            known, ROUNDING_MULTIPLE * roundoff * taps.abs().sum(1).numpy() * np.abs(scales), 0.0
        )
        dead = dead | known
    scales = np.where(dead, 0.0, scales)
    if np.any(scales != 1.0):
        rows = rows.to(torch.float64) * torch.from_numpy(scales).unsqueeze(1)
        rounded = np.where((scales != 1.0) & ~dead, ROUNDING_MULTIPLE * roundoff, 0.0)
        bound = rows.abs() * torch.from_numpy(rounded).unsqueeze(1)
    match = np.where(dead, ZERO, labels)
    return Form(axis, rows, offset, bound, offset_bound, match, space)


aten = torch.ops.aten


@register
class Convolution(Rule):
    """``conv1d/2d/3d`` and their transposed forms, with groups, depthwise included."""

    targets = overloads(
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        "convolution",
    )

    @staticmethod
    def transposed(analysis: Analysis, node: fx.Node) -> bool:
        return "transpose" in str(node.target) or bool(
            analysis.arguments(node).get("transposed", False)
        )

    @staticmethod
    def borders(analysis: Analysis, node: fx.Node) -> bool:
        """Whether some output position sees fewer kernel positions than another."""
        padding = analysis.arguments(node)["padding"]
        if isinstance(padding, str):
            return padding != "valid"
        pads = padding if isinstance(padding, (list, tuple)) else [padding]
        return any(p != 0 for p in pads)

    def weight_of(self, analysis: Analysis, node: fx.Node) -> tuple[torch.Tensor, int]:
        """The weight as ``[groups, out / groups, in / groups, *kernel]`` and the groups."""
        bound = analysis.arguments(node)
        weight, groups = analysis.constant(bound["weight"]), bound["groups"]
        if self.transposed(analysis, node):
            split = weight.reshape(groups, -1, *weight.shape[1:])
            return split.transpose(1, 2), groups
        return weight.reshape(groups, -1, *weight.shape[1:]), groups

    def forward(self, analysis: Analysis, node: fx.Node) -> Value:
        bound = analysis.arguments(node)
        source, weight, bias = bound["input"], bound["weight"], bound["bias"]
        if analysis.is_constant(source) or not analysis.is_constant(weight):
            raise Barrier("its weight is computed from the input", "nothing: it is not a parameter")
        if bias is not None and not analysis.is_constant(bias):
            raise Barrier("its bias is computed from the input", "nothing: it is not a parameter")
        tensor, _groups = self.weight_of(analysis, node)
        transposed = self.transposed(analysis, node)
        axis = len(analysis.shape(source)) - (tensor.ndim - 2)
        spatial = [a for a in range(len(analysis.shape(source))) if a != axis]
        analysis.full(source, spatial, "a convolution mixes this axis")
        factor = analysis.factor(source, axis)
        offset_constants = not transposed and not self.borders(analysis, node)
        form = self.form(analysis, node, tensor, factor, axis, offset_constants)
        if bias is not None:
            form = form.shifted(
                analysis.constant(bias).to(torch.float64).numpy(), analysis.roundoff
            )
            analysis.relate(Same((node, axis), (bias, 0)))
        known = None if factor is None else factor.labels == ONE
        if known is not None and known.any() and not offset_constants:
            # Seen through a border a constant is no bias; one with a column of zeros is not seen.
            read = (tensor != 0).flatten(3).any(3).any(1).reshape(-1).numpy()
            analysis.relate(Keep((source, axis), known & read))
        self.relate(analysis, node, source, weight, axis, tensor, transposed)
        return Value(analysis.shape(node), (), form)

    def backward(
        self, adjoint: Adjoint, node: fx.Node, error: Error
    ) -> Iterable[tuple[fx.Node, fx.Node]]:
        """The transposed convolution with the same weight, and back."""
        bound = adjoint.analysis.arguments(node)
        source, weight = bound["input"], bound["weight"]
        if adjoint.analysis.is_constant(source) or not adjoint.analysis.is_constant(weight):
            raise Barrier("its weight is computed from the input", "nothing: it is not a parameter")
        kernel = adjoint.analysis.shape(weight)[2:]
        count = len(kernel)
        stride, dilation = (_each(bound[name], count) for name in ("stride", "dilation"))
        sizes = adjoint.analysis.shape(source)[-count:]
        extra = [0] * count
        if isinstance(bound["padding"], str):
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            total = total if bound["padding"] == "same" else [0] * count
            padding = [t // 2 for t in total]
            extra = [t - 2 * p for t, p in zip(total, padding, strict=True)]
        else:
            padding = _each(bound["padding"], count)
        names = [f"conv{count}d", f"conv_transpose{count}d"]
        if self.transposed(adjoint.analysis, node):
            target = getattr(aten, names[0]).default
            found = adjoint.call(
                target, error, weight, None, stride, padding, dilation, bound["groups"]
            )
        else:
            outs = adjoint.analysis.shape(node)[-count:]
            given = zip(sizes, outs, stride, padding, dilation, kernel, extra, strict=True)
            missing = [n + e - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
                       for n, o, s, p, d, k, e in given]  # fmt: skip
            target = getattr(getattr(aten, names[1]), "default" if count == 1 else "input")
            found = adjoint.call(
                target, error, weight, None, stride, padding, missing, bound["groups"], dilation
            )
        for place, size in enumerate(sizes):
            axis = len(found.meta["val"].shape) - count + place
            if found.meta["val"].shape[axis] != size:
                found = adjoint.call(aten.slice.Tensor, found, axis, 0, size)
        yield source, found

    def relate(
        self,
        analysis: Analysis,
        node: fx.Node,
        source: fx.Node,
        weight: fx.Node,
        axis: int,
        tensor: torch.Tensor,
        transposed: bool,
    ) -> None:
        groups, outs, ins = tensor.shape[:3]
        out_axis, in_axis = (1, 0) if transposed else (0, 1)
        if groups == 1:
            analysis.relate(
                Same((node, axis), (weight, out_axis)), Same((source, axis), (weight, in_axis))
            )
            return
        group = analysis.inner(node, "groups", groups)
        out = analysis.inner(node, "out", outs)
        inside = analysis.inner(node, "in", ins)
        analysis.relate(
            grid_of((node, axis), group, out, (groups, outs)),
            grid_of((source, axis), group, inside, (groups, ins)),
        )
        factor = analysis.factor(source, axis)
        if factor is not None:
            # A grouped weight has one column for many inputs: no factors or constants to fold in.
            analysis.relate(
                Refine((source, axis), factor.keyed()),
                Keep((source, axis), factor.labels == ONE),
            )
        if transposed and ins > 1:
            analysis.relate(Full(group, "the groups of a transposed convolution are kept"))
        if transposed:
            analysis.relate(Same((source, axis), (weight, 0)), Same(out, (weight, 1)))
        else:
            analysis.relate(Same((node, axis), (weight, 0)), Same(inside, (weight, 1)))

    def form(
        self,
        analysis: Analysis,
        node: fx.Node,
        tensor: torch.Tensor,
        factor: Factor | None,
        axis: int,
        offset_constants: bool,
    ) -> Form:
        """Rows of the collapsed weight; groups are a block-diagonal weight."""
        groups, outs, ins = tensor.shape[:3]
        space = ("convolution", node.name)
        if groups == 1:
            rows, bound, offset, offset_bound, _ = collapse_columns(
                tensor[0], factor, offset_constants=offset_constants, roundoff=analysis.roundoff
            )
            return Form(axis, rows, offset, bound, offset_bound, None, space)
        if ins == 1:
            return depthwise_form(tensor, factor, axis, offset_constants, analysis.roundoff, space)
        pieces = []
        for group in range(groups):
            part = None
            if factor is not None:
                chosen = slice(group * ins, (group + 1) * ins)
                part = Factor((0,), factor.labels[chosen], factor.scales[chosen], None)
            piece = collapse_columns(
                tensor[group], part, offset_constants=offset_constants, roundoff=analysis.roundoff
            )
            colors = piece[4]
            if colors is None:
                own = (
                    factor.labels[chosen]
                    if factor is not None
                    else np.arange(group * ins, (group + 1) * ins)
                )
                colors = own
            pieces.append((*piece[:4], colors))
        return self.assemble(axis, pieces, outs, space)

    @staticmethod
    def assemble(axis: int, pieces: list[Any], outs: int, space: Any) -> Form:
        """One table for all groups: nodes of two groups compare if these read the same colors."""
        widest = max(len(p[4]) for p in pieces)
        taps = max((p[0].shape[1] // max(len(p[4]), 1) for p in pieces), default=1)
        any_bound = any(p[1] is not None for p in pieces)
        dtype = (
            torch.float64
            if any(p[0].dtype == torch.float64 for p in pieces)
            else pieces[0][0].dtype
        )
        rows = torch.zeros(len(pieces) * outs, widest * taps, dtype=dtype)
        bound = torch.zeros(rows.shape, dtype=torch.float64) if any_bound else None
        reads = np.full((len(pieces), widest), -1, dtype=np.int64)
        for group, (piece, piece_bound, _, _, colors) in enumerate(pieces):
            if len(colors) == 0:
                continue  # all of the group's inputs are constant
            order = np.argsort(colors, kind="stable")
            reads[group, : len(colors)] = colors[order]
            place = slice(group * outs, (group + 1) * outs)
            shaped = piece.reshape(outs, len(colors), -1)[:, torch.from_numpy(order)]
            rows[place, : shaped[0].numel()] = shaped.reshape(outs, -1).to(dtype)
            if bound is not None and piece_bound is not None:
                ordered = piece_bound.reshape(outs, len(colors), -1)[:, torch.from_numpy(order)]
                bound[place, : shaped[0].numel()] = ordered.reshape(outs, -1)
        match = np.repeat(
            unique_rows(*reads.T) if widest else np.zeros(len(pieces), np.int64), outs
        )
        offset = np.concatenate([p[2] for p in pieces])
        return Form(axis, rows, offset, bound, np.concatenate([p[3] for p in pieces]), match, space)

    def reads(
        self, analysis: Analysis, node: fx.Node, live: Mapping[Ref, Mask]
    ) -> Iterator[tuple[Ref, Mask]]:
        bound = analysis.arguments(node)
        tensor, groups = self.weight_of(analysis, node)
        axis = len(analysis.shape(bound["input"])) - (tensor.ndim - 2)
        alive = live.get((node, axis))
        if groups == 1:
            yield (bound["input"], axis), columns_read(tensor[0], alive)
            return
        used = (tensor != 0).flatten(3).any(3)
        if alive is not None:
            used = used & torch.from_numpy(alive).reshape(groups, -1, 1)
        yield (bound["input"], axis), used.any(1).reshape(-1).numpy()

    def columns(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[Ref, torch.Tensor]]:
        bound = analysis.arguments(node)
        tensor, groups = self.weight_of(analysis, node)
        axis = len(analysis.shape(bound["input"])) - (tensor.ndim - 2)
        # [groups, out / groups, in / groups, *kernel]: every group reads its own inputs alone.
        rows = tensor.flatten(3).transpose(2, 3).flatten(1, 2)
        if groups == 1:
            yield (bound["input"], axis), rows[0]
        else:
            # What reads a channel alone counts by its norm; its taps would make a long matrix.
            alone = rows.shape[2] == 1
            wide = rows[:, :, 0].norm(dim=1).diag() if alone else torch.block_diag(*rows)
            yield (bound["input"], axis), wide

    def regression(self, analysis: Analysis, node: fx.Node) -> Regression | None:
        bound = analysis.arguments(node)
        kernel = analysis.shape(bound["weight"])[2:]
        count = len(kernel)
        transposed = self.transposed(analysis, node)
        batched = len(analysis.shape(node)) == count + 2
        if not batched or (transposed and bound["groups"] != 1):
            return None
        stride, dilation = (tuple(_each(bound[name], count)) for name in ("stride", "dilation"))
        if isinstance(bound["padding"], str):
            same = bound["padding"] == "same"
            reach = [d * (k - 1) * same for d, k in zip(dilation, kernel, strict=True)]
            padding = [(r // 2, r - r // 2) for r in reach]
        else:
            more = _each(bound.get("output_padding", 0), count)
            given = zip(_each(bound["padding"], count), more, strict=True)
            padding = [(p, p - m) for p, m in given]
        window = Window(kernel, stride, tuple(padding), dilation, transposed)
        return convolution_regression(bound["input"], bound["weight"], bound["bias"], window)

    def produces(self, analysis: Analysis, node: fx.Node) -> Iterator[tuple[str, Ref]]:
        kernel = len(analysis.shape(analysis.arguments(node)["weight"])) - 2
        yield "", (node, len(analysis.shape(node)) - kernel - 1)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> fx.Node:
        analysis = rewriter.analysis
        bound = analysis.arguments(node)
        source, weight, bias, groups = (
            bound["input"], bound["weight"], bound["bias"], bound["groups"]
        )  # fmt: skip
        axis = len(analysis.shape(source)) - (len(analysis.shape(weight)) - 1)
        transposed = self.transposed(analysis, node)
        rows = rewriter.rows(node, axis)
        if groups == 1:
            columns = rewriter.columns(source, axis)
            axes = {1: rows, 0: columns} if transposed else {0: rows, 1: columns}
        elif not transposed:
            axes = {0: rows, 1: rewriter.columns(node, "in")}
        elif analysis.shape(weight)[0] == groups:
            axes = {0: rewriter.first(source, axis), 1: rewriter.first(node, "out")}
        else:
            axes = {0: rewriter.columns(source, axis), 1: rewriter.first(node, "out")}
        reduced = {weight: rewriter.constant(weight, axes)}
        extra = None
        if groups == 1:
            extra = rewriter.dropped_constants(source, axis, weight, inputs=0 if transposed else 1)
        if bias is not None:
            reduced[bias] = rewriter.constant(bias, {0: rows}, plus=extra)
        changed: dict[str, Any] = {}
        if groups > 1:
            changed["groups"] = rewriter.layout(node, "groups").size
        if bias is None and extra is not None:
            changed["bias"] = rewriter.new_constant(weight, rows.apply(extra, 0), "bias")
        return rewriter.repeat(node, constants=reduced, changed=changed)

    def examples(self) -> Iterable[Any]:
        from fxfib.passes.rules import examples

        return examples.convolution()
