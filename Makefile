# `make demo` and `make test` need Python 3.11 or newer and nothing else; the first one builds .venv.
PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench starter fusion clean

.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qrlora needs Python 3.11 or newer; this is " + sys.version.split()[0])'
	@echo "installing into .venv (once; torch is large)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/stamp
	$(BIN)/qrlora blend --output demo --overwrite

lint: .venv/stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Speed and memory beside the peers, into benchmarks/results/performance; wants a quiet machine.
bench: .venv/stamp
	$(BIN)/python -m benchmarks.performance

# Trains the embedded base anew: about three hours on two cores; a part that was interrupted continues.
starter: .venv/stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,emoji]'
	test -f data/emoji.npz || $(BIN)/python -m tools.emoji.build
	$(BIN)/python -m tools.starter.autoencoder
	$(BIN)/python -m tools.starter.denoiser --compile
	$(BIN)/python -m tools.starter.assemble
	$(BIN)/python -m tools.starter.score

# The fusion benchmark: about eight hours, mostly on one core; what is done is kept in data/fusion, so a run that was stopped goes on.
fusion: .venv/stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,emoji]'
	test -f data/emoji.npz || $(BIN)/python -m tools.emoji.build
	$(BIN)/python -m benchmarks.fusion screen
	$(BIN)/python -m benchmarks.fusion merges --methods lora-looks-flip qr
	$(BIN)/python -m benchmarks.fusion test --methods lora-looks8-flip lora-looks-flip lora qr qr-input qr-looks-flip
	$(BIN)/python -m benchmarks.fusion report

clean:
	rm -rf .venv demo out dist build .pytest_cache .ruff_cache .import_linter_cache .hypothesis
