"""Compiled modules in one file without pickled code, that loads without the original class.

The file is a safetensors file: the tensors under the names of the `state_dict` (tied ones once,
buffers outside it too), and one metadata entry, `fxfib`, a JSON text with the graph, the module
tree, the calling convention and the report.  Any safetensors reader can read the weights.
"""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fxfib._version import __version__
from fxfib.calling import Calling
from fxfib.errors import ExportError, LoadError
from fxfib.fibration_module import FibrationModule
from fxfib.files import move_into_place, staging_folder
from fxfib.graph_json import decode_graph, encode_graph
from fxfib.program import same_tensor_key

FORMAT = 1

_LINEAR = ("in_features", "out_features", "bias")
_CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("bias", "padding_mode"),
)
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_RECURRENT = (
    *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
    "bidirectional",
)
_CELL = ("input_size", "hidden_size", "bias")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

# Constructor arguments of the modules that a file may hold, which are also their attributes.
CONSTRUCTORS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: _LINEAR,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        (*_CONVOLUTION, "output_padding"),
    ),
    **dict.fromkeys(
        (
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ),
        _BATCH_NORM,
    ),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.RMSNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.Embedding: (
        *("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq", "sparse"),
    ),
    nn.PReLU: ("num_parameters",),
    nn.LSTM: (*_RECURRENT, "proj_size"),
    nn.GRU: _RECURRENT,
    nn.RNN: (*_RECURRENT, "nonlinearity"),
    **dict.fromkeys((nn.LSTMCell, nn.GRUCell), _CELL),
    nn.RNNCell: (*_CELL, "nonlinearity"),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _MAX_POOL),
    nn.AvgPool1d: _AVG_POOL,
    **dict.fromkeys((nn.AvgPool2d, nn.AvgPool3d), (*_AVG_POOL, "divisor_override")),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("output_size",)
    ),
    **dict.fromkeys(
        (
            *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
            *(nn.AlphaDropout, nn.FeatureAlphaDropout),
        ),
        ("p",),
    ),
    **dict.fromkeys(
        (
            *(nn.Module, nn.Identity, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Mish, nn.Sigmoid),
            *(nn.LogSigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid),
        ),
        (),
    ),
    nn.Hardtanh: ("min_val", "max_val"),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
    nn.CELU: ("alpha",),
    nn.GELU: ("approximate",),
    nn.Softplus: ("beta", "threshold"),
    nn.Softshrink: ("lambd",),
    nn.Hardshrink: ("lambd",),
    nn.Threshold: ("threshold", "value"),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    nn.GLU: ("dim",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.PixelShuffle: ("upscale_factor",),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.ChannelShuffle: ("groups",),
}
_KINDS = {kind.__name__: kind for kind in CONSTRUCTORS}


