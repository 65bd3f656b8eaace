# `make demo` and `make test` work on a machine with Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
EO_VENV := .venv-eo
EO_PIP := $(EO_VENV)/bin/python -m pip --disable-pip-version-check -q
PEERS_VENV := .venv-peers
PEERS_PIP := $(PEERS_VENV)/bin/python -m pip --disable-pip-version-check -q
# Where there is no NVIDIA GPU, TORCH_ARGS can point pip at PyTorch's index of CPU wheels (see pytorch.org, "Get started").
TORCH_ARGS ?=

.PHONY: install demo test test-eo bench-peers slow soak lint clean

install: $(VENV)/installed

# torch first and alone: a later range would pull another build of it.
$(VENV)/installed: pyproject.toml setup.py requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c requirements/constraints.txt torch $(TORCH_ARGS)
	$(PIP) install -c requirements/constraints.txt -e '.[deepspeed,tracking,dali,remote,sources,test]'
	@touch $@
	@echo "installed into $(VENV)"

demo: install
	$(BIN)/python launch/demo.py

# Two tests at a time: many wait for processes of their own. The tests of a file stay together, as they share what they build.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The integrations against the installed toolkits, in a venv of their own: they bring about a hundred packages.
test-eo: $(EO_VENV)/installed
	$(EO_VENV)/bin/python -m pytest tests/integrations tests/export

$(EO_VENV)/installed: pyproject.toml setup.py requirements/constraints.txt
	$(PYTHON) -m venv $(EO_VENV)
	$(EO_PIP) install -c requirements/constraints.txt torch $(TORCH_ARGS)
	$(EO_PIP) install -c requirements/constraints.txt -e '.[eo,test]'
	@touch $@

# The loader beside other projects' loaders, in a venv of their own: they need older packages than ours.
bench-peers: $(PEERS_VENV)/installed
	$(PEERS_VENV)/bin/python benchmarks/loader.py $(BENCH_ARGS)

$(PEERS_VENV)/installed: pyproject.toml setup.py requirements/peers.txt
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_PIP) install -c requirements/peers.txt torch $(TORCH_ARGS)
	$(PEERS_PIP) install -c requirements/peers.txt -e '.[dali,peers]'
	@touch $@

slow: install
	$(BIN)/python -m pytest -m slow

# Runs that are killed at random, 200 times in all: the final curve is that of a run left alone, and no checkpoint is lost.
soak: install
	$(BIN)/python -m pytest -m soak -s tests/soak

lint: install
	$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

clean:
	rm -rf build runs .pytest_cache .ruff_cache .hypothesis
