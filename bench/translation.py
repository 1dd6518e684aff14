"""A transformer trained on Multi30k (German to English), compiled at several eps.

    FXFIB_DATA=folder python bench/translation.py --seconds 420   # train for a while; goes on later
    FXFIB_DATA=folder python bench/translation.py                 # to the end, then measure

The network and its vocabulary are kept in ``$XDG_CACHE_HOME/fxfib/translation``.  For every eps the
loss and BLEU of the validation and test sentences, parameters and MACs go to
bench/results/translation.csv; rows that are there are not made again.  No test sentence chooses
anything.  ONNX Runtime runs every file at two sizes (batch and both lengths) that it was not
exported with.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from multi30k import Missing, Vocabulary, bleu, sentences
from tables import read, write
from torch import Tensor, nn
from tqdm import tqdm
from translator import (
    Pair,
    Schedule,
    Translator,
    cache_folder,
    loss_of,
    padded,
    pairs_of,
    train,
    translate,
    vocabulary_of,
)

import fxfib

RESULTS = Path(__file__).resolve().parent / "results" / "translation.csv"
SHAPES = {name: {1: torch.export.Dim.AUTO} for name in ("source", "target")}
EPS = ("trained", "0", "0.1", "0.15", "0.2", "0.225", "0.25", "0.3")
COLUMNS = (
    "eps", "parameters", "macs", "loss_val", "bleu_val", "loss_test", "bleu_test", "merged",
    "error_float32", "error_float64", "error_onnx", "onnx_sizes", "capture_s", "compile_s",
    "vocabulary", "width", "layers", "hidden", "epochs", "machine", "torch", "fxfib",
)  # fmt: skip
PIECES = 4000


def trained(schedule: Schedule, seconds: float) -> tuple[Translator, Vocabulary] | None:
    """The network and its vocabulary; None while there is more to train."""
    folder = cache_folder()
    vocabulary = vocabulary_of(folder, PIECES)
    torch.manual_seed(0)
    model = Translator(len(vocabulary))
    path = folder / "translator.pt"
    done = train(model, pairs_of(vocabulary, "train"), path, schedule, seconds)
    return (model.eval(), vocabulary) if done else None


def examples(pairs: Sequence[Pair], count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Source and target numbers of a few sentences; the target without its last piece."""
    some = pairs[first : first + count]
    return padded([source for source, _ in some]), padded([target[:-1] for _, target in some])


def check_onnx(small: nn.Module, pairs: Sequence[Pair], path: Path) -> tuple[float, str]:
    """Largest difference of ONNX Runtime from torch, at sizes other than the exported."""
    import onnxruntime

    fxfib.export_onnx(small, path, examples(pairs, 3), dynamic_shapes=SHAPES)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst, sizes = 0.0, []
    for count, first in ((5, 10), (2, 40)):
        inputs = examples(pairs, count, first)
        with torch.no_grad():
            expected = small(*inputs)
        names = [value.name for value in session.get_inputs()]
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        found = torch.from_numpy(session.run(None, feeds)[0])
        worst = max(worst, float((found - expected).abs().max()))
        sizes.append("x".join(str(n) for n in (count, inputs[0].shape[1], inputs[1].shape[1])))
    return worst, " ".join(sizes)


def measure(eps: str, model: Translator, vocabulary: Vocabulary, epochs: int) -> dict[str, Any]:
    """One row."""
    splits = {"val": "val", "test": "test_2016_flickr"}
    coded = {name: pairs_of(vocabulary, split) for name, split in splits.items()}
    row: dict[str, Any] = {
        "eps": eps, "vocabulary": len(vocabulary), "width": model.embed.embedding_dim,
        "layers": len(model.encoder.layers), "hidden": model.encoder.layers[0].linear1.out_features,
        "epochs": epochs, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "fxfib": fxfib.__version__,
    }  # fmt: skip
    small: nn.Module = model
    if eps != "trained":
        small = fxfib.compile(model, float(eps), examples(coded["val"], 4), dynamic_shapes=SHAPES)
        report = small.fibration
        row |= {
            "macs": report.macs_after,
            "merged": sum(group.merged for group in report.groups),
            "error_float32": report.relative_error,
            "error_float64": report.exact_error,
            "capture_s": round(report.seconds["capture"], 2),
            "compile_s": round(report.seconds["compile"], 2),
        }
        row["error_onnx"], row["onnx_sizes"] = check_onnx(
            small, coded["val"], cache_folder() / f"translator-{eps}.onnx"
        )
    row["parameters"] = sum(p.numel() for p in small.parameters())
    for name, pairs in coded.items():
        row[f"loss_{name}"] = f"{loss_of(small, pairs):.4f}"
        texts = [vocabulary.decode(r) for r in translate(small, [source for source, _ in pairs])]
        row[f"bleu_{name}"] = f"{bleu(texts, sentences(splits[name])[1]):.2f}"
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1e9, help="train for about so long")
    parser.add_argument("--epochs", type=int, default=Schedule.epochs)
    parser.add_argument("--eps", nargs="+", default=EPS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        made = trained(Schedule(epochs=options.epochs), options.seconds)
    except Missing as error:
        print(error, file=sys.stderr)
        return 1
    if made is None:
        print("there is more to train: run it again")
        return 0
    done = {row["eps"]: row for row in read(options.output)}
    for eps in tqdm([e for e in options.eps if e not in done], desc="eps", disable=None):
        if time.monotonic() - start > options.seconds:
            print("there is more to measure: run it again")
            break
        done[eps] = {"eps": eps} | measure(eps, *made, options.epochs)
        order = [key for key in (*EPS, *sorted(set(done) - {*EPS})) if key in done]
        write(options.output, [done[key] for key in order], COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
