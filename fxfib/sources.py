"""Where the command line takes its models, weights and example inputs from.

Nothing here unpickles code: weights come from safetensors or through
`torch.load(weights_only=True)`, a `.pt2` file through `torch.export.load` with its pickled parts
restricted to tensors.
"""

import importlib
import inspect
import json
import logging
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fxfib.errors import InputError, LoadError

PRETRAINED = "pretrained"
_SEED = 0
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool")
}
_INPUT = re.compile(
    r"(?:(?P<dtype>[a-z]\w*):)?(?P<shape>\d+(?:x\d+)*|scalar)(?::(?P<bound>[1-9]\d*))?"
)


@dataclass(frozen=True)
class Source:
    """A model and what its origin says about how to call it."""

    module: torch.nn.Module
    example_args: tuple[Any, ...] | None = None
    example_kwargs: dict[str, Any] | None = None
    notes: tuple[str, ...] = field(default=())

    def inputs(self, specs: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
        """Arguments to call the model with: those of `--input`, else those the origin knows.

        Raises:
            InputError: neither is there, or a spec is malformed.
        """
        if specs:
            return tuple(parse_input(spec) for spec in specs), None
        if self.example_args is None:
            raise InputError(
                "the shape of the model's inputs is not known; give --input 2x3x224x224"
            )
        return self.example_args, self.example_kwargs


def parse_input(spec: str) -> torch.Tensor:
    """Turn `[dtype:]2x3x224x224[:bound]` into a tensor, the same one every time.

    Floating-point values are standard normal; integers are uniform in [0, bound), bound 2 if not
    given.
    """
    match = _INPUT.fullmatch(spec)
    dtype = _DTYPES.get(match["dtype"] or "float32") if match else None
    if match is None or dtype is None:
        raise InputError(
            f"input {spec!r} is not [dtype:]2x3x224x224[:bound] with a dtype among "
            f"{', '.join(_DTYPES)}"
        )
    shape = [] if match["shape"] == "scalar" else [int(size) for size in match["shape"].split("x")]
    generator = torch.Generator().manual_seed(_SEED)
    if dtype.is_floating_point:
        if match["bound"]:
            raise InputError(f"input {spec!r} has a bound, which only integer inputs take")
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(int(match["bound"] or 2), shape, generator=generator).to(dtype)


def load_model(spec: str, weights: str | None = None) -> Source:
    """Make the model that `spec` names, in evaluation mode, and load `weights` into it.

    Args:
        spec: `torchvision:NAME`, `timm:NAME`, `package.module:factory`, a `.pt2` file of
            `torch.export.save`, or a file of `fxfib.save`.
        weights: a safetensors file, a checkpoint that loads with `weights_only=True`, or
            `pretrained` for torchvision's own weights (downloaded).

    Raises:
        InputError: the spec names nothing that exists, or the weights do not fit the model.
        LoadError: a file cannot be read.
    """
    path = Path(spec)
    origin, separator, name = spec.partition(":")
    if path.is_file():
        if weights is not None:
            raise InputError(f"{spec} brings its own weights, so --weights cannot be given with it")
        return _from_pt2(path) if path.suffix == ".pt2" else _from_saved(path)
    if not separator or not name:
        if path.suffix or os.sep in spec:
            raise InputError(f"{spec} is not a file")
        raise InputError(
            f"model {spec!r} is not torchvision:NAME, timm:NAME, package.module:factory or a file"
        )
    if origin == "torchvision":
        source = _from_torchvision(name, weights)
    elif origin == "timm":
        source = _from_timm(name)
    else:
        source = _from_factory(origin, name)
    if weights is not None and not (origin == "torchvision" and weights == PRETRAINED):
        load_weights(source.module, weights)
    elif weights is None and origin in ("torchvision", "timm"):
        note = f"{spec} has random weights; give a checkpoint with --weights"
        source = Source(source.module, source.example_args, source.example_kwargs, (note,))
    source.module.eval()
    return source


def load_weights(module: torch.nn.Module, path: str) -> None:
    """Load a safetensors file or a `weights_only` checkpoint into `module`, every name matched.

    A checkpoint may be the state dict itself or hold it under `state_dict` or `model`; the prefix
    `module.`, left by DataParallel, is removed.

    Raises:
        InputError: names or shapes do not match.
        LoadError: the file cannot be read, or holds more than tensors.
    """
    state = _read_state_dict(Path(path))
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = module.state_dict()
    wrong = {
        "lacks": [name for name in own if name not in state],
        "has no place for": [name for name in state if name not in own],
        "has another shape for": [
            name for name in own if name in state and own[name].shape != state[name].shape
        ],
    }
    for problem, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{path} {problem} {', '.join(names[:3])}{more}")
    module.load_state_dict(state)


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise LoadError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{path} is not a readable safetensors file: {_line(error)}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        raise LoadError(
            f"{path} does not load with weights_only=True, and fxfib runs no pickled code; "
            "save its state_dict alone, or as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise LoadError(f"{path} holds no state dict (a mapping of names to tensors)")
    return {str(name): value for name, value in content.items()}


def _from_torchvision(name: str, weights: str | None) -> Source:
    models = _import_optional("torchvision.models", "torchvision", 'pip install "fxfib[vision]"')
    try:
        entry = models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError) as error:
        raise InputError(f"torchvision has no model {name!r}") from error
    options: dict[str, Any] = {"weights": entry if weights == PRETRAINED else None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # else the backbone's weights are downloaded
    with _weights_only(), warnings.catch_warnings():
        # Two old models announce that their random initialisation will change: of no concern here.
        warnings.simplefilter("ignore", FutureWarning)
        module = models.get_model(name, **options)
    size = _image_size(entry.transforms)
    example = None if size is None else (parse_input("x".join(map(str, (2, *size)))),)
    return Source(module, example)


def _image_size(transforms: Any) -> tuple[int, ...] | None:
    """Channels and extents that a weight entry's preset crops to; None where it does not say."""
    keywords = getattr(transforms, "keywords", {})
    crop = keywords.get("crop_size")
    if isinstance(crop, int):
        return (3, crop, crop)
    if crop is not None:  # video: 16 frames is what all of torchvision's clips have at least
        return (3, 16, *crop)
    if "resize_size" in keywords:  # segmentation resizes only; any size will do
        return (3, 224, 224)
    return None


def _from_timm(name: str) -> Source:
    timm = _import_optional("timm", "timm", "pip install timm")
    try:
        module = timm.create_model(name, pretrained=False)
    except RuntimeError as error:
        raise InputError(f"timm has no model {name!r}: {_line(error)}") from error
    size = getattr(module, "default_cfg", {}).get("input_size")
    example = None if size is None else (parse_input("x".join(map(str, (2, *size)))),)
    return Source(module, example)


def _from_factory(module_name: str, attribute: str) -> Source:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    spec = f"{module_name}:{attribute}"
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except Exception as error:  # importing runs the user's own code
        raise InputError(f"{spec} cannot be imported: {_line(error)}") from error
    if not isinstance(value, torch.nn.Module) and callable(value):
        try:
            value = value()
        except Exception as error:  # the user's own code may raise anything
            raise InputError(f"{spec}() raised {type(error).__name__}: {_line(error)}") from error
    if not isinstance(value, torch.nn.Module):
        raise InputError(f"{spec} gives a {type(value).__name__}, not a torch.nn.Module")
    return Source(value)


def _from_saved(path: Path) -> Source:
    if path.suffix in (".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors"):
        raise InputError(
            f"{path} holds weights, not a model; name the model and give the file with --weights"
        )
    from fxfib.serialize import load

    return Source(load(path))


def _from_pt2(path: Path) -> Source:
    """Load an exported program.

    The pickled parts of the archive are read as tensors only; archives with custom objects or
    compiled libraries are refused.  torch still parses the graph's text, so a `.pt2` file deserves
    the trust that torch's own documentation asks for.
    """
    _check_pt2(path)
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # torch logs a traceback before it raises its own error
    try:
        with _weights_only(), warnings.catch_warnings():
            # torch 2.11 maps weights from a read-only buffer; nothing here writes to them.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            program = torch.export.load(path)
            module = program.module()
    except Exception as error:  # torch raises all kinds for a damaged archive
        raise LoadError(f"{path} is not a readable .pt2 archive: {_line(error)}") from error
    finally:
        log.setLevel(level)
    args, kwargs = program.example_inputs or (None, None)
    return Source(module, args, kwargs or None)


def _check_pt2(path: Path) -> None:
    known = re.compile(
        r"[^/]+/(archive_format|archive_version|byteorder|version|\.format_version|"
        r"\.storage_alignment|\.data/.*|models/[^/]+\.json|extra/.*|"
        r"data/(weights|constants|sample_inputs)/[^/]+)"
    )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unknown = [name for name in names if not known.fullmatch(name)]
            for name in names:
                if name.endswith("_constants_config.json"):
                    entries = json.loads(archive.read(name))["config"].values()
                    unknown += [
                        entry["path_name"]
                        for entry in entries
                        if not entry["path_name"].startswith("tensor_")
                    ]
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is not a readable .pt2 archive: {_line(error)}") from error
    if unknown or len(set(names)) != len(names):
        what = ", ".join(unknown[:3]) or "one name twice"
        raise LoadError(
            f"{path} holds more than a graph and tensors ({what}), "
            "which fxfib does not load; export it again without custom objects or compiled parts"
        )


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every `torch.load` inside read tensors only, whatever its caller asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _import_optional(module: str, package: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{package} is not installed ({remedy})") from error


def _line(error: BaseException) -> str:
    """The first non-empty line of an error's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
