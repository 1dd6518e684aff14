"""The command line, run in this process unless a test is about the process itself."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fxfib
from fxfib import cli
from fxfib.errors import InputError, LoadError
from fxfib.sources import load_model, load_weights, parse_input

MODEL = "cli_model:make"
SHAPE = "5x3"

SOURCE = '''
import time
import torch
from torch import nn

def make():
    """3 -> 7 -> 2; units 1 and 4 of the hidden layer copy unit 0."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
    with torch.no_grad():
        for copy in (1, 4):
            model[0].weight[copy] = model[0].weight[0]
            model[0].bias[copy] = model[0].bias[0]
    return model

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)
    def forward(self, words):
        return self.head(self.table(words).mean(1))

class Group:
    net = staticmethod(Net)

def nan():
    model = make()
    model[2].weight.data[1, 3] = float("nan")
    return model

def slow():
    print("ready", flush=True)
    time.sleep(60)

def broken():
    raise ValueError("first line\\nsecond line")

number = 3
'''

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module of models, made the current directory."""
    (tmp_path / "cli_model.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_model", raising=False)
    return tmp_path


@pytest.fixture
def run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line; gives exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def assert_one_line_error(err: str, *words: str) -> None:
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("fxfib: error: ")
    for word in words:
        assert word in lines[0]


def leftovers(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if path.name not in ("cli_model.py", "__pycache__")
    )


# compile


def test_compile_prints_the_table_and_writes_everything(run: Run, workdir: Path) -> None:
    code, out, err = run(
        *("compile", MODEL, "--input", SHAPE, "--eps", "0", "--output", "small.fxfib"),
        *("--onnx", "small.onnx", "--report", "report.json"),
    )
    assert code == 0, err
    assert "wrote small.fxfib" in err
    assert leftovers(workdir) == ["report.json", "small.fxfib", "small.onnx"]
    report = json.loads(Path("report.json").read_text())
    assert str(fxfib.Report.from_dict(report)).strip() == out.strip()

    original = load_model(MODEL).module
    small = fxfib.load("small.fxfib")
    assert small.get_parameter("0.weight").shape == (5, 3)
    inputs = torch.randn(13, 3)
    torch.testing.assert_close(small(inputs), original(inputs))


def test_compile_json_is_the_report(run: Run) -> None:
    code, out, _ = run("compile", MODEL, "--input", SHAPE, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["parameters_before"] == 3 * 7 + 7 + 7 * 2 + 2
    assert report["parameters_after"] == 3 * 5 + 5 + 5 * 2 + 2


def test_compile_report_as_text(run: Run) -> None:
    code, out, _ = run("compile", MODEL, "--input", SHAPE, "--report", "report.txt")
    assert code == 0
    assert Path("report.txt").read_text() == out


def test_compile_skip_leaves_the_module(run: Run) -> None:
    code, out, _ = run("compile", MODEL, "--input", SHAPE, "--skip", "0", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["parameters_after"] == report["parameters_before"]


def test_compile_refuses_nan_by_name(run: Run, workdir: Path) -> None:
    code, out, err = run("compile", "cli_model:nan", "--input", SHAPE, "--output", "small.fxfib")
    assert code == 1
    assert_one_line_error(err, "2.weight")
    assert out == ""
    assert leftovers(workdir) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--eps", "-0.1"], ["--eps", "-0.1"]),
        (["--eps", "nan"], ["--eps", "nan"]),
        (["--eps", "many"], ["--eps", "many"]),
        (["--criterion", "taste"], ["taste"]),
        (["--round-to", "0"], ["--round-to"]),
        (["--opset", "x"], ["--opset"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--input", "3x"], ["3x"]),
        (["--input", "complex:3"], ["complex:3"]),
        (["--input", "float32:3:7"], ["float32:3:7", "bound"]),
        (["--output", "same", "--onnx", "./same"], ["same path"]),
    ],
)
def test_wrong_arguments(run: Run, workdir: Path, arguments: list[str], words: list[str]) -> None:
    default = [] if "--input" in arguments else ["--input", SHAPE]
    code, out, err = run("compile", MODEL, *default, *arguments)
    assert code == 2
    assert_one_line_error(err, *words)
    assert out == ""
    assert leftovers(workdir) == []


def test_input_of_the_wrong_size(run: Run, workdir: Path) -> None:
    code, out, err = run("compile", MODEL, "--input", "5x4")
    assert code == 1  # well written, but not what the model takes
    assert_one_line_error(err, "does not run on the example inputs")
    assert out == "" and leftovers(workdir) == []


def test_missing_input_shape(run: Run) -> None:
    code, _, err = run("compile", MODEL)
    assert code == 2
    assert_one_line_error(err, "--input")


@pytest.mark.parametrize("option", ["--output", "--onnx", "--report"])
@pytest.mark.parametrize("path", ["missing/file", "cli_model.py/file", "."])
def test_unwritable_path_is_found_before_the_model_is_made(
    run: Run, option: str, path: str
) -> None:
    code, _, err = run("compile", "cli_model:broken", option, path)
    assert code == 1
    assert_one_line_error(err, path)
    assert "broken" not in err


def test_no_command_is_a_usage_error(run: Run) -> None:
    code, _, err = run()
    assert code == 2
    assert_one_line_error(err, "COMMAND")


def test_unexpected_errors_are_one_line_and_debug_shows_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a\nb")

    monkeypatch.setattr(fxfib, "compile", fail, raising=False)
    code, _, err = run("compile", MODEL, "--input", SHAPE)
    assert code == 1
    assert_one_line_error(err, "RuntimeError", "a b", "--debug")
    with pytest.raises(RuntimeError):
        run("compile", MODEL, "--input", SHAPE, "--debug")


def test_failing_export_leaves_no_partial_file(
    run: Run, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run("compile", MODEL, "--input", SHAPE, "--report", "report.json")
    assert code == 1
    assert_one_line_error(err, "report.json", "No space left")
    assert leftovers(workdir) == []


# color, export, report


def test_color(run: Run) -> None:
    code, out, _ = run("color", MODEL, "--input", SHAPE)
    assert code == 0
    assert out.strip()
    code, out, _ = run("color", MODEL, "--input", SHAPE, "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_color_writes_a_page_of_all_symmetries(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "covers.html"
    args = ("color", MODEL, "--input", SHAPE, "--symmetry", "cover", "--html", str(page))
    code, out, err = run(*args)
    assert code == 0 and "covers at eps 0" in out and str(page) in err
    text = page.read_text(encoding="utf-8")
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert set(data["frames"]) == {"fiber", "opfiber", "cover"} and data["steps"] == [0]
    code, _, err = run(*args[:-1], str(tmp_path / "missing" / "covers.html"))
    assert code != 0
    assert_one_line_error(err, "missing")


def test_color_knows_three_symmetries_only(run: Run) -> None:
    code, _, err = run("color", MODEL, "--input", SHAPE, "--symmetry", "mirror")
    assert code == 2
    assert_one_line_error(err, "mirror")


def test_export_runs_in_onnx_runtime(run: Run) -> None:
    import onnxruntime

    code, out, _ = run("export", MODEL, "--input", SHAPE, "--output", "m.onnx", "--opset", "18")
    assert code == 0
    assert out.strip()
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    inputs = torch.randn(4, 3)
    (result,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    expected = load_model(MODEL).module(inputs).detach()
    torch.testing.assert_close(torch.from_numpy(result), expected)


def test_report_prints_what_compile_printed(run: Run) -> None:
    _, printed, _ = run(
        *("compile", MODEL, "--input", SHAPE, "--output", "s.fxfib", "--report", "r.json")
    )
    for file in ("s.fxfib", "r.json"):
        code, out, err = run("report", file)
        assert (code, err) == (0, "")
        assert out == printed
    code, out, _ = run("report", "s.fxfib", "--json")
    assert json.loads(out) == json.loads(Path("r.json").read_text())


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "{"])
@pytest.mark.parametrize("name", ["bad.json", "bad.fxfib"])
def test_report_of_something_else(run: Run, name: str, content: str) -> None:
    Path(name).write_text(content)
    code, _, err = run("report", name)
    assert code == 1
    assert_one_line_error(err, name)


def test_report_of_a_missing_file(run: Run) -> None:
    for name in ("missing.json", "missing.fxfib"):
        code, _, err = run("report", name)
        assert code == 1
        assert_one_line_error(err, name)


# models


def test_saved_model_is_a_model(run: Run) -> None:
    assert run("compile", MODEL, "--input", SHAPE, "--output", "small.fxfib")[0] == 0
    code, out, err = run("compile", "small.fxfib", "--input", SHAPE, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["parameters_after"] == report["parameters_before"]


def test_pt2_brings_its_own_inputs(run: Run) -> None:
    model = load_model(MODEL).module
    inputs = torch.randn(5, 3)
    torch.export.save(torch.export.export(model, (inputs,)), "model.pt2")
    source = load_model("model.pt2")
    args, kwargs = source.inputs([])
    torch.testing.assert_close(args[0], inputs)
    torch.testing.assert_close(source.module(*args, **(kwargs or {})), model(inputs))
    code, out, err = run("compile", "model.pt2", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters_after"] == 3 * 5 + 5 + 5 * 2 + 2


class Touch:
    """Pickles to a call that creates a file: what a malicious checkpoint would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def rewrite_zip(path: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_pt2_runs_no_pickled_code(workdir: Path) -> None:
    model = load_model(MODEL).module
    path = workdir / "model.pt2"
    victim = workdir / "victim"

    def poison_inputs(members: dict[str, bytes]) -> None:
        torch.save(Touch(victim), "poison")
        members["model/data/sample_inputs/model.pt"] = Path("poison").read_bytes()

    def poison_constants(members: dict[str, bytes]) -> None:
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
        config = {"config": {"thing": {**entry, "tensor_meta": None}}}
        members["model/data/constants/model_constants_config.json"] = json.dumps(config).encode()
        members["model/data/constants/opaque_obj_0"] = b"cos\nsystem\n(S'true'\ntR."

    def add_library(members: dict[str, bytes]) -> None:
        members["model/data/aotinductor/model/model.wrapper.so"] = b"ELF"

    for poison in (poison_inputs, poison_constants, add_library):
        torch.export.save(torch.export.export(model, (torch.randn(5, 3),)), path)
        rewrite_zip(path, poison)
        with pytest.raises(LoadError):
            load_model(str(path))
        assert not victim.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_damaged_pt2(run: Run) -> None:
    Path("bad.pt2").write_bytes(b"not an archive")
    code, _, err = run("color", "bad.pt2")
    assert code == 1
    assert_one_line_error(err, "bad.pt2")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet50", ["resnet50", "torchvision:NAME"]),
        ("missing.pt2", ["missing.pt2", "not a file"]),
        ("torchvision:resnet51", ["resnet51"]),
        ("no_such_module:make", ["no_such_module"]),
        ("cli_model:missing", ["missing"]),
        ("cli_model:number", ["int", "torch.nn.Module"]),
        ("cli_model:broken", ["cli_model:broken", "ValueError", "first line"]),
    ],
)
def test_unknown_models(run: Run, spec: str, words: list[str]) -> None:
    code, _, err = run("color", spec, "--input", SHAPE)
    assert code == 2
    assert_one_line_error(err, *words)


def test_checkpoint_given_as_model(run: Run) -> None:
    torch.save({}, "weights.pth")
    code, _, err = run("color", "weights.pth", "--input", SHAPE)
    assert code == 2
    assert_one_line_error(err, "--weights")


@pytest.mark.parametrize("spec", ["cli_model:Net", "cli_model:Group.net"])
def test_factory_may_be_a_class_or_an_attribute(workdir: Path, spec: str) -> None:
    source = load_model(spec)
    assert type(source.module).__name__ == "Net"
    assert not source.module.training
    args, _ = source.inputs(["int64:6x5:9"])
    assert source.module(*args).shape == (6, 2)


def test_torchvision_model_knows_its_image_size() -> None:
    source = load_model("torchvision:squeezenet1_1")
    assert source.example_args is not None
    assert source.example_args[0].shape == (2, 3, 224, 224)
    assert "random weights" in source.notes[0]
    assert load_model("torchvision:raft_small").example_args is None


# weights


def make_checkpoint(kind: str, state: dict[str, torch.Tensor]) -> str:
    if kind == "safetensors":
        save_file(state, "w.safetensors")
        return "w.safetensors"
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    content: object = {
        "plain": state,
        "nested": {"state_dict": state, "epoch": 7},
        "parallel": {"state_dict": prefixed},
    }[kind]
    torch.save(content, "w.pth")
    return "w.pth"


@pytest.mark.parametrize("kind", ["safetensors", "plain", "nested", "parallel"])
def test_weights_are_loaded(workdir: Path, kind: str) -> None:
    plain = load_model(MODEL).module
    state = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    module = load_model(MODEL, make_checkpoint(kind, state)).module
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("2.bias"), ["lacks", "2.bias"]),
        (lambda state: state.update(extra=torch.ones(2)), ["no place", "extra"]),
        (lambda state: state.update({"0.bias": torch.ones(3)}), ["shape", "0.bias"]),
    ],
)
def test_weights_that_do_not_fit(
    workdir: Path, change: Callable[[dict[str, torch.Tensor]], object], words: list[str]
) -> None:
    module = load_model(MODEL).module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = dict(before)
    change(state)
    with pytest.raises(InputError) as caught:
        load_weights(module, make_checkpoint("plain", state))
    assert all(word in str(caught.value) for word in words)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_weights_run_no_pickled_code(run: Run, workdir: Path) -> None:
    victim = workdir / "victim"
    torch.save({"0.weight": Touch(victim)}, "evil.pth")
    code, _, err = run("color", MODEL, "--input", SHAPE, "--weights", "evil.pth")
    assert code == 1
    assert_one_line_error(err, "evil.pth", "weights_only")
    assert not victim.exists()


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors", "missing.pth"])
def test_unreadable_weights(run: Run, name: str) -> None:
    if not name.startswith("missing"):
        Path(name).write_bytes(b"\x00\x01nonsense")
    code, _, err = run("color", MODEL, "--input", SHAPE, "--weights", name)
    assert code == 1
    assert_one_line_error(err, name)


def test_whole_module_is_not_a_checkpoint(workdir: Path) -> None:
    module = load_model(MODEL).module
    torch.save({"epoch": 3, "accuracy": 0.9}, "log.pth")
    with pytest.raises(LoadError, match="no state dict"):
        load_weights(module, "log.pth")


# inputs


def test_input_specs() -> None:
    image = parse_input("2x3x5x7")
    assert image.shape == (2, 3, 5, 7)
    assert image.dtype == torch.float32
    assert image.std() > 0.5
    assert torch.equal(image, parse_input("2x3x5x7"))
    words = parse_input("int64:4x500:30")
    assert words.dtype == torch.int64
    assert (words.min(), words.max()) == (0, 29)
    assert parse_input("bool:3x2").dtype == torch.bool
    assert parse_input("float64:scalar").shape == ()


# the process


def test_interrupt_is_130_and_leaves_no_file(workdir: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fxfib.cli", "compile", "cli_model:slow"),
            *("--input", SHAPE, "--output", "small.fxfib"),
        ],
        cwd=workdir,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell, as a test run may be, starts its children deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert err == "fxfib: error: interrupted\n"
    assert leftovers(workdir) == []


def test_entry_point_is_installed(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("fxfib")
    result = subprocess.run(
        [program, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, f"fxfib {fxfib.__version__}\n")


def test_symmetries_are_those_that_color_knows():
    from fxfib import cli
    from fxfib.passes import cover

    assert cli._SYMMETRIES == cover.SYMMETRIES
