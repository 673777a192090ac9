# `make demo` and `make test` are all that a fresh machine needs; both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
# Two test processes with a thread each use two cores better than one process with two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

.PHONY: demo test test-all test-peers test-launchers lint format benchmark clean

.venv/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,lint]'
	touch $@

demo: .venv/installed
	$(BIN)/muroan train experiment=demo
	$(BIN)/muroan attack -m experiment=demo attack=decoupling,decoupling_reference,random_removal
	$(BIN)/muroan report experiment=demo

test: .venv/installed
	$(PYTEST) -m "not slow and not gpu and not peers"

test-all: .venv/installed
	$(PYTEST)

# Other libraries' attacks beside ours; an environment of its own, since nothing else needs them.
.venv-peers/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q -c constraints.txt -e '.[test,peers]'
# adv-lib requires torchvision, which the one file that we compare with does not import.
	.venv-peers/bin/python -m pip install -q --no-deps adv-lib
# TextAttack requires what cannot be installed beside current packages, and its search does not use.
	.venv-peers/bin/python -m pip install -q --no-deps textattack lru-dict
	touch $@

test-peers: .venv-peers/installed
	OMP_NUM_THREADS=1 .venv-peers/bin/python -m pytest -q -m peers tests/peers

# Sweeps by Ray and by submitit, whose packages nothing else needs.
.venv-launchers/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv-launchers
	.venv-launchers/bin/python -m pip install -q -c constraints.txt -e '.[test,submitit,ray]'
	touch $@

test-launchers: .venv-launchers/installed
	OMP_NUM_THREADS=1 .venv-launchers/bin/python -m pytest -q tests/test_tracking.py -k launcher

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: .venv/installed
	$(BIN)/python benchmarks/engine.py

clean:
	rm -rf .venv .venv-peers .venv-launchers outputs build *.egg-info
