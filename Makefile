# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 29533
# Without a GPU: DeepSpeed on the CPU, two processes, one thread each.
CPU := $(if $(shell command -v nvidia-smi 2>/dev/null),,DS_ACCELERATOR=cpu OMP_NUM_THREADS=1)
LAUNCH := $(if $(CPU),--num_accelerators 2,)
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: setup debian quickstart test test-fast lint clean

setup: $(VENV)/.installed

# torch first: DeepSpeed's source package looks for it while it is built, and the pin keeps gigabytes of CUDA off a machine without a GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	touch $@

quickstart: setup
	$(OFFLINE) $(CPU) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed $(LAUNCH) --master_port $(PORT) lst_scale/train.py --recipe quickstart --overwrite

# Real Slurm and asynchronous disk I/O for the tests that need them, from Debian; where that can't be, these tests fail and say so.
debian:
	-bash tests/mini_slurm.sh install

test: setup debian
	$(OFFLINE) $(CPU) $(BIN)/python -m pytest

test-fast: setup
	$(OFFLINE) $(CPU) $(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs
