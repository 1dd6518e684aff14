"""Which ordinary module an ATen node is, and under which of the user's names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfib.graph_tools import module_path, value_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Raised:
    """A module that computes what a node computes.

    `arguments` are those of the constructor, `tensors` maps names inside the module to attribute
    names of the graph, `inputs` are the node's arguments that the module is called with.
    """

    path: str
    kind: type[nn.Module]
    arguments: dict[str, Any]
    tensors: dict[str, str]
    inputs: tuple[Any, ...]

    def same_module(self, other: "Raised") -> bool:
        """Whether both calls are calls of one module."""
        return (self.path, self.kind, self.arguments, self.tensors) == (
            other.path,
            other.kind,
            other.arguments,
            other.tensors,
        )

    def build(self, tensor_of: Callable[[str], Tensor]) -> nn.Module | None:
        """The module over the graph's own tensors; None where their shapes are not its shapes."""
        module = (
            self.kind(**self.arguments, device="meta")
            if self.tensors
            else self.kind(**self.arguments)
        )
        expected = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        expected.pop("num_batches_tracked", None)
        if set(expected) != set(self.tensors):
            return None
        for name, target in self.tensors.items():
            tensor = tensor_of(target)
            if tensor.shape != expected[name].shape:
                return None
            if isinstance(expected[name], nn.Parameter) != isinstance(tensor, nn.Parameter):
                return None
        for name, target in self.tensors.items():
            setattr(module, name, tensor_of(target))
        return module


