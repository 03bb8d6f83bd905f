# `make test`, `make bench` and `make check-cuda` do all their own set-up, in the virtual environment
# .venv; they need Python 3.11, a C++ compiler and make. `make gpu` sets up nothing.

# What development is done with. `make test TORCH=torch==2.14.1 TRITON=` takes another pair. Without
# a version pip would take the newest torch, with several GB of CUDA libraries.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install
# Everything after torch is installed under this, so that no requirement replaces it.
CONSTRAINTS := $(VENV)/constraints.txt
# Stamps of what is installed; torch's is named after the pair, which can change from call to call.
PAIR := $(VENV)/pair-$(shell echo '$(TORCH) $(TRITON)' | cksum | cut -d ' ' -f 1)
TOOLS := $(VENV)/tools
KERNELS := $(VENV)/kernels
PEERS := $(VENV)/peers
# Other versions of Triton than the pair's, alone and side by side: what torch 2.10 and 2.11, 2.13
# and 2.14 come with.
TRITONS := $(foreach v,$(filter-out $(patsubst triton==%,%,$(TRITON)),3.6.0 3.7.1 3.8.0),$(VENV)/triton-$(v)/installed)
# The CUDA compiler from PyPI, where the machine has no toolkit: beside the packages, since torch may
# have CUDA libraries of its own there.
NVCC := $(VENV)/nvcc
# What the tests of code for GPUs have executed.
PROOF := $(VENV)/proof
# Environments with the package installed: without kernels, and as users install it.
PURE := $(VENV)/pure
WHEEL := $(VENV)/wheel
SDIST := $(VENV)/sdist
DIST := $(VENV)/dist
# $(call share,ENVIRONMENT): gives it the packages of .venv by a path file; through that the editable
# install isn't seen.
share = $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > $$(echo $(1)/lib/python3.*/site-packages)/venv.pth
# $(call installed,ENVIRONMENT,WHAT): a new environment into which pip installs it, with the
# self-check. From tests/, since in the checkout's own folder `import scse_kernels` finds that one.
define installed
rm -rf $(1)
$(BIN)/python -m venv --without-pip $(1)
$(call share,$(1))
SCSE_BUILD=cpu $(BIN)/pip --disable-pip-version-check --python $(1)/bin/python \
    install --quiet --no-deps $(2)
cd tests && ../$(1)/bin/python -m scse_kernels
endef

# A worker for each core. One that is done takes tests from the others, since tests differ in length.
PARALLEL := -n auto --dist worksteal

# Busy-waiting threads of two processes slow each other tenfold on few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: test lint test-pure test-wheel gpu-proof check-cuda bench dist clean
.DELETE_ON_ERROR:
# Two of the steps build the package in the same folder.
.NOTPARALLEL:

test: lint test-pure $(KERNELS) $(PEERS) $(TRITONS) $(NVCC)
	$(BIN)/python -m pytest $(PARALLEL)

lint: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.*h' -o -name '*.inc')

# From tests/, since in the checkout's own folder `import scse_kernels` finds the checkout. Without
# the tests of kernels, where the eager backend is tested too, and those of the code around them.
test-pure: $(PURE) $(PEERS)
	cd tests && SCSE_TEST_PURE_PYTHON=1 ../$(PURE)/bin/python -m pytest -q $(PARALLEL) \
	    build convert torch kernels/test_bad_input.py batch_norm/test_norm_module.py

# Executes the compiled code of every kernel for GPUs in the emulator and ends with a table of what
# ran. Other than in `make test`, nothing is skipped: what can't run here fails.
gpu-proof: $(TOOLS) $(TRITONS) $(NVCC)
	rm -rf $(PROOF) && mkdir $(PROOF)
	SCSE_GPU_PROOF=$(PROOF) $(BIN)/python -m pytest -q $(PARALLEL) tests/gpu; passed=$$?; \
	$(BIN)/python tests/gpu/proof.py $(PROOF) && exit $$passed

# As users install it, in a fresh environment and with pip's own way of building; from the sdist, so
# that it shows what the sdist lacks. The checkout needs the same kernels, and one compilation will do.
test-wheel: $(TOOLS)
	rm -rf dist $(SDIST)
	$(BIN)/python -m build --no-isolation --sdist
	mkdir $(SDIST) && tar xzf dist/*.tar.gz -C $(SDIST) --strip-components 1
	$(call installed,$(WHEEL),./$(SDIST))
	cd $(WHEEL)/lib/python3.*/site-packages/scse_kernels && cp _C.*so _build_info.json \
	    $(CURDIR)/scse_kernels
	mkdir -p build && cp -r $(SDIST)/build/temp* build && touch $(KERNELS)

# Builds the CUDA kernels and tests what can be tested without a GPU. It needs a CUDA toolkit of the
# same major version as the torch (CUDA_HOME names its folder):
#   make check-cuda TORCH=torch==2.14.1 TRITON=
# One architecture is built in a fraction of the time: TORCH_CUDA_ARCH_LIST=9.0.
check-cuda: $(TOOLS)
	SCSE_BUILD=cuda $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m pytest -q tests/build/test_cuda_extension.py \
	    tests/build/test_stable_abi.py tests/build/test_build_choice.py
	$(BIN)/python -m scse_kernels

bench: $(KERNELS)
	$(BIN)/python -m scse_kernels
	$(BIN)/python -m bench ops --quick
	$(BIN)/python -m bench mri

# On a machine with a GPU and no network, with the Python at hand: `make gpu PYTHON=python3.12`. See
# docs/gpu.md.
.PHONY: gpu
gpu:
	$(PYTHON) -m bench gpu

# What a release consists of, each installed and checked: the sdist, and from it a wheel without
# kernels and one with the CPU's, for every Linux with a C library as new as its name says. torch's
# libraries are those of the torch that is there. See docs/releasing.md.
dist: test-wheel
	rm -rf $(SDIST)/build/lib* $(DIST)
	SCSE_BUILD=none $(BIN)/python -m build --no-isolation --wheel --outdir dist $(SDIST)
	SCSE_BUILD=cpu $(BIN)/python -m build --no-isolation --wheel --outdir $(DIST) $(SDIST)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude libc10.so \
	    --exclude libtorch_cpu.so --wheel-dir dist $(DIST)/*.whl
	$(call installed,$(DIST)/pure,dist/*-none-any.whl)
	$(call installed,$(DIST)/cpu,dist/*-manylinux*.whl)
	$(BIN)/python tests/build/release_files.py dist

clean:
	rm -rf $(VENV) build dist *.egg-info scse_kernels/*.so scse_kernels/_build_info.json

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(PAIR): | $(BIN)/python
	rm -f $(VENV)/pair-*
	$(PIP) $(TORCH) $(TRITON) ninja "setuptools>=77.0.3,<82" wheel
	$(BIN)/pip freeze | grep -E '^(torch|triton)==' > $(CONSTRAINTS)
	touch $@

# Editable, since benchmarks and tests run in the checkout.
$(TOOLS): $(PAIR) pyproject.toml
	SCSE_BUILD=none $(PIP) --quiet --no-build-isolation -c $(CONSTRAINTS) -e ".[bench,dev]"
	touch $@

$(NVCC): $(TOOLS)
	test -n "$$CUDA_HOME" || command -v nvcc || $(PIP) --quiet --no-deps --upgrade \
	    --target $(VENV)/cuda-toolkit $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open( \
		"pyproject.toml", "rb"))["project"]["optional-dependencies"]["nvcc"])')
	touch $@

# Without what they ask for, torchvision and more: only their blocks are tested, only data is read.
$(PEERS): $(TOOLS)
	$(PIP) --quiet --no-deps $$($(BIN)/python -c 'import tomllib; extras = tomllib.load(open( \
		"pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print(*extras["peers"], *extras["anatomy"])')
	touch $@

$(VENV)/triton-%/installed: | $(BIN)/python
	rm -rf $(@D)
	$(PIP) --quiet --no-deps --target $(@D) triton==$*
	touch $@

# Not by way of pip, which would compile every file again after each edit.
$(KERNELS): $(TOOLS) setup.py $(shell find csrc -type f)
	SCSE_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(PURE): $(TOOLS) setup.py $(shell find scse_kernels -name '*.py')
	rm -rf $@ build/lib
	$(BIN)/python -m venv --without-pip $@
	$(call share,$@)
	SCSE_BUILD=none $(PIP) --quiet --no-build-isolation --no-deps \
	    --target $$(echo $@/lib/python3.*/site-packages) .
	touch $@
