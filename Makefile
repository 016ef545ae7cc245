# Two commands for a newcomer: `make demo` and `make test`. Both make the virtual environment if it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tested build, for CPUs; PyPI's own for Linux pulls in gigabytes of CUDA. It comes first and alone, so that nothing else asks for
# that one: from where pip looks anyway (a mirror), or else from PyTorch's index. A torch that .venv has already is left alone.
TORCH := torch==2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP = $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: install demo demo-real test bench curation laws parity faults punisher check docs clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(INSTALLED)  ## virtual environment, pinned libraries, C++ extension (about 1 minute, then at once)

$(INSTALLED): pyproject.toml setup.py tools/constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing pinned libraries into $(VENV) (about 1 minute the first time)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)+cpu 2>/dev/null || $(PIP) $(TORCH) --index-url $(TORCH_INDEX) || \
	  { echo "no CPU build of $(TORCH) was found; installing PyPI's, which may bring CUDA with it" >&2; $(PIP) $(TORCH); }
	@$(PIP) -c tools/constraints.txt setuptools wheel pybind11
	@$(PIP) -c tools/constraints.txt --no-build-isolation -e '.[dev,curate,demo,text,hub,post,eval]'
	@touch $@

demo: install  ## the whole recipe in miniature: text in, an evaluated chat model out (about 8 minutes on 2 cores)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

demo-real: install  ## the real SmolLM2-135M: import, ten steps, export, SFT, chat (MODEL=hub name, folder or .gguf)
	@PATH="$(CURDIR)/$(BIN):$$PATH" MODEL="$(MODEL)" bash examples/demo_real.sh

# Two files at a time: many tests wait for processes that they started. More would starve the ranks on a small machine.
test: install  ## all tests (about 15 minutes on 2 cores; TESTS=tests/data for a part)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

bench: install  ## measured ratios against peers, kept in bench/results/ (about 15 minutes)
	$(BIN)/python -m bench

curation: install  ## all curation pipelines on real text from Debian's packages (one to two hours; ARGS="--share 0.02" to try)
	$(BIN)/python -m bench.curation $(ARGS)

faults: install  ## kills, lost nodes, preemption, full disks, ...: under a real Slurm (root needed) and without, hours
	FAULT_TRIALS=$(or $(TRIALS),all) FAULT_TABLE=docs/faults.md $(BIN)/python -m pytest -m faults tests/slurm tests/train tests/checkpoint tests/data
	SAVE_KILLS=25 SAVE_HIDDEN=256 $(BIN)/python -m pytest -s tests/checkpoint/test_save_kills.py

punisher: install  ## two hours of faults, one every 60 to 120 s, done to one job under a real Slurm
	PUNISH_SECONDS=7200 PUNISH_RESULT=bench/results/punisher.json $(BIN)/python -m pytest -s -m faults tests/slurm/test_punisher.py

laws: install  ## the data's laws on 2,000 random recipes against a plain-Python oracle (long)
	LAWS_EXAMPLES=2000 $(BIN)/python -m pytest tests/data/test_laws.py

parity: install  ## every layout against one process: docs/parity.md (about 5 minutes)
	$(BIN)/python -m tests.parity

check: install  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy megatron_smol

docs: install  ## regenerate docs/recipe.md from the recipe's schema
	$(BIN)/python tools/make_recipe_reference.py

clean:  ## remove what was built and the demo's run (data/ and .venv stay)
	rm -rf build *.egg-info megatron_smol/*.so runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis $(INSTALLED)
