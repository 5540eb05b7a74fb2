# Each target is a command that one could type; make only spares the set-up.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint

.venv/.ready: pyproject.toml
	@echo "== set up .venv: JAX for the CPU and some packages, about a minute"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[demo]'
	touch $@

# The reference is pinned for the tests only: a plain "torch" may bring gigabytes of CUDA along.
TORCH ?= torch==2.13.0
.venv/.ready-test: .venv/.ready
	@echo "== set up the tests: PyTorch and others to compare with, some minutes"
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[demo,test]'
	touch $@

demo: .venv/.ready  ## convert, train and chat in small, a few minutes on two cores
	$(BIN)/python -m demo.run

test: .venv/.ready-test  ## the fast suite
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: .venv/.ready-test
	$(BIN)/python -m pytest -m slow

lint: .venv/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
