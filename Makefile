# Everything a newcomer needs: `make run` draws a picture, `make test` runs the tests,
# `make endpoint` starts a stand-in for the platform.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
WORKERS ?= 1

.PHONY: run endpoint test image-test lint types docs clean

run: $(VENV)/.run
	$(BIN)/python handler.py --test_input

# A stand-in for the Runpod endpoint, with workers, until Ctrl-C.
endpoint: $(VENV)/.run
	$(BIN)/python -m local_endpoint --port "$(PORT)" --workers "$(WORKERS)"

# Two processes, each of which takes whole files: the tests of one share their servers.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Builds the image with Debian's buildah and tries it out; as root, some minutes.
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

$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt builder/requirements.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@
