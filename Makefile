# The project's commands. Every target first installs what it needs, so each works in a fresh clone.
#
#   make demo                     train, kill, resume on more ranks, compare
#   make setup [EXTRAS=s3,bench]  create .venv and install
#   make test | test-all          the tests; test-all adds slow ones and those that need root, a GPU or a service
#   make lint                     ruff and mypy --strict
#   make bench                    measure what a save costs a training loop
#   make fuzz | soak              ten minutes of hostile input; 2,000 saves with faults and restarts
#
# To choose the environment and the interpreter: make demo VENV=/tmp/venv PYTHON=python3.12

VENV ?= .venv
EXTRAS ?=
PYTEST_ARGS ?=
# Parallel test processes. More are faster on more cores: a test spends most of its time in the ranks it starts.
TEST_WORKERS ?= 2
DEMO_DIR ?= runs/demo

python_ok = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p $(python_ok) 2>/dev/null && echo $$p && break; done)
endif

comma := ,
known_extras := s3 hf test bench
wanted_extras := $(subst $(comma), ,$(EXTRAS))
run := $(VENV)/bin/python
pytest := $(run) -m pytest -n $(TEST_WORKERS) --dist worksteal
# Excluded from `make test`. CUDA tests skip themselves without a device.
extra_marks := service or slow or root or gpu

.PHONY: setup demo test test-extra test-all lint bench fuzz soak
.DELETE_ON_ERROR:
# Parallel installations into one environment, or test runs on the same cores, would interfere.
.NOTPARALLEL:

setup: $(VENV)/.installed-base $(foreach e,$(wanted_extras),$(VENV)/.installed-$(e))
	@echo "Installed in $(VENV). Activate it with: . $(VENV)/bin/activate"

demo: $(VENV)/.installed-base
	$(run) -m demo --dir $(DEMO_DIR)

test: $(VENV)/.installed-test
	$(pytest) -m "not ($(extra_marks))" $(PYTEST_ARGS)

test-extra: $(VENV)/.installed-test
	$(pytest) -m "$(extra_marks)" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test
	$(pytest) $(PYTEST_ARGS)

FUZZ_SECS ?= 600
fuzz: $(VENV)/.installed-test
	HOLDFAST_FUZZ_SECS=$(FUZZ_SECS) $(run) -m pytest tests/faults/test_hostile.py -k any_bytes

soak: $(VENV)/.installed-test
	$(run) -m tests.faults.soak

lint: $(VENV)/.installed-test
	$(run) -m ruff check .
	$(run) -m mypy

bench: $(VENV)/.installed-bench
	$(run) -m bench.save_latency

# A stamp per extra, renewed when the dependencies change. venv leaves an existing directory intact.
$(VENV)/.created:
ifeq ($(strip $(PYTHON)),)
	@echo "Holdfast needs Python 3.11 or newer and found none on PATH. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1
endif
	@$(PYTHON) $(python_ok) || { \
	  echo "Holdfast needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-base: setup.py $(wildcard engine/native/*.[ch]) pyproject.toml constraints.txt $(VENV)/.created
	@echo "Installing into $(VENV) (torch is large: this can take minutes the first time)"
	$(run) -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-%: setup.py $(wildcard engine/native/*.[ch]) pyproject.toml constraints.txt $(VENV)/.created
	$(if $(filter $*,$(known_extras)),,$(error no such extra: $*; choose from: $(known_extras)))
	$(run) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$*]'
	@touch $@
