"""ATen operations with parameters, and the modules that they came from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxfib.graph_tools import module_path, value_of
from fxfib.raised import Raised, Shapes, made_by, per_axis, same_path

aten = torch.ops.aten


def _linear(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
    found = same_path({"weight": given["weight"], "bias": given["bias"]})
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
        found = same_path({"weight": given["weight"], "bias": given["bias"]})
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
            "stride": per_axis(given["stride"], rank),
            "padding": padding if isinstance(padding, str) else per_axis(padding, rank),
            "dilation": per_axis(given["dilation"], rank),
            "groups": groups,
            "bias": "bias" in tensors,
        }
        if transposed:
            arguments["output_padding"] = per_axis(given["output_padding"], rank)
        return Raised(path, kinds[rank - 1], arguments, tensors, (given["self"],))

    return raise_convolution


def _batch_norm(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
    names = ("weight", "bias", "running_mean", "running_var")
    found = same_path({name: given[name] for name in names})
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
    found = same_path({name: given[name] for name in names})
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
        found = same_path(values)
        if found is None:
            if any(value is not None for value in values.values()):
                return None
            if not made_by(node, kind):
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
    found = same_path({"weight": given["self"]})
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
    found = same_path({"weight": given["weight"]})
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
        found = same_path(dict(zip(names, given["params"], strict=True)))
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
        return Raised(path, kind, arguments, tensors, (given["self"], *_started(given["hx"])))

    return raise_recurrent


def _cell(kind: type[nn.RNNCellBase], gates: int, **extra: Any) -> Callable[..., Raised | None]:
    def raise_cell(node: fx.Node, given: dict[str, Any], shape_of: Shapes) -> Raised | None:
        names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
        found = same_path({name: given[own] for name, own in names.items()})
        if found is None:
            return None
        path, tensors = found
        if ("bias_ih" in tensors) != ("bias_hh" in tensors):
            return None
        arguments = {
            "input_size": shape_of(tensors["weight_ih"])[1],
            "hidden_size": shape_of(tensors["weight_hh"])[0] // gates,
            "bias": "bias_ih" in tensors,
            **extra,
        }
        return Raised(path, kind, arguments, tensors, (given["self"], *_started(given["hx"])))

    return raise_cell


def _started(state: Any) -> tuple[Any, ...]:
    """The state as a module takes it; nothing where it starts from zeros, as it does by itself."""
    states = state if isinstance(state, (list, tuple)) else [state]
    if all(state.target is aten.zeros.default for state in states):
        return ()
    return (tuple(state),) if isinstance(state, (list, tuple)) else (state,)


WEIGHTED: dict[Any, Callable[..., Raised | None]] = {
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
    aten.lstm_cell.default: _cell(nn.LSTMCell, 4),
    aten.gru_cell.default: _cell(nn.GRUCell, 3),
    aten.rnn_tanh_cell.default: _cell(nn.RNNCell, 1, nonlinearity="tanh"),
    aten.rnn_relu_cell.default: _cell(nn.RNNCell, 1, nonlinearity="relu"),
}

RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})
