"""Compiles every Triton kernel for GPUs that are not here; prints one JSON line a kernel.

A program of its own: kernels are compiled only where triton was imported without its interpreter.
"""

import importlib
import itertools
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTEGERS = "i64"


def cases():
    """(name, the tuned kernel, {argument: type}, {compile-time argument: value})."""
    collapse = importlib.import_module("fxfib.kernels.collapse.triton")
    merge = importlib.import_module("fxfib.kernels.merge.triton")
    vectors = dict.fromkeys(("order", "starts", "counts"), "*i64")
    for dtype, flag in (("bf16", True), ("fp64", False)):
        constants = {"SCALED": flag, "ALONG_SLICES": flag}
        pointers = vectors | {"weight": f"*{dtype}", "scale": "*fp64", "sums": "*fp64"}
        yield f"collapse {dtype}", collapse.SEGMENT_SUMS, pointers, constants
        constants = {"WEIGHTED": flag, "ALONG_SLICES": not flag}
        pointers = vectors | {"weight": f"*{dtype}", "factors": "*fp64", "merged": f"*{dtype}"}
        yield f"merge {dtype}", merge.SEGMENT_MEANS, pointers, constants


def compiled(tuned, pointers, constants, choice, architecture):
    """The metadata of the kernel with these block sizes."""
    constants = constants | {name: size for name, size in choice.items() if name != "num_warps"}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, INTEGERS)
        for name in tuned.kernel.arg_names
    }
    source = ASTSource(fn=tuned.kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": choice["num_warps"], "enable_fp_fusion": False}
    result = triton.compile(source, target=target, options=options)
    assert result.asm["cubin"]
    return result.metadata


def main():
    architectures = [int(argument) for argument in sys.argv[1:]]
    for name, tuned, pointers, constants in cases():
        # The default and the largest block sizes; the others lie between.
        largest = max(tuned.choices, key=lambda choice: next(iter(choice.values())))
        choices = [tuned.choices[0]] + [largest] * (largest != tuned.choices[0])
        for architecture, choice in itertools.product(architectures, choices):
            metadata = compiled(tuned, pointers, constants, choice, architecture)
            line = {"kernel": name, "architecture": architecture, "shared": metadata.shared}
            print(json.dumps(line | {"choice": choice}), flush=True)


if __name__ == "__main__":
    main()
