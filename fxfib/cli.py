"""The command line: `fxfib compile | color | export | bench | report`.

Results go to standard output, everything else to standard error.  Exit codes: 0 done, 1 refused or
failed, 2 a wrong command line, 130 interrupted.  An error is one line.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import fxfib
from fxfib.errors import ExportError, FxfibError, InputError, LoadError

if TYPE_CHECKING:
    from fxfib.modules import FibrationModule
    from fxfib.sources import Source

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# Those of `fxfib.passes.cover`, which needs torch: seconds that --help does not have.
_SYMMETRIES = ("fiber", "opfiber", "cover", "stable")
_PAGES = (".html", ".htm")
_MODEL_HELP = (
    "torchvision:NAME, timm:NAME, package.module:factory, a .pt2 file, or a saved fxfib file"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except InputError as error:
        return _complain(error, USAGE)
    except (FxfibError, OSError) as error:
        return _complain(error, FAILED)
    except Exception as error:
        if options.debug:
            raise
        kind = type(error).__name__
        return _complain(f"unexpected {kind}: {error} (--debug shows where)", FAILED)
    return DONE


def _complain(error: object, code: int) -> int:
    print(f"fxfib: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _note(text: str) -> None:
    print(f"fxfib: {text}", file=sys.stderr)


def _compile(options: argparse.Namespace) -> None:
    if options.curve and not (options.report and Path(options.report).suffix in _PAGES):
        raise InputError("--curve is shown in a page: add --report FILE.html.")
    _check_writable(options.output, options.onnx, options.report)
    source = _load(options)
    args, kwargs = source.inputs(options.input)
    small = fxfib.compile(
        source.module,
        options.eps,
        args,
        kwargs,
        criterion=options.criterion,
        round_to=options.round_to,
        residual=options.residual,
        skip=tuple(options.skip),
        verify=options.verify,
        progress=options.progress,
    )
    small = cast("FibrationModule", small)  # inputs were given
    report = small.fibration
    if options.output:
        fxfib.save(small, options.output)
        _note(f"wrote {options.output}")
    if options.onnx:
        _export_onnx(small, options.onnx, args, kwargs, options.opset)
    if options.report:
        curve: tuple[fxfib.CurvePoint, ...] = ()
        if options.curve:
            curve = fxfib.eps_curve(
                source.module, args, kwargs, criterion=options.criterion,
                round_to=options.round_to, residual=options.residual, skip=tuple(options.skip),
                progress=options.progress,
            )  # fmt: skip
        _write_report(report, Path(options.report), curve)
        _note(f"wrote {options.report}")
    print(report.to_json() if options.json else report)


def _color(options: argparse.Namespace) -> None:
    _check_writable(options.html)
    source = _load(options)
    args, kwargs = source.inputs(options.input)
    coloring = fxfib.color(
        source.module,
        args,
        options.eps,
        options.symmetry,
        opfiber_eps=options.opfiber_eps,
        example_kwargs=kwargs or None,
    )
    if options.html:
        # What a monitor sees before any training.
        look = fxfib.Monitor(
            source.module,
            args,
            options.eps,
            opfiber_eps=options.opfiber_eps,
            criterion="fibration",
            example_kwargs=kwargs or None,
        )
        look.to_html(options.html)
        _note(f"wrote {options.html}")
    print(json.dumps(coloring.to_dict(), indent=2) if options.json else coloring)


def _export(options: argparse.Namespace) -> None:
    _check_writable(options.output)
    source = _load(options)
    args, kwargs = source.inputs(options.input)
    report = _export_onnx(source.module, options.output, args, kwargs, options.opset)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)


def _bench(options: argparse.Namespace) -> None:
    _check_writable(options.csv, options.plot, options.html)
    source = _load(options)
    args, kwargs = source.inputs(options.input)
    if options.against:
        small: Any = fxfib.load(options.against)
    else:
        small = fxfib.compile(
            source.module, options.eps, args, kwargs, round_to=options.round_to,
            progress=options.progress,
        )  # fmt: skip
    result = fxfib.benchmark(
        source.module,
        small,
        args,
        kwargs,
        batch_sizes=options.batch,
        runtimes=options.runtime or ("torch", "torch.compile", "onnxruntime"),
        rounds=options.rounds,
        threads=options.threads,
        progress=options.progress,
    )
    if options.csv:
        result.to_csv(options.csv)
        _note(f"wrote {options.csv}")
    if options.plot:
        result.plot().savefig(options.plot)
        _note(f"wrote {options.plot}")
    if options.html:
        if small.fibration is None:
            raise LoadError(f"{options.against} carries no report")
        small.fibration.to_html(options.html, result)
        _note(f"wrote {options.html}")
    print(result.to_json() if options.json else result)


def _report(options: argparse.Namespace) -> None:
    path = Path(options.file)
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        try:
            report = fxfib.Report.from_dict(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadError(f"{path} is not a report that fxfib wrote") from error
    else:
        report = fxfib.load(path).fibration
        if report is None:
            raise LoadError(f"{path} carries no report")
    if options.html:
        _check_writable(options.html)
        report.to_html(options.html)
        _note(f"wrote {options.html}")
    print(report.to_json() if options.json else report)


def _write_report(
    report: "fxfib.Report", path: Path, curve: "Sequence[fxfib.CurvePoint]" = ()
) -> None:
    if path.suffix in _PAGES:
        report.to_html(path, curve=curve)
    else:
        text = report.to_json() if path.suffix == ".json" else str(report)
        _write_text(path, text + "\n")


def _load(options: argparse.Namespace) -> "Source":
    # Imported here: torch takes seconds, and --help or a misspelt option needs none of it.
    from fxfib.sources import load_model

    source = load_model(options.model, options.weights)
    for note in source.notes:
        _note(note)
    return source


def _export_onnx(
    module: Any, path: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None, opset: int | None
) -> Any:
    extra: dict[str, Any] = {} if opset is None else {"opset": opset}
    if kwargs:
        extra["example_kwargs"] = kwargs
    report = fxfib.export_onnx(module, path, args, **extra)
    _note(f"wrote {path}")
    return report


def _check_writable(*paths: str | None) -> None:
    """Refuse output paths that cannot be written, before any work is done for them."""
    given = [Path(path) for path in paths if path]
    if len({path.absolute() for path in given}) != len(given):
        raise InputError("two outputs have the same path")
    for path in given:
        if path.is_dir():
            raise ExportError(f"{path} is a folder, not a file to write")
        probe = _beside(path)
        try:
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            raise ExportError(f"{path} cannot be written: {error.strerror}") from error


def _write_text(path: Path, text: str) -> None:
    temporary = _beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A temporary file of this process on the same file system, so that renaming is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage text."""
        _complain(f"{message} (see {self.prog} --help)", USAGE)
        sys.exit(USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fxfib",
        description="Find the fibers of a trained PyTorch model and merge each into one unit.",
    )
    parser.add_argument("--version", action="version", version=f"fxfib {fxfib.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    compile_ = _command(commands, "compile", _compile, "merge fibers and write the smaller model")
    _model_options(compile_)
    compile_.add_argument(
        "--eps", type=_eps, default=0.0, help="fiber precision; 0 (default) is exact"
    )
    compile_.add_argument("--criterion", default="fibration", help="what eps measures")
    compile_.add_argument(
        "--round-to", type=_positive, metavar="N", help="keep widths at multiples of N"
    )
    compile_.add_argument(
        "--residual",
        choices=("joint", "index", "auto"),
        default="joint",
        help="how values that are added are stored",
    )
    compile_.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="module to leave as it is (repeatable)",
    )
    compile_.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not compare the outputs"
    )
    compile_.add_argument("--output", metavar="FILE", help="save the result (fxfib.load reads it)")
    compile_.add_argument("--onnx", metavar="FILE", help="export the result to ONNX as well")
    compile_.add_argument("--opset", type=_positive, metavar="N", help="ONNX opset")
    compile_.add_argument(
        "--report",
        metavar="FILE",
        help="write the report: a page if it ends in .html, JSON in .json, text otherwise",
    )
    compile_.add_argument(
        "--curve",
        action="store_true",
        help="compile at several eps and show sizes and errors (in a report that is a page)",
    )
    compile_.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bars; by default where standard error is a terminal",
    )

    color = _command(commands, "color", _color, "only say which channels agree")
    _model_options(color)
    color.add_argument(
        "--eps", type=_eps, default=0.0, help="fiber precision; 0 (default) is exact"
    )
    color.add_argument("--symmetry", choices=_SYMMETRIES, default="fiber")
    color.add_argument(
        "--opfiber-eps", type=_eps, help="precision of the opfibers; by default that of the fibers"
    )
    color.add_argument(
        "--html",
        metavar="FILE",
        help="also write a page: the graph colored by fiber, opfiber and cover",
    )

    export = _command(commands, "export", _export, "write a model as ONNX, checked in ONNX Runtime")
    _model_options(export)
    export.add_argument("--output", metavar="FILE", required=True, help="the .onnx file")
    export.add_argument("--opset", type=_positive, metavar="N", help="ONNX opset")

    bench = _command(commands, "bench", _bench, "latency of a model and its compiled version")
    _model_options(bench)
    bench.add_argument("--against", metavar="FILE", help="a saved fxfib file; else compile now")
    bench.add_argument(
        "--eps", type=_eps, default=0.0, help="fiber precision; 0 (default) is exact"
    )
    bench.add_argument("--round-to", type=_positive, metavar="N", help="as for compile")
    bench.add_argument("--batch", type=_positive, nargs="+", metavar="N", help="batch sizes")
    bench.add_argument(
        "--runtime",
        action="append",
        choices=("torch", "torch.compile", "onnxruntime"),
        help="what to measure (repeatable); by default all",
    )
    bench.add_argument("--rounds", type=_positive, default=30, help="measurements of each")
    bench.add_argument("--threads", type=_positive, help="by default as many as torch uses")
    bench.add_argument("--csv", metavar="FILE", help="write one line for each measurement")
    bench.add_argument("--plot", metavar="FILE", help="write a picture (needs matplotlib)")
    bench.add_argument("--html", metavar="FILE", help="write the report with the latency in it")
    bench.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress bars; by default where standard error is a terminal",
    )

    report = _command(commands, "report", _report, "print the report of a compiled model")
    report.add_argument("file", help="a saved fxfib file or a report in JSON")
    report.add_argument("--html", metavar="FILE", help="write it as a page, one file")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of unexpected errors"
    )
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=_MODEL_HELP)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="safetensors, a weights_only checkpoint, or 'pretrained' for torchvision's own",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="example input, [dtype:]2x3x224x224[:bound]; repeatable; integers lie below the bound",
    )


def _eps(text: str) -> float:
    try:
        eps = float(text)
    except ValueError:
        eps = math.nan
    if not (0 <= eps < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0")
    return eps


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
