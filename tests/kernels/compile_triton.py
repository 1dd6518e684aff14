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
TILE_POINTERS = {
    **dict.fromkeys(("wide", "reach", "slack", "relative"), "*fp32"),
    **dict.fromkeys(("groups", "near", "sure", "found"), "*i32"),
    **dict.fromkeys(("matrices", "tiles"), "*i64"),
}


def cases():
    """(name, the tuned kernel, {argument: type}, {compile-time argument: value})."""
    collapse = importlib.import_module("fxfib.kernels.collapse.triton")
    merge = importlib.import_module("fxfib.kernels.merge.triton")
    tiles = importlib.import_module("fxfib.kernels.coloring.triton_tiles")
    rows = importlib.import_module("fxfib.kernels.coloring.triton_rows")
    variants = (("bf16", True), ("fp64", False))
    vectors = dict.fromkeys(("order", "starts", "counts"), "*i64")
    for dtype, flag in variants:
        constants = {"SCALED": flag, "ALONG_SLICES": flag}
        pointers = vectors | {"weight": f"*{dtype}", "scale": "*fp64", "sums": "*fp64"}
        yield f"collapse {dtype}", collapse.SEGMENT_SUMS, pointers, constants
    for dtype, flag in variants:
        constants = {"WEIGHTED": flag, "ALONG_SLICES": not flag}
        pointers = vectors | {"weight": f"*{dtype}", "factors": "*fp64", "merged": f"*{dtype}"}
        yield f"merge {dtype}", merge.SEGMENT_MEANS, pointers, constants
    for dtype, flag in (("bf16", True), ("fp32", False)):
        constants = {"WIDE": flag, "RELATIVE": flag, "TILE": tiles.TILE}
        pointers = TILE_POINTERS | {"values": f"*{dtype}"}
        yield f"tiles {dtype}", tiles.CLOSE_TILES, pointers, constants
    for dtype, flag in variants:
        constants = {"ABSOLUTE": flag, "RELATIVE": flag}
        pointers = {"rows": f"*{dtype}", "absolute": f"*{dtype}", "close": "*i8"}
        pointers |= dict.fromkeys(("relative", "eps"), "*fp64")
        pointers |= dict.fromkeys(("left", "right"), "*i64")
        yield f"pairs {dtype}", rows.PAIRS_CLOSE, pointers, constants
    for dtype, flag in variants:
        pointers = {"rows": f"*{dtype}", "multipliers": "*i64", "hashes": "*i64"}
        yield f"hashes {dtype}", rows.ROW_HASHES, pointers, {"DOUBLE": not flag}


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
    first, second = (int(argument) for argument in sys.argv[1:])
    # Each kernel twice: with one dtype and its default block sizes for the first architecture, with
    # the other dtype and other block sizes for the second.
    for (name, tuned, pointers, constants), architecture in zip(
        cases(), itertools.cycle([first, second]), strict=False
    ):
        choice = tuned.choices[0]
        if architecture == second:
            choice = tuned.choices[-1]
            # Numbers that are 1 become compile-time constants, and then have no tensor's methods.
            numbers = set(tuned.kernel.arg_names) - set(pointers) - set(constants) - set(choice)
            constants = constants | dict.fromkeys(numbers, 1)
        metadata = compiled(tuned, pointers, constants, choice, architecture)
        line = {"kernel": name, "architecture": architecture, "shared": metadata.shared}
        print(json.dumps(line | {"choice": choice}), flush=True)


if __name__ == "__main__":
    main()
