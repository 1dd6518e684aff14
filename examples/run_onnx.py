"""Run an exported file where there is neither torch nor fxfib.

python examples/run_onnx.py model.onnx
"""

import sys

import numpy as np
import onnxruntime


def main(path: str) -> None:
    """Random inputs of the shapes that the file asks for, in two batch sizes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    for batch in (1, 3):
        feed = {}
        for entry in session.get_inputs():
            shape = [size if isinstance(size, int) else batch for size in entry.shape]
            feed[entry.name] = generator.standard_normal(shape).astype(np.float32)
        outputs = session.run(None, feed)
        print(f"batch {batch}: {[output.shape for output in outputs]}")
    assert "torch" not in sys.modules and "fxfib" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1])