def save(module: FibrationModule, path: str | os.PathLike[str]) -> None:
    """Writes a compiled module to one file; the file is there whole or not at all.

    Args:
        module: what `fxfib.compile` gave.  Trained, moved and cast are fine; a submodule replaced
            by one of your own class cannot be written without pickling code.
        path: of the file; its folder must exist.

    Raises:
        ExportError: not a compiled module, a module or argument that is not data, an unwritable
            path, a full disk.
    """
    if not isinstance(module, FibrationModule):
        raise ExportError(
            f"only what fxfib.compile gives can be saved, not {type(module).__name__}; "
            "use torch.save for other modules."
        )
    tensors, entries = _encode_tensors(module)
    report = module.fibration
    data = {
        "format": FORMAT,
        "versions": {"fxfib": __version__, "torch": torch.__version__},
        "class_name": type(module).__name__,
        "graph": encode_graph(module.graph),
        "calling": module._calling.to_json(),
        "modules": [
            _encode_module(name, child)
            for name, child in module.named_modules(remove_duplicate=False)
        ],
        "tensors": entries,
        "report": report.to_dict() if hasattr(report, "to_dict") else None,
    }
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ExportError(f"{type(module).__name__} cannot be saved as JSON: {error}.") from error
    with staging_folder(path) as folder:
        staged = folder / "module"
        try:
            safetensors.torch.save_file(tensors, staged, {"fxfib": text})
        except safetensors.SafetensorError as error:
            raise ExportError(f"{path} cannot be written: {error}.") from error
        move_into_place(staged, path)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> FibrationModule:
    """Reads what `save` wrote; runs nothing from the file and imports nothing it names.

    A dataclass or named tuple among the outputs is the user's own where its module is already
    imported; otherwise a dataclass of the same name and fields is made.

    Args:
        path: of the file.
        device: where the tensors go.

    Raises:
        LoadError: no such file, not written by fxfib, damaged, or of a newer format.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        raise LoadError(f"{path} does not exist or is not a file.")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if "fxfib" not in metadata:
                raise LoadError(f"{path} was not written by fxfib.save.")
            # In the file they stand at any address; kernels choose by alignment how they sum, so
            # that without a copy the outputs would differ in the last bit.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
        data = json.loads(metadata["fxfib"])
        if data["format"] > FORMAT:
            raise LoadError(
                f"{path} has format {data['format']}, newer than this fxfib "
                f"({__version__}); upgrade fxfib."
            )
        module = _build(data, tensors)
    except LoadError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise LoadError(f"{path} is not readable as a file of fxfib.save: {error}.") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise LoadError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    return module.to(device)


def _encode_module(name: str, module: nn.Module) -> list[Any]:
    kind = nn.Module if isinstance(module, FibrationModule) and not name else type(module)
    if kind not in CONSTRUCTORS:
        raise ExportError(
            f"{name} is a {kind.__name__}, which is not a module that fxfib makes; "
            "it cannot be saved without pickling its code."
        )
    arguments = {key: getattr(module, key) for key in CONSTRUCTORS[kind]}
    if "bias" in arguments and not isinstance(arguments["bias"], bool):
        arguments["bias"] = arguments["bias"] is not None
    return [name, kind.__name__, arguments, module.training]


def _encode_tensors(module: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    stored: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    entries = []
    for prefix, holder in module.named_modules(remove_duplicate=False):
        members = [*holder._parameters.items(), *holder._buffers.items()]
        for leaf, tensor in members:
            if tensor is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            key = (id(tensor),) if tensor.numel() == 0 else same_tensor_key(tensor)
            if key not in stored:
                stored[key] = name
                storage = tensor.untyped_storage()._cdata
                # A view of memory that is stored already would be refused: it gets its own.
                value = tensor.detach()
                tensors[name] = value.clone() if storage in storages else value.contiguous()
                storages.add(storage)
            entry = {"name": name, "stored": stored[key]}
            if isinstance(tensor, nn.Parameter):
                entry["requires_grad"] = tensor.requires_grad
            else:
                entry["persistent"] = leaf not in holder._non_persistent_buffers_set
            entries.append(entry)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, entries


def _build(data: dict[str, Any], tensors: dict[str, Tensor]) -> FibrationModule:
    root = nn.Module()
    modules: dict[str, nn.Module] = {"": root}
    for name, kind_name, arguments, training in data["modules"]:
        if name:
            module = _make(_KINDS[kind_name], arguments)
            parent, _, leaf = name.rpartition(".")
            modules[parent].add_module(leaf, module)
            modules[name] = module
        modules[name].training = bool(training)
    parameters: dict[str, nn.Parameter] = {}
    for entry in data["tensors"]:
        prefix, _, leaf = entry["name"].rpartition(".")
        holder, tensor = modules[prefix], tensors[entry["stored"]]
        if "persistent" in entry:
            if leaf in holder._buffers:
                _check_shape(entry["name"], tensor, holder._buffers[leaf])
                holder._buffers[leaf] = tensor
            else:
                holder.register_buffer(leaf, tensor, persistent=bool(entry["persistent"]))
            continue
        if entry["stored"] not in parameters:
            grad = bool(entry["requires_grad"])
            parameters[entry["stored"]] = nn.Parameter(tensor, requires_grad=grad)
        _check_shape(entry["name"], tensor, holder._parameters.get(leaf))
        setattr(holder, leaf, parameters[entry["stored"]])
    for name, module in modules.items():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                if leaf != "num_batches_tracked":
                    raise LoadError(f"the tensor {name}.{leaf} is missing from the file.")
                module._buffers[leaf] = None
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                raise LoadError(f"the tensor {name}.{leaf} is missing from the file.")
    calling = Calling.from_json(data["calling"])
    result = FibrationModule(root, decode_graph(data["graph"]), calling, str(data["class_name"]))
    if data["report"] is not None:
        from fxfib.report import Report  # it needs the analysis, which nothing else here does

        result.fibration = Report.from_dict(data["report"])
    return result


def _check_shape(name: str, tensor: Tensor, expected: Tensor | None) -> None:
    if expected is not None and expected.shape != tensor.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(expected.shape)}")


def _make(kind: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    if set(arguments) != set(CONSTRUCTORS[kind]):
        raise ValueError(f"{kind.__name__} does not take {sorted(arguments)}")
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()
    }
    # No memory for weights that are replaced at once; modules without any do not take a device.
    with torch.device("meta"):
        return kind(**arguments)
