"""The package as it is installed: names, version, and what the wheel holds."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import fxfib


def run_python(code: str, folder: Path) -> str:
    """Run code in a fresh interpreter, away from the checkout; warnings are errors there too."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def python_files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel_names(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from a copy of the sources, without network or isolation."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for name in ("fxfib", "passes", "kernels"):
        shutil.copytree(
            repository / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    target = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(target)!r})"
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_version_is_the_installed_one() -> None:
    assert fxfib.__version__ == importlib.metadata.version("fxfib")


def test_every_public_name_loads() -> None:
    for name in fxfib.__all__:
        assert getattr(fxfib, name) is not None
    assert set(fxfib.__all__) <= set(dir(fxfib))
    for name in ("compile", "color", "lift", "export_onnx", "save", "load"):
        assert callable(getattr(fxfib, name)), name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        _ = fxfib.shrink


def test_import_does_not_load_torch(tmp_path: Path) -> None:
    output = run_python("import sys, fxfib, fxfib.cli; print('torch' in sys.modules)", tmp_path)
    assert output.strip() == "False"


@pytest.mark.parametrize("name", ["compile", "color", "lift", "export_onnx", "save", "load"])
def test_public_functions_are_functions_in_any_import_order(name: str, tmp_path: Path) -> None:
    home = fxfib._HOME[name]
    code = f"import {home}, fxfib; assert callable(fxfib.{name}), type(fxfib.{name})"
    run_python(code, tmp_path)


def test_typed(repository: Path) -> None:
    assert (Path(fxfib.__file__).parent / "py.typed").is_file()


def test_passes_and_kernels_are_sub_packages_only(tmp_path: Path) -> None:
    code = (
        "import importlib.util, fxfib.passes.rules, fxfib.kernels\n"
        "print([name for name in ('passes', 'kernels') if importlib.util.find_spec(name)])"
    )
    assert run_python(code, tmp_path).strip() == "[]"


def test_wheel_holds_every_module_and_nothing_else(wheel_names: set[str], repository: Path) -> None:
    expected = {f"fxfib/{name}" for name in python_files(repository / "fxfib")}
    expected |= {f"fxfib/passes/{name}" for name in python_files(repository / "passes")}
    expected |= {f"fxfib/kernels/{name}" for name in python_files(repository / "kernels")}
    expected |= {f"fxfib/html/{file.name}" for file in (repository / "fxfib" / "html").iterdir()}
    expected.add("fxfib/py.typed")
    packaged = {name for name in wheel_names if ".dist-info/" not in name}
    assert packaged == expected


def test_declared_ranges(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "torch>=2.11" in project["dependencies"]
    runtimes = [line for line in project["dependencies"] if line.startswith("onnxruntime")]
    assert len(runtimes) == 2


def test_exactly_one_onnxruntime_on_every_platform() -> None:
    from packaging.requirements import Requirement

    lines = [Requirement(line) for line in importlib.metadata.requires("fxfib") or []]
    runtimes = [line for line in lines if line.name.startswith("onnxruntime")]
    platforms = {
        ("linux", "x86_64"): "onnxruntime-gpu",
        ("win32", "AMD64"): "onnxruntime-gpu",
        ("linux", "aarch64"): "onnxruntime",
        ("darwin", "arm64"): "onnxruntime",
        ("win32", "ARM64"): "onnxruntime",
    }
    for (system, machine), expected in platforms.items():
        environment = {"sys_platform": system, "platform_machine": machine}
        chosen = [
            line.name for line in runtimes if line.marker and line.marker.evaluate(environment)
        ]
        assert chosen == [expected]


def test_no_public_function_has_the_name_of_a_module() -> None:
    """Importing the module would put it in the function's place."""
    folder = Path(fxfib.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")}
    functions = {name for name in fxfib.__all__ if not isinstance(getattr(fxfib, name), ModuleType)}
    assert not functions & modules