def raised_of(node: fx.Node, shape_of: Callable[[str], tuple[int, ...]]) -> Raised | None:
    """The module of one `call_function` node, or None where no ordinary module has its tensors.

    Args:
        node: of a captured (or rewritten) graph.
        shape_of: shape of the tensor at an attribute name.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    given = arguments_of(node)
    if node.target in _WEIGHTED:
        return _WEIGHTED[node.target](node, given, shape_of)
    if node.target in _PLAIN:
        kind, arguments = _PLAIN[node.target](given)
        if kind is None or not _stack_kind_is(node, kind):
            return None
        if any(isinstance(value, fx.Node) for value in _flat(arguments)):
            return None
        return Raised(module_path(node), kind, arguments, {}, (given["self"],))
    return None


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen node by name, defaults included; the first is called "self"."""
    schema = node.target._schema  # type: ignore[union-attr]
    given: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        name = "self" if index == 0 else argument.name
        if index < len(node.args):
            given[name] = node.args[index]
        elif argument.name in node.kwargs:
            given[name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            given[name] = argument.default_value
    return given


def _flat(arguments: Mapping[str, Any]) -> list[Any]:
    flat: list[Any] = []
    for value in arguments.values():
        flat.extend(value if isinstance(value, (list, tuple)) else [value])
    return flat


def _stack_kind_is(node: fx.Node, kind: type[nn.Module]) -> bool:
    """Whether the user's innermost module is of that kind (its parameter-free call is the node)."""
    stack = node.meta.get("nn_module_stack")
    if not stack or not module_path(node):
        return False
    made_by = list(stack.values())[-1][1]
    name = made_by if isinstance(made_by, str) else f"{made_by.__module__}.{made_by.__qualname__}"
    return name in {f"{k.__module__}.{k.__qualname__}" for k in (kind, *_ALSO.get(kind, ()))}


def _named(tensors: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """The module path that all given tensors share, if their last names are the standard ones."""
    targets: dict[str, str] = {}
    paths = set()
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        path, _, leaf = str(value.target).rpartition(".")
        if leaf != name:
            return None
        paths.add(path)
        targets[name] = str(value.target)
    if len(paths) != 1 or "" in paths:
        return None
    return paths.pop(), targets


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values


Shapes = Callable[[str], tuple[int, ...]]


def _linear(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
    found = _named({"weight": given["weight"], "bias": given["bias"]})
    if found is None:
        return None
    path, tensors = found
    shape = shape_of(tensors["weight"])
    if len(shape) != 2:
        return None
    arguments = {"in_features": shape[1], "out_features": shape[0], "bias": "bias" in tensors}
    return Raised(path, nn.Linear, arguments, tensors, (given["self"],))


def _convolution(rank: int, transposed: bool) -> Callable[..., Raised | None]:
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )

    def raise_convolution(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
        found = _named({"weight": given["weight"], "bias": given["bias"]})
        if found is None:
            return None
        path, tensors = found
        shape, groups = shape_of(tensors["weight"]), given["groups"]
        first, second = (0, 1) if transposed else (1, 0)
        channels = {"in_channels": shape[first], "out_channels": shape[second]}
        channels["out_channels" if transposed else "in_channels"] *= groups
        if channels["in_channels"] % groups or channels["out_channels"] % groups:
            return None
        padding = given["padding"]
        arguments: dict[str, Any] = {
            **channels,
            "kernel_size": tuple(shape[2:]),
            "stride": _tuple(given["stride"], rank),
            "padding": padding if isinstance(padding, str) else _tuple(padding, rank),
            "dilation": _tuple(given["dilation"], rank),
            "groups": groups,
            "bias": "bias" in tensors,
        }
        if transposed:
            arguments["output_padding"] = _tuple(given["output_padding"], rank)
        return Raised(path, kinds[rank - 1], arguments, tensors, (given["self"],))

    return raise_convolution


def _batch_norm(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
    names = ("weight", "bias", "running_mean", "running_var")
    found = _named({name: given[name] for name in names})
    if found is None or given["training"]:
        return None
    path, tensors = found
    if "running_mean" not in tensors or "running_var" not in tensors:
        return None
    rank = value_of(given["self"]).ndim
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank)
    if kind is None:
        return None
    arguments = {
        "num_features": shape_of(tensors["running_mean"])[0],
        "eps": given["eps"],
        "momentum": given["momentum"],
        "affine": "weight" in tensors,
    }
    return Raised(path, kind, arguments, tensors, (given["self"],))


def _instance_norm(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
    names = ("weight", "bias", "running_mean", "running_var")
    found = _named({name: given[name] for name in names})
    if found is None or given["use_input_stats"] == ("running_mean" in found[1]):
        return None
    path, tensors = found
    rank = value_of(given["self"]).ndim
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(rank)
    if kind is None:
        return None
    arguments = {
        "num_features": shape_of(next(iter(tensors.values())))[0],
        "eps": given["eps"],
        "momentum": given["momentum"],
        "affine": "weight" in tensors,
        "track_running_stats": "running_mean" in tensors,
    }
    return Raised(path, kind, arguments, tensors, (given["self"],))


def _norm(kind: type[nn.Module]) -> Callable[..., Raised | None]:
    def raise_norm(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
        values = {"weight": given.get("weight"), "bias": given.get("bias")}
        found = _named(values)
        if found is None:
            if any(value is not None for value in values.values()):
                return None
            if not _stack_kind_is(node, kind):
                return None
            found = (module_path(node), {})
        path, tensors = found
        arguments: dict[str, Any] = {"eps": given["eps"]}
        affine = "weight" in tensors
        if kind is nn.GroupNorm:
            channels = value_of(given["self"]).shape[1]
            arguments |= {"num_groups": given["num_groups"], "num_channels": channels}
            arguments["affine"] = affine
        else:
            arguments["normalized_shape"] = tuple(given["normalized_shape"])
            arguments["elementwise_affine"] = affine
        if kind is nn.LayerNorm and affine:
            arguments["bias"] = "bias" in tensors
        return Raised(path, kind, arguments, tensors, (given["self"],))

    return raise_norm


def _embedding(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
    found = _named({"weight": given["self"]})
    if found is None:
        return None
    path, tensors = found
    shape = shape_of(tensors["weight"])
    arguments = {
        "num_embeddings": shape[0],
        "embedding_dim": shape[1],
        "padding_idx": given["padding_idx"] if given["padding_idx"] >= 0 else None,
        "scale_grad_by_freq": given["scale_grad_by_freq"],
        "sparse": given["sparse"],
    }
    return Raised(path, nn.Embedding, arguments, tensors, (given["indices"],))


def _prelu(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
    found = _named({"weight": given["weight"]})
    if found is None:
        return None
    arguments = {"num_parameters": shape_of(found[1]["weight"])[0]}
    return Raised(found[0], nn.PReLU, arguments, found[1], (given["self"],))


def _recurrent(kind: type[nn.RNNBase], gates: int, **extra: Any) -> Callable[..., Raised | None]:
    def raise_recurrent(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
        per_layer = 4 if given["has_biases"] else 2
        suffixes = [
            f"_l{layer}{direction}"
            for layer in range(given["num_layers"])
            for direction in (("", "_reverse") if given["bidirectional"] else ("",))
        ]
        projected = len(given["params"]) == len(suffixes) * (per_layer + 1)
        stems = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * given["has_biases"]
        stems += ["weight_hr"] * projected
        names = [stem + suffix for suffix in suffixes for stem in stems]
        if len(names) != len(given["params"]):
            return None
        found = _named(dict(zip(names, given["params"], strict=True)))
        if found is None:
            return None
        path, tensors = found
        arguments = {
            "input_size": shape_of(tensors["weight_ih_l0"])[1],
            "hidden_size": shape_of(tensors["weight_hh_l0"])[0] // gates,
            "num_layers": given["num_layers"],
            "bias": given["has_biases"],
            "batch_first": given["batch_first"],
            "dropout": given["dropout"],
            "bidirectional": given["bidirectional"],
            **extra,
        }
        if projected:
            arguments["proj_size"] = shape_of(tensors["weight_hr_l0"])[0]
        states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        inputs: tuple[Any, ...] = (given["self"],)
        # The module starts from zeros by itself, on whatever device it is.
        if not all(state.target is aten.zeros.default for state in states):
            inputs += (tuple(states) if kind is nn.LSTM else states[0],)
        return Raised(path, kind, arguments, tensors, inputs)

    return raise_recurrent


_WEIGHTED: dict[Any, Callable[..., Raised | None]] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution(1, False),
    aten.conv2d.default: _convolution(2, False),
    aten.conv3d.default: _convolution(3, False),
    aten.conv1d.padding: _convolution(1, False),
    aten.conv2d.padding: _convolution(2, False),
    aten.conv3d.padding: _convolution(3, False),
    aten.conv_transpose1d.default: _convolution(1, True),
    aten.conv_transpose2d.input: _convolution(2, True),
    aten.conv_transpose3d.input: _convolution(3, True),
    aten.batch_norm.default: _batch_norm,
    aten.instance_norm.default: _instance_norm,
    aten.layer_norm.default: _norm(nn.LayerNorm),
    aten.group_norm.default: _norm(nn.GroupNorm),
    aten.rms_norm.default: _norm(nn.RMSNorm),
    aten.embedding.default: _embedding,
    aten.prelu.default: _prelu,
    aten.lstm.input: _recurrent(nn.LSTM, 4),
    aten.gru.input: _recurrent(nn.GRU, 3),
    aten.rnn_tanh.input: _recurrent(nn.RNN, 1, nonlinearity="tanh"),
    aten.rnn_relu.input: _recurrent(nn.RNN, 1, nonlinearity="relu"),
}

RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})

# Where a subclass behaves exactly like what it is raised to.
_ALSO: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    nn.Hardtanh: (nn.ReLU6,),
}

Plain = tuple[type[nn.Module] | None, dict[str, Any]]


def _plain(kind: type[nn.Module], **names: str) -> Callable[[dict[str, Any]], Plain]:
    """A module without tensors: constructor argument -> name in the schema."""

    def make(given: dict[str, Any]) -> Plain:
        # A softmax in another dtype, an ELU with other scales: no module has those.
        if given.get("dtype") is not None or (given.get("scale"), given.get("input_scale")) not in (
            (None, None),
            (1, 1),
        ):
            return None, {}
        arguments = {}
        for ours, theirs in names.items():
            value = given[theirs]
            arguments[ours] = tuple(value) if isinstance(value, list) else value
        if "stride" in arguments and not arguments["stride"]:
            arguments["stride"] = None
        return kind, arguments

    return make


def _dropout(kind: type[nn.Module]) -> Callable[[dict[str, Any]], Plain]:
    return lambda given: (None, {}) if given["train"] and given["p"] else (kind, {"p": given["p"]})


def _feature_dropout(given: dict[str, Any]) -> Plain:
    kinds = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
    kind = kinds.get(value_of(given["self"]).ndim)
    return _dropout(kind)(given) if kind is not None else (None, {})


def _hardtanh(given: dict[str, Any]) -> Plain:
    bounds = (float(given["min_val"]), float(given["max_val"]))
    if bounds == (0.0, 6.0):
        return nn.ReLU6, {}
    return nn.Hardtanh, {"min_val": bounds[0], "max_val": bounds[1]}


_MAX_POOL = {name: name for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
_AVG_POOL = {n: n for n in ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")}
_AVG_POOL_ND = {**_AVG_POOL, "divisor_override": "divisor_override"}

_PLAIN: dict[Any, Callable[[dict[str, Any]], Plain]] = {
    aten.relu.default: _plain(nn.ReLU),
    aten.relu6.default: _plain(nn.ReLU6),
    aten.hardtanh.default: _hardtanh,
    aten.leaky_relu.default: _plain(nn.LeakyReLU, negative_slope="negative_slope"),
    aten.elu.default: _plain(nn.ELU, alpha="alpha"),
    aten.selu.default: _plain(nn.SELU),
    aten.celu.default: _plain(nn.CELU, alpha="alpha"),
    aten.gelu.default: _plain(nn.GELU, approximate="approximate"),
    aten.silu.default: _plain(nn.SiLU),
    aten.mish.default: _plain(nn.Mish),
    aten.sigmoid.default: _plain(nn.Sigmoid),
    aten.log_sigmoid.default: _plain(nn.LogSigmoid),
    aten.tanh.default: _plain(nn.Tanh),
    aten.hardswish.default: _plain(nn.Hardswish),
    aten.hardsigmoid.default: _plain(nn.Hardsigmoid),
    aten.softplus.default: _plain(nn.Softplus, beta="beta", threshold="threshold"),
    aten.softshrink.default: _plain(nn.Softshrink, lambd="lambd"),
    aten.hardshrink.default: _plain(nn.Hardshrink, lambd="lambd"),
    aten.threshold.default: _plain(nn.Threshold, threshold="threshold", value="value"),
    aten.softmax.int: _plain(nn.Softmax, dim="dim"),
    aten.log_softmax.int: _plain(nn.LogSoftmax, dim="dim"),
    aten.glu.default: _plain(nn.GLU, dim="dim"),
    aten.dropout.default: _dropout(nn.Dropout),
    aten.alpha_dropout.default: _dropout(nn.AlphaDropout),
    aten.feature_dropout.default: _feature_dropout,
    aten.feature_alpha_dropout.default: _dropout(nn.FeatureAlphaDropout),
    aten.flatten.using_ints: _plain(nn.Flatten, start_dim="start_dim", end_dim="end_dim"),
    aten.max_pool1d.default: _plain(nn.MaxPool1d, **_MAX_POOL),
    aten.max_pool2d.default: _plain(nn.MaxPool2d, **_MAX_POOL),
    aten.max_pool3d.default: _plain(nn.MaxPool3d, **_MAX_POOL),
    aten.avg_pool1d.default: _plain(nn.AvgPool1d, **_AVG_POOL),
    aten.avg_pool2d.default: _plain(nn.AvgPool2d, **_AVG_POOL_ND),
    aten.avg_pool3d.default: _plain(nn.AvgPool3d, **_AVG_POOL_ND),
    aten.adaptive_avg_pool1d.default: _plain(nn.AdaptiveAvgPool1d, output_size="output_size"),
    aten.adaptive_avg_pool2d.default: _plain(nn.AdaptiveAvgPool2d, output_size="output_size"),
    aten.adaptive_avg_pool3d.default: _plain(nn.AdaptiveAvgPool3d, output_size="output_size"),
    aten.pixel_shuffle.default: _plain(nn.PixelShuffle, upscale_factor="upscale_factor"),
    aten.pixel_unshuffle.default: _plain(nn.PixelUnshuffle, downscale_factor="downscale_factor"),
    aten.channel_shuffle.default: _plain(nn.ChannelShuffle, groups="groups"),
}


_DROPOUTS = frozenset(
    {
        aten.dropout.default,
        aten.alpha_dropout.default,
        aten.feature_dropout.default,
        aten.feature_alpha_dropout.default,
    }
)


def functional_dropout(node: fx.Node) -> tuple[type[nn.Module], dict[str, Any]] | None:
    """The module of a dropout that the user wrote as a function, so that it can be switched on."""
    if node.target not in _DROPOUTS:
        return None
    kind, arguments = _PLAIN[node.target](arguments_of(node))
    return None if kind is None else (kind, arguments)
