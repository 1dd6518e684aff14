"""Pages in a headless browser, and names that would like to be more than names."""

import shutil
import subprocess

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page with")

HOSTILE = (
    "</script><script>document.title='taken'</script>",
    "\"'><img src=x onerror=\"document.title='taken'\">",
    "${document.title='taken'} `x` \u2028 \\u003c <!-- ]]>",
    "n" * 10_000,
)


def opened(path, theme: str = "light", more: str = "") -> tuple[str, list[str]]:
    """The page after its script has run, and what it said on the console."""
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={path.parent / 'profile'}", "--window-size=1300,1600",
            "--virtual-time-budget=2000", "--dump-dom", f"file://{path}?theme={theme}{more}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
