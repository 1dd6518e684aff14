"""Which widths pay in a runtime here: the latency of layers against their width, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxfib import timing
from fxfib.errors import InputError
from fxfib.runtimes import onnx_session

KINDS = ("linear", "convolution")
WIDTH_RUNTIMES = ("onnxruntime", "torch")
MULTIPLES = (1, 2, 4, 8, 16, 32)
# One layer alone would measure how its input is copied to the layout that it wants.
LAYERS = 3
ROWS, SIDE = 64, 14
SAMPLE = 0.0005
# Times as near as this are equal; the larger multiple then keeps more nodes for them.
NEAR = 1.02


@dataclass(frozen=True)
class Widths:
    """What :func:`measure_widths` found; prints as a table.

    Attributes:
        runtime: where it was measured.
        milliseconds: for ``"linear"`` and ``"convolution"``, the shortest time of three layers of
            every width.
        setting: threads, rounds, machine and versions, in words.
    """

    runtime: str
    milliseconds: dict[str, dict[int, float]]
    setting: str

    def cost(self, kind: str, multiple: int) -> float:
        """Time of widths that are rounded up to a multiple, over that of widths as they come.

        The mean over all measured widths that can be rounded up within the measured range.
        """
        times = self.milliseconds[kind]
        last = max(times) // max(MULTIPLES) * max(MULTIPLES)
        widths = [width for width in times if width <= last]
        rounded = [times[-(-width // multiple) * multiple] for width in widths]
        return float(np.mean(rounded) / np.mean([times[width] for width in widths]))

    def best(self, shares: Mapping[str, float] | None = None) -> int:
        """The multiple that pays.

        Args:
            shares: how much of a network's work each kind is; None: half and half.
        """
        weights = dict.fromkeys(self.milliseconds, 1.0) if shares is None else dict(shares)
        total = sum(weights.get(kind, 0.0) for kind in self.milliseconds)
        if not total:
            return 1

        def mean(multiple: int) -> float:
            parts = [weights.get(k, 0.0) * self.cost(k, multiple) for k in self.milliseconds]
            return sum(parts) / total

        costs = {multiple: mean(multiple) for multiple in MULTIPLES}
        return max(m for m, cost in costs.items() if cost <= NEAR * min(costs.values()))

    def __str__(self) -> str:
        lines = [f"widths in {self.runtime}: {self.setting}"]
        lines.append("  time of widths rounded up to multiples, beside any width")
        lines.append("  " + " " * 12 + "".join(f"{multiple:>8}" for multiple in MULTIPLES))
        for kind in self.milliseconds:
            costs = "".join(f"{self.cost(kind, multiple):>8.2f}" for multiple in MULTIPLES)
            lines.append(f"  {kind:<12}{costs}   best {self.best({kind: 1.0})}")
        return "\n".join(lines)


def measure_widths(
    runtime: str = "onnxruntime",
    *,
    widths: Sequence[int] = range(65, 129),
    kinds: Sequence[str] = KINDS,
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 60,
) -> Widths:
    """Measure how long layers take against their width, some seconds in all.

    Three linear layers with ReLU on float32 ``[64, width]``, and three 3 x 3 convolutions on
    float32 ``[1, width, 14, 14]``.

    Args:
        runtime: ``"onnxruntime"`` or ``"torch"`` (``torch.compile`` calls the same kernels for
            these layers).
        widths: consecutive widths; the last multiple of 32 among them bounds what is compared.
        kinds: of ``"linear"`` and ``"convolution"``.
        device: ``"cpu"`` or ``"cuda"``.
        threads: None: as many as torch uses now.
        rounds: measurements of each, interleaved.

    Returns:
        The times; ``best()`` is a ``round_to`` for :func:`fxfib.compile`.

    Raises:
        InputError: an argument is out of range, or the runtime is not here.
    """
    widths = list(widths)
    if runtime not in WIDTH_RUNTIMES:
        known = ", ".join(map(repr, WIDTH_RUNTIMES))
        raise InputError(f"widths are measured in {known}, not in {runtime!r}.")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"unknown kind of layer {unknown[0]!r}; known: {', '.join(KINDS)}.")
    step, most = 1, max(MULTIPLES)
    if not widths or widths != list(range(widths[0], widths[-1] + step)) or widths[0] < 1:
        raise InputError("widths must be consecutive positive numbers.")
    if widths[-1] // most * most < widths[0]:
        raise InputError(f"widths must reach a multiple of {most}.")
    threads = threads or torch.get_num_threads()
    found: dict[str, dict[int, float]] = {}
    with timing.torch_threads(threads), torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind in kinds:
            calls = [_call(runtime, kind, width, device, threads) for width in widths]
            times = timing.in_turns(calls, rounds, device, SAMPLE)
            # What else the machine does only ever adds, and leaves some short moments alone.
            found[kind] = dict(zip(widths, map(min, times), strict=True))
    return Widths(runtime, found, timing.setting(rounds, threads, "shortest"))


def _call(runtime: str, kind: str, width: int, device: str, threads: int) -> timing.Call:
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        linear = kind == "linear"
        layer = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 3, padding=1)
        layers += [layer, nn.ReLU()]
    stack = nn.Sequential(*layers).to(device).eval()
    shape = (ROWS, width) if kind == "linear" else (1, width, SIDE, SIDE)
    example = torch.randn(shape, device=device)
    if runtime == "torch":
        return lambda: stack(example)
    session = onnx_session(_onnx_bytes(stack, shape), device, threads)
    feed = {"x": example.cpu().numpy()}
    return lambda: session.run(None, feed)


def _onnx_bytes(stack: nn.Sequential, shape: tuple[int, ...]) -> bytes:
    """The stack as ONNX: a file written by hand takes milliseconds, the exporter seconds."""
    import onnx

    tensors: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    value = "x"

    def constant(name: str, tensor: Tensor) -> str:
        tensors.append(onnx.numpy_helper.from_array(tensor.detach().cpu().numpy(), name))
        return name

    for number, layer in enumerate(stack):
        result = f"v{number}"
        if isinstance(layer, nn.ReLU):
            node = onnx.helper.make_node("Relu", [value], [result])
        else:
            assert isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None
            names = [constant(f"w{number}", layer.weight), constant(f"b{number}", layer.bias)]
            make, given = onnx.helper.make_node, [value, *names]
            if isinstance(layer, nn.Linear):
                node = make("Gemm", given, [result], transB=1)
            else:
                node = make("Conv", given, [result], pads=[1, 1, 1, 1])
        nodes.append(node)
        value = result
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("x", value)
    ]
    graph = onnx.helper.make_graph(nodes, "widths", ends[:1], ends[1:], tensors)
    opset = onnx.helper.make_opsetid("", 18)
    model: onnx.ModelProto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    return model.SerializeToString()
