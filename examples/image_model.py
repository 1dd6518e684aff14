"""Compile an image model and deploy it in ONNX Runtime, in float32 and float16.

python examples/image_model.py [FOLDER]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import fxfib


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.second = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Add what the block computes to its input."""
        return value + self.second(self.norm(self.first(value)).relu())


class Classifier(nn.Module):
    """A small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(12), Block(12))
        self.head = nn.Linear(12, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of ten classes for images [batch, 3, height, width]."""
        return self.head(self.blocks(self.stem(images).relu()).mean((2, 3)))


def bound_run(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """One run whose input and output stay where they are: what a server does in every call."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("images", onnxruntime.OrtValue.ortvalue_from_numpy(images))
    binding.bind_output("output")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[0].numpy()


def main(folder: Path) -> None:
    """Compile, export, run."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    # Your trained model comes here.  This one is made wider first, so that it has fibers.
    trained = Classifier().eval()
    model = fxfib.lift(trained, 1.5, (images,))

    small = fxfib.compile(model, 0.0, (images,))
    print(small.fibration)
    small.fibration.to_html(folder / "report.html")

    # The batch size stays free; the file is compared with torch before it gets its name.
    print(fxfib.export_onnx(small, folder / "float32.onnx", (images,)))
    half = small.half()
    print(fxfib.export_onnx(half, folder / "float16.onnx", (images.half(),)))

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    for name, dtype, allowed in (("float32", np.float32, 1e-4), ("float16", np.float16, 2e-2)):
        # By name: the GPU build lists CUDA on machines that have none.
        session = onnxruntime.InferenceSession(
            str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        for batch in (1, 5):
            given = torch.randn(batch, 3, 32, 32)
            with torch.no_grad():
                expected = trained(given).numpy()
            found = bound_run(session, given.numpy().astype(dtype))
            error = float(np.abs(found - expected).max() / np.abs(expected).max())
            print(f"{name}, batch {batch}: {error:.1e} from the trained model")
            assert error < allowed

    script = Path(__file__).with_name("run_onnx.py")
    subprocess.run([sys.executable, str(script), str(folder / "float32.onnx")], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
