# Two commands: `make demo` and `make test`. Both set up everything themselves in .venv; a second call installs nothing.
# --no-compile: compiling all that could be imported takes 0.3 GB. What is imported is compiled then, also where the
# environment tells Python to write no bytecode.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint install clean

demo: $(VENV)/.installed
	@$(BIN)/papertrial search "repetitive text generation" --limit 5
	@$(BIN)/papertrial run contrastive_search --scale small --report reports/contrastive_search.html

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Papertrial needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[encoder,site]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[encoder,site,dev]"
	@touch $@

clean:
	rm -rf $(VENV) reports build dist .ruff_cache .mypy_cache
