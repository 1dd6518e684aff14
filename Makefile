# Everything below needs only Python (>= 3.11) with pip and make: the first run creates the
# environment, later runs find it.  PYTHON picks another interpreter, ARGS goes to pytest.
PYTHON ?= python3
ARGS   ?=
JOBS   ?= 2

ROOT := $(CURDIR)
UV   := .bootstrap/bin/uv
BIN  := .venv/bin

ifdef FXFIB_DATA
export FXFIB_DATA := $(abspath $(FXFIB_DATA))
endif

# One thread a worker: two workers with a thread pool each fight over the cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
TESTS  := $(PYTEST) $(BIN)/pytest -n $(JOBS) -q

.PHONY: help demo test test-old wheel-test bench bench-plot docs lint format typecheck clean

help:
	@echo "make demo        train, compile, export, check; writes demo-output/"
	@echo "make test        the whole test suite"
	@echo "make test-old    the test suite on the oldest supported torch"
	@echo "make wheel-test  build the wheel, install it alone, test it from another folder"
	@echo "make bench       the coloring beside other tools (about two hours, resumable); ARGS=--quick, ARGS='--device cuda'"
	@echo "make bench-plot  pictures of what was measured"
	@echo "make docs        the API reference, in build/docs"
	@echo "make lint        ruff and mypy;  make format  rewrites"
	@echo "make clean       removes environments and build output"

demo: .venv/.stamp
	$(BIN)/python bench/demo.py

test: .venv/.stamp
	$(TESTS) $(ARGS)

bench: .venv/.bench
	$(BIN)/python bench/coloring.py $(ARGS)

bench-plot: .venv/.bench
	$(BIN)/python bench/plot.py $(ARGS)

# What is compared and drawn; tests need none of it beyond what they have.
.venv/.bench: .venv/.stamp
	$(UV) pip install --quiet --python $(BIN)/python --editable '.[dev,bench]'
	@touch $@

# The API reference, from the docstrings: build/docs/fxfib.html.
docs: .venv/.stamp
	$(UV) pip install --quiet --python $(BIN)/python --editable '.[dev,docs]'
	$(BIN)/pdoc --docformat google --output-directory build/docs fxfib fxfib.passes fxfib.kernels

lint: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck

format: .venv/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not follow import hooks, so it is shown the installed layout, made of links.
typecheck: .venv/.stamp
	@rm -rf .typecheck && mkdir -p .typecheck/fxfib
	@ln -s $(ROOT)/fxfib/* $(ROOT)/passes $(ROOT)/kernels .typecheck/fxfib/
	cd .typecheck && $(ROOT)/$(BIN)/mypy --config-file $(ROOT)/pyproject.toml \
	  --cache-dir $(ROOT)/.mypy_cache -p fxfib

# From an empty folder, without `python -m`: nothing of the checkout but the tests is on sys.path.
wheel-test: .venv/.stamp
	rm -rf build dist .venv-wheel && mkdir -p dist/elsewhere
	$(UV) build --quiet --wheel --out-dir dist .
	$(UV) venv --quiet --python $(BIN)/python .venv-wheel
	$(UV) pip install --quiet --python .venv-wheel/bin/python "fxfib[dev] @ file://$$(ls $(ROOT)/dist/fxfib-*.whl)"
	cd dist/elsewhere && $(PYTEST) $(ROOT)/.venv-wheel/bin/pytest -n $(JOBS) -q \
	  -c $(ROOT)/pyproject.toml --rootdir $(ROOT) $(ROOT)/tests $(ARGS)

test-old: .venv-old/.stamp
	$(PYTEST) .venv-old/bin/pytest -n $(JOBS) -q $(ARGS)

# uv comes from pip into a folder of its own: this needs neither ensurepip nor rights on the system.
$(UV):
	$(PYTHON) -m pip install --quiet --root-user-action=ignore --disable-pip-version-check --target .bootstrap uv

.venv/.stamp: pyproject.toml setup.py | $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	$(UV) pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $@

.venv-old/.stamp: pyproject.toml setup.py | $(UV)
	test -x .venv-old/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv-old
	$(UV) pip install --quiet --python .venv-old/bin/python --editable '.[dev]' \
	  'torch==2.11.*' 'torchvision==0.26.*'
	@touch $@

clean:
	rm -rf .venv .venv-old .venv-wheel .bootstrap .typecheck build dist demo-output *.egg-info
