"""Save and load: one file without code, whole or not at all."""

import collections
import copy
import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.utils._pytree as pytree
from model_zoo import CASES, Result, Tied, captured_case
from torch import Tensor, nn

from fxfib import serialize
from fxfib.capture import capture
from fxfib.errors import ExportError, LoadError
from fxfib.modules import FibrationModule, raise_modules
from fxfib.serialize import load, save


def of_case(name: str) -> FibrationModule:
    _, captured = captured_case(name)
    return raise_modules(captured.graph_module, captured)


def raised(model: nn.Module, *args: Any) -> FibrationModule:
    captured = capture(model, args)
    return raise_modules(captured.graph_module, captured)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edited(source: Path, target: Path, change: Any) -> Path:
    """A copy of a saved file with its JSON changed."""
    with safetensors.safe_open(source, framework="pt") as file:
        data = json.loads(file.metadata()["fxfib"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(data)
    safetensors.torch.save_file(tensors, target, {"fxfib": json.dumps(data)})
    return target


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    small = of_case(name)
    path = tmp_path / "small.fxfib"
    save(small, path)
    assert names(tmp_path) == ["small.fxfib"]
    found = load(path)
    assert str(found) == str(small)
    assert list(found.state_dict()) == list(small.state_dict())
    for key, tensor in small.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor)
        assert found.state_dict()[key].data_ptr() != tensor.data_ptr()
    flags = [(n, p.requires_grad) for n, p in small.named_parameters()]
    assert [(n, p.requires_grad) for n, p in found.named_parameters()] == flags
    args, kwargs = CASES[name].args(3), CASES[name].kwargs(3)
    with torch.no_grad():
        ours, theirs = found(*args, **kwargs), small(*args, **kwargs)
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for one, two in zip(*map(pytree.tree_leaves, (ours, theirs)), strict=True):
        assert torch.equal(one, two) if isinstance(two, Tensor) else one == two
    save(found, tmp_path / "again.fxfib")
    assert (tmp_path / "again.fxfib").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_odd_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scalar = nn.Parameter(torch.tensor(1.5))
            self.strided = nn.Parameter(torch.randn(5, 3).t(), requires_grad=False)
            self.register_buffer("mask", torch.tensor([True, False, True]))
            self.register_buffer("shift", torch.tensor([1, 2, 3]), persistent=False)
            self.bound = torch.tensor(float("inf"))

        def forward(self, x: Tensor) -> Tensor:
            return ((x @ self.strided.t()) * self.scalar * self.mask + self.shift).clamp(
                max=self.bound, min=float("-inf")
            )

    model = Odd().to(dtype).eval()
    model.bound = model.bound.to(dtype)
    x = torch.randn(2, 5, dtype=dtype)
    small = raised(model, x)
    save(small, tmp_path / "odd")
    found = load(tmp_path / "odd")
    # Strides are not stored, and they choose the order in which a product is summed.
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-9, atol=8 * torch.finfo(dtype).eps)
    assert set(found.state_dict()) == {"scalar", "strided", "mask"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert found.get_parameter("scalar").shape == ()
    assert not found.get_parameter("strided").requires_grad
    assert found.get_buffer("mask").dtype == torch.bool
    assert found.get_parameter("strided").dtype == dtype


def test_tied_parameters_are_stored_once(tmp_path: Path) -> None:
    small = raised(Tied().eval(), torch.randint(13, (2, 4)))
    small.get_submodule("twin").register_parameter("extra", small.get_parameter("hidden.weight"))
    save(small, tmp_path / "tied")
    with safetensors.safe_open(tmp_path / "tied", framework="pt") as file:
        assert "twin.extra" not in file.keys()  # noqa: SIM118
    found = load(tmp_path / "tied")
    assert found.get_parameter("twin.extra") is found.get_parameter("hidden.weight")


def test_training_state_and_changes_are_kept(tmp_path: Path) -> None:
    small = copy.deepcopy(of_case("convolutions")).train()
    small.get_submodule("1").eval()
    small.get_submodule("10").p = 0.125
    small(torch.randn(2, 3, 16, 16))
    save(small, tmp_path / "a")
    found = load(tmp_path / "a")
    assert {n: m.training for n, m in found.named_modules()} == {
        n: m.training for n, m in small.named_modules()
    }
    assert found.get_submodule("10").p == 0.125
    assert found.get_submodule("4").momentum is None
    assert torch.equal(found.get_buffer("4.num_batches_tracked"), torch.tensor(8))


def test_loads_in_a_new_process_without_the_class(tmp_path: Path) -> None:
    small = of_case("nested")
    save(small, tmp_path / "small.fxfib")
    inputs = (CASES["nested"].args(3), CASES["nested"].kwargs(3))
    with torch.no_grad():
        expected = small(*inputs[0], **inputs[1])
    assert type(expected["result"]) is Result
    torch.save((inputs, expected["result"].score), tmp_path / "inputs.pt")
    code = """if True:
        import sys, torch
        from fxfib.serialize import load
        small = load("small.fxfib")
        (args, kwargs), score = torch.load("inputs.pt", weights_only=True)
        with torch.no_grad():
            result = small(*args, **kwargs)["result"]
        assert torch.equal(result.score, score)
        assert result.loss is None and len(result.hidden) == 2
        assert type(result).__name__ == "Result", type(result)
        assert "model_zoo" not in sys.modules
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_local_named_tuple(tmp_path: Path) -> None:
    Pair = collections.namedtuple("Pair", ["left", "right"])

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return collections.OrderedDict(out=Pair(self.layer(x), [x * 2]))

    small = raised(Pairs().eval(), torch.randn(2, 3))
    save(small, tmp_path / "pairs")
    found = load(tmp_path / "pairs")(torch.ones(2, 3))
    assert isinstance(found, collections.OrderedDict)
    assert isinstance(found["out"], Pair)
    assert torch.equal(found["out"].right[0], torch.full((2, 3), 2.0))


def test_report_is_kept(tmp_path: Path) -> None:
    from fxfib.report import Report

    small = of_case("mlp")
    sizes = {"parameters_before": 10, "parameters_after": 5, "macs_before": 9, "macs_after": 4}
    small.fibration = Report("Sequential", 0.0, "fibration", "float32", "cpu", **sizes)
    save(small, tmp_path / "a")
    assert load(tmp_path / "a").fibration == small.fibration


# ---------------------------------------------------------------------------- writing


def test_only_compiled_modules(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"only what fxfib\.compile gives.*Linear"):
        save(nn.Linear(2, 2), tmp_path / "a")  # type: ignore[arg-type]
    assert not names(tmp_path)


def test_own_modules_need_code(tmp_path: Path) -> None:
    class Own(nn.ReLU):
        pass

    small = of_case("mlp")
    small.add_module("1", Own())
    with pytest.raises(ExportError, match="1 is a Own, which is not a module that fxfib makes"):
        save(small, tmp_path / "a")
    assert not names(tmp_path)


def test_unwritable_paths(tmp_path: Path) -> None:
    small = of_case("mlp")
    for path in (tmp_path / "missing" / "a", tmp_path):
        with pytest.raises(ExportError) as caught:
            save(small, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (OSError(28, "No space left on device"), ExportError),
        (safetensors.SafetensorError("I/O error: no space left"), ExportError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failed_save_leaves_the_old_file(
    failure: BaseException, expected: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = of_case("mlp")
    path = tmp_path / "a"
    save(small, path)
    before = path.read_bytes()

    def fail(tensors: Any, staged: Path, metadata: Any) -> None:
        Path(staged).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(serialize.safetensors.torch, "save_file", fail)
    with pytest.raises(expected):
        save(small, path)
    assert names(tmp_path) == ["a"]
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = serialize.safetensors.torch.save_file

    def onto_full(tensors: Any, staged: Path, metadata: Any) -> None:
        Path(staged).symlink_to("/dev/full")
        original(tensors, staged, metadata)
        with Path("/dev/full").open("wb") as file:
            file.write(b"0" * 10_000)

    monkeypatch.setattr(serialize.safetensors.torch, "save_file", onto_full)
    with pytest.raises(ExportError, match="cannot be written"):
        save(of_case("mlp"), tmp_path / "a")
    assert not names(tmp_path)


# ---------------------------------------------------------------------------- reading


def test_foreign_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "good"
    save(of_case("mlp"), path)
    good = path.read_bytes()
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(LoadError, match=r"was not written by fxfib\.save"):
        load(tmp_path / "foreign")
    with pytest.raises(LoadError, match="does not exist"):
        load(tmp_path / "missing")
    (length,) = struct.unpack("<Q", good[:8])
    damaged = [b"", b"PK\x03\x04", good[:5], good[: length // 2], good[:-3], good + b"x"]
    damaged.append(
        good.replace(b"aten.linear", b"aten.lineax").replace(b"call_module", b"coll_module")
    )
    for content in damaged:
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(LoadError) as caught:
            load(tmp_path / "bad")
        assert "bad" in str(caught.value) or "graph" in str(caught.value)


def set_in(path: str, value: Any) -> Any:
    def change(data: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        target: Any = data
        for part in parents:
            target = target[int(part) if isinstance(target, list) else part]
        target[int(last) if isinstance(target, list) else last] = value

    return change


INJECTION = "x'); __import__('os').system('touch hacked'); ('"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("format", 2), "newer than this fxfib"),
        (set_in("modules/1/1", "Sequential"), "damaged"),
        (set_in("modules/1/2/in_features", 5), "damaged|shape"),
        (set_in("modules/1/2/surprise", 5), "does not take"),
        (set_in("graph/nodes/0/target", INJECTION), "not an identifier"),
        (set_in("graph/nodes/1/target", INJECTION), "not a name"),
        (set_in("calling/arguments/0/name", INJECTION), "not an identifier"),
        (set_in("graph/nodes/1/kwargs", {INJECTION: 1}), "not an identifier"),
        (set_in("graph/nodes/1/op", "call_method"), "unknown kind of node"),
        (set_in("tensors", []), "missing"),
    ],
)
def test_edited_files(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(of_case("mlp"), tmp_path / "good")
    bad = edited(tmp_path / "good", tmp_path / "bad", change)
    with pytest.raises(LoadError, match=message):
        load(bad)
    assert not Path("hacked").exists()


@pytest.mark.parametrize(
    "target",
    ["aten.from_file.default", "os.system", "builtins.eval", "profiler._record_function.x"],
)
def test_forbidden_calls(target: str, tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        node = data["graph"]["nodes"][1]
        node.update(op="call_function", target=target, args=["/etc/passwd"])

    save(of_case("mlp"), tmp_path / "good")
    bad = edited(tmp_path / "good", tmp_path / "bad", change)
    with pytest.raises(LoadError, match="graph in the file is damaged"):
        load(bad)


def test_strings_stay_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, mode: str = INJECTION) -> dict[str, Tensor]:
            return {INJECTION: self.layer(x)}

    small = raised(Keys().eval(), torch.randn(2, 2), INJECTION)
    save(small, tmp_path / "a")
    found = load(tmp_path / "a")
    assert list(found(torch.randn(2, 2))) == [INJECTION]
    assert not Path("hacked").exists()


def test_modules_named_in_a_file_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    small = of_case("nested")
    save(small, tmp_path / "a")

    def rename(data: dict[str, Any]) -> None:
        text = json.dumps(data["calling"]).replace("model_zoo:Result", "evil_module:Result")
        data["calling"] = json.loads(text)

    bad = edited(tmp_path / "a", tmp_path / "b", rename)
    sys.path.insert(0, str(tmp_path))
    try:
        found = load(bad)
    finally:
        sys.path.remove(str(tmp_path))
    result = found(*CASES["nested"].args(2), **CASES["nested"].kwargs(2))["result"]
    assert dataclasses.is_dataclass(result)
    assert type(result) is not Result
