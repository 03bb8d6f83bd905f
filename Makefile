# `make test` and `make bench` do all their own set-up, in the virtual environment .venv; they need
# Python 3.11, a C++ compiler and make.

# What development is done with. `make test TORCH=torch==2.14.1 TRITON=` takes another pair. Without
# a version pip would take the newest torch, with several GB of CUDA libraries.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
# Everything after torch is installed under this, so that no requirement replaces it.
CONSTRAINTS := $(VENV)/constraints.txt
# Stamps of what is installed; torch's is named after the pair, which can change from call to call.
PAIR := $(VENV)/pair-$(shell echo '$(TORCH) $(TRITON)' | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed
# The package once more, without kernels and as its wheel is; each in a folder to put on the path.
PURE := $(VENV)/pure
WHEEL := $(VENV)/wheel

NATIVE_SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
PYTHON_SOURCES := $(shell find scse_kernels -name '*.py')

# Busy-waiting threads of two processes slow each other tenfold on few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: test lint test-pure test-wheel bench wheel clean
.DELETE_ON_ERROR:

test: lint test-pure $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# From tests/, since in the checkout's own folder `import scse_kernels` finds the checkout.
test-pure: $(PURE)
	cd tests && PYTHONPATH=../$(PURE) SCSE_TEST_PURE_PYTHON=1 ../$(BIN)/python -m pytest -q

# The wheel that was built from the sdist, in a folder of its own.
test-wheel: wheel
	rm -rf $(WHEEL)
	$(PIP) --no-deps --target $(WHEEL) dist/*.whl
	cd tests && PYTHONPATH=../$(WHEEL) ../$(BIN)/python -m scse_kernels

bench: $(INSTALLED)
	$(BIN)/python -m scse_kernels
	$(BIN)/python -m bench ops --quick
	$(BIN)/python -m bench mri

wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info scse_kernels/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(PAIR): | $(BIN)/python
	rm -f $(VENV)/pair-*
	$(PIP) $(TORCH) $(TRITON) ninja "setuptools>=77.0.3" wheel
	$(BIN)/pip freeze | grep -E '^(torch|triton)==' > $(CONSTRAINTS)
	touch $@

# Editable: the benchmarks and the tests run in the checkout, and edits of Python files count at once.
$(INSTALLED): $(PAIR) $(NATIVE_SOURCES)
	SCSE_BUILD=cpu $(PIP) --no-build-isolation -c $(CONSTRAINTS) -e ".[bench,dev]"
	touch $@

$(PURE): $(INSTALLED) $(PYTHON_SOURCES)
	rm -rf $@ build/lib
	SCSE_BUILD=none $(PIP) --no-build-isolation --no-deps --target $@ .
	touch $@
