# Everything a newcomer needs: `make run` draws a picture, `make test` runs the tests,
# `make endpoint` starts a stand-in for the platform.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
WORKERS ?= 1
# Builds of torch without CUDA's libraries, for machines without an NVIDIA GPU.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# What the image installs is for Linux on x86-64 and for the Python of the base image.
LOCK = $(BIN)/uv pip compile --quiet --no-config --generate-hashes --only-binary :all: \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --custom-compile-command "make lock" $(LOCK_FLAGS)

.PHONY: run endpoint test attack long-run image-test lint types docs screenshots lock audit clean

run: $(VENV)/.run
	$(BIN)/python handler.py --test_input

# A stand-in for the Runpod endpoint, with workers, until Ctrl-C.
endpoint: $(VENV)/.run
	$(BIN)/python -m local_endpoint --port "$(PORT)" --workers "$(WORKERS)"

# Two processes. Each takes whole files, because the tests of one file share their servers.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Sends the worker everything that a caller, a server of pictures or LoRAs, or the platform may do
# wrong.
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

# The README's pictures of the page, with the miniature model; needs Chromium.
screenshots: $(VENV)/.dev
	$(BIN)/python -m tools.page_screenshots

# The locks, with hashes, that the image installs; everything else installs the requirements. Versions
# stay as they are, unless LOCK_FLAGS says otherwise, such as LOCK_FLAGS=--upgrade.
# torch and all that it needs have a lock of their own, which seldom changes: the image's largest layer.
lock: $(VENV)/.dev
	grep -o '^torch==[^ ]*' requirements.txt | $(LOCK) --output-file requirements-torch.lock -
	$(LOCK) --output-file requirements.lock --constraint requirements-torch.lock \
	    $$(sed -n 's/^\([a-z0-9][^= ]*\)==.*/--no-emit-package \1/p' requirements-torch.lock) \
	    requirements.txt
	$(LOCK) --output-file builder/requirements.lock --constraint requirements-torch.lock \
	    --constraint requirements.lock builder/requirements.txt
	$(LOCK) --no-deps --output-file requirements-control.lock requirements-control.txt

# Known vulnerabilities of what the image installs. Strict: what cannot be looked up is a failure, too.
audit: $(VENV)/.dev
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements-torch.lock \
	    --requirement requirements.lock --requirement builder/requirements.lock \
	    --requirement requirements-control.lock

clean:
	rm -rf $(VENV) output

# torch first, without its dependencies: from the second index, pip would take any package that has a
# higher version there, whoever published it.
$(VENV)/.worker: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps "$$(grep -o '^torch==[^ ]*' requirements.txt)" \
	    $$($(BIN)/python -m tools.torch_index "$(TORCH_INDEX)")
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

# The command `sdxl` runs from the checkout; what it needs beside the worker is not in the image.
$(VENV)/.run: requirements-client.txt pyproject.toml $(VENV)/.worker
	$(BIN)/python -m pip install --quiet --requirement requirements-client.txt --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.txt builder/requirements.txt requirements-control.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-control.txt
	@touch $@
