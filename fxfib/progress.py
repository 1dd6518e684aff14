"""What long work shows while it runs."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

MEASURED = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
UNKNOWN = "{desc} [{elapsed}]"


class Progress:
    """A bar on standard error: what is done now and, where that is known, how long it still takes.

    Args:
        title: what it is all about.
        shown: whether it is shown; None: only on a terminal.
    """

    def __init__(self, title: str, shown: bool | None) -> None:
        self.whole = self.title = title
        self.name: str | None = None
        self.bar = tqdm(
            total=1.0,
            disable=None if shown is None else not shown,
            leave=False,
            miniters=0,
            bar_format=UNKNOWN,
            desc=title,
        )

    def __call__(self, name: str, share: float | None = None) -> None:
        """Tell what is done now, and which share of it is done."""
        if self.bar.disable:
            return
        if name != self.name:
            self.name = name
            self.bar.bar_format = UNKNOWN if share is None else MEASURED
            self.bar.reset(total=1.0)
            self.bar.set_description_str(f"{self.title}: {name}")
        if share is not None:
            self.bar.bar_format = MEASURED
            self.bar.update(min(share, 1.0) - self.bar.n)

    def part(self, name: str) -> None:
        """Tell which part of the work begins; its steps are shown behind it."""
        self.title, self.name = f"{self.whole}, {name}", None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
