"""How a Triton kernel gets its block sizes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton

from fxfib.kernels.dispatch import interprets

Grid = Callable[[Mapping[str, Any]], tuple[int, ...]]

# Trying all block sizes runs the kernel hundreds of times; below this many elements read it costs
# more than it can save.
_WORTH_TUNING = 2**26


class Tuned:
    """A Triton kernel and the block sizes that it may run with.

    On a device large inputs are tuned by `triton.autotune`, once for every value of `key`, and
    small ones take the first block sizes.  In the interpreter, where autotuning has no driver and
    every program costs milliseconds, one choice of large blocks is used.

    No result depends on the choice, except that sums over a segment never do either: blocks cut
    across segments, not along them.
    """

    def __init__(
        self,
        kernel: Any,
        choices: Sequence[Mapping[str, int]],
        interpreted: Mapping[str, int],
        key: Sequence[str],
    ) -> None:
        """`choices`: values of the kernel's block sizes, and ``num_warps``; the first is default.

        Args:
            kernel: made by `triton.jit`; it must write the same output however often it runs.
            choices: what autotuning chooses from.
            interpreted: block sizes for the interpreter.
            key: names of arguments whose values call for tuning anew.
        """
        self.kernel = kernel
        self.choices = [dict(choice) for choice in choices]
        self._interpreted = dict(interpreted)
        self._key = list(key)
        self._tuner: Any = None

    def launch(self, grid: Grid, *arguments: Any, work: int, **constants: Any) -> None:
        """Run the kernel on its grid, unless that is empty.

        Args:
            grid: number of programs for given block sizes.
            arguments: the kernel's positional arguments.
            work: roughly how many elements are read.
            constants: compile-time arguments other than block sizes.
        """
        constants["enable_fp_fusion"] = False  # products are rounded as on the CPU
        if interprets():
            self._start(grid, arguments, constants | self._interpreted)
        elif work < _WORTH_TUNING:
            self._start(grid, arguments, constants | self.choices[0])
        else:
            if self._tuner is None:
                self._tuner = triton.autotune(self._configurations(), self._key)(self.kernel)
            if all(grid(self.choices[0])):
                self._tuner[grid](*arguments, **constants)

    def _start(self, grid: Grid, arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        programs = grid(constants)
        if all(programs):
            self.kernel[programs](*arguments, **constants)

    def _configurations(self) -> list[Any]:
        result = []
        for choice in self.choices:
            blocks = {name: size for name, size in choice.items() if name != "num_warps"}
            result.append(triton.Config(blocks, num_warps=choice["num_warps"]))
        return result
