"""Lists the packages; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

# The folder each package lives in; must agree with `package-dir` in pyproject.toml.
FOLDERS = {"fxfib": "fxfib", "fxfib.passes": "passes", "fxfib.kernels": "kernels"}

setup(
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))
    ]
)
