"""ATen operations without parameters, and the modules that they came from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxfib.graph_tools import value_of

aten = torch.ops.aten

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

PLAIN: dict[Any, Callable[[dict[str, Any]], Plain]] = {
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
