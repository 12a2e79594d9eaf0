# make demo and make test set up everything: they need Python and make, nothing else.
#   PYTHON       the interpreter that .venv is made from (python3)
#   ARGS         passed to the demo:   make demo ARGS="--quick"
#   OUTPUT       folder of the pipeline: make pipeline OUTPUT=my_output
#   PYTEST_ARGS  passed to pytest:     make test PYTEST_ARGS="-m slow tests/trainer"
#   WORKERS      pytest processes:     make test WORKERS=4
.POSIX:

PYTHON ?= python3
WORKERS ?= 2
ARGS =
OUTPUT = pipeline_output
PYTEST_ARGS =

BIN = .venv/bin
INPUTS = setup.cfg setup.py constraints.txt
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

help:
	@echo 'make demo    set up .venv and run the demo (ARGS="--quick" for the short one)'
	@echo 'make pipeline  set up .venv and go from prompts to a better model: feedback, sipo, evaluate, online'
	@echo 'make test    set up .venv and run the tests (PYTEST_ARGS="-m slow" for the slow ones)'
	@echo 'make check   lint, docstrings, import contracts, types'
	@echo 'make docs    the documentation as a site, into docs/_build/html; a warning is an error'
	@echo 'make style   format the code and sort the imports'
	@echo 'make build   the wheel and the source archive, into dist/'
	@echo 'make clean   remove .venv, caches and what was built or written by the demo'

demo: .venv/stamp-demo
	$(BIN)/trl-sipo demo $(ARGS)

pipeline: .venv/stamp-demo
	TRL_SIPO=$(BIN)/trl-sipo OUTPUT=$(OUTPUT) sh examples/pipeline.sh

# One thread each, so that the workers do not fight over the cores.
test: .venv/stamp-test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	    $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# `make -k check` goes on after a failure.
check: lint contracts types

# The docstring check is part of ruff: rules D100 to D103 on core and adapters.
lint: .venv/stamp-test
	$(BIN)/ruff check .

contracts: .venv/stamp-test
	$(BIN)/lint-imports --no-logo

types: .venv/stamp-test
	$(BIN)/pyrefly check

# The source is the whole checkout: pages link to reports, examples and code.
docs: .venv/stamp-test
	$(BIN)/python -m sphinx -W --keep-going -q -j auto -b html -c docs -d docs/_build/doctrees . docs/_build/html
	@echo 'Open docs/_build/html/index.html.'

style: .venv/stamp-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: .venv/stamp-test
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist docs/_build *.egg-info demo_output pipeline_output
	rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The Python floor is read from setup.cfg, where it is stated. Editable installs need pip 21.3.
.venv/stamp-venv:
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "make: '$(PYTHON)' was not found. Name an interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
	@floor=`sed -n 's/^python_requires *= *>= *//p' setup.cfg`; \
	    "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] < tuple(int(n) for n in sys.argv[1].split(".")))' \
	        "$$floor" || { \
	    echo "make: Python $$floor or newer is needed, and '$(PYTHON)' is" \
	         "`"$(PYTHON)" -V 2>&1`. Name a newer one: make PYTHON=/path/to/python3" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv || { \
	    echo "make: the venv module failed; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
	$(BIN)/python -c 'import pip, sys; sys.exit(tuple(int(n) for n in pip.__version__.split(".")[:2]) < (21, 3))' \
	    || $(BIN)/python -m pip install --upgrade pip
	@touch $@

.venv/stamp-demo: .venv/stamp-venv $(INPUTS)
	@echo 'Installing the pinned stack into .venv; the first time takes some minutes.'
	$(INSTALL) -e '.[demo]'
	@touch $@

# [test] holds all that [demo] does, so that one install serves both.
.venv/stamp-test: .venv/stamp-venv $(INPUTS)
	@echo 'Installing the pinned stack into .venv; the first time takes some minutes.'
	$(INSTALL) -e '.[test,dev]'
	@touch .venv/stamp-demo $@

.PHONY: help demo pipeline test check lint contracts types docs style build clean
