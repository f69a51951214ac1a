# Everything a newcomer needs: `make run` draws a picture, `make test` runs the tests,
# `make endpoint` starts a stand-in for the platform.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
WORKERS ?= 1
# Builds of torch without CUDA's libraries, for machines without an NVIDIA GPU.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: run endpoint test attack long-run image-test lint types docs clean

run: $(VENV)/.run
	$(BIN)/python handler.py --test_input

# A stand-in for the Runpod endpoint, with workers, until Ctrl-C.
endpoint: $(VENV)/.run
	$(BIN)/python -m local_endpoint --port "$(PORT)" --workers "$(WORKERS)"

# Two processes. Each takes whole files, because the tests of one file share their servers.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Sends the worker everything that a caller, a picture server or the platform may do wrong.
attack: $(VENV)/.dev
	$(BIN)/python -m benchmarks.attack

# Thousands of jobs of every kind through three workers, one of which is killed now and then.
long-run: $(VENV)/.dev
	$(BIN)/python -m benchmarks.long_run

# Builds the image with Debian's buildah and tries it out; needs root and takes some minutes.
image-test: $(VENV)/.run
	$(BIN)/python -m tools.image_test

lint: $(VENV)/.dev
	$(BIN)/hadolint Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# The documents' tables, the JSON Schema and the Hub's form, from the declarations they describe.
docs: $(VENV)/.dev
	$(BIN)/python -m tools.docs

clean:
	rm -rf $(VENV) output

# torch first, without its dependencies: from the second index, pip would take any package that has a
# higher version there, whoever published it.
$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps "$$(grep -o '^torch==[^ ]*' requirements.txt)" \
	    $$($(BIN)/python -m tools.torch_index "$(TORCH_INDEX)")
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt builder/requirements.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@
