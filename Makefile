# Every target sets up what it needs: .venv for the example, .build/pyX.Y for the tests.

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
endif
ifeq ($(PYTHON),)
$(error Python 3.11 or later is needed: install it, or name it: make PYTHON=/path/to/python)
endif

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Which versions of other packages an environment has: the newest, or those of a file of constraints.
VERSIONS ?=
ifneq ($(VERSIONS),)
export PIP_CONSTRAINT = $(CURDIR)/tests/constraints/$(VERSIONS).txt
endif
ENVIRONMENT := py$(VERSION)$(if $(VERSIONS),-$(VERSIONS))
VENV := .build/$(ENVIRONMENT)
BIN := $(VENV)/bin
PEERS := .build/peers-py$(VERSION)
PEERS_2_0 := .build/peers-sqlalchemy-2-0-py$(VERSION)
BESIDE := .build/beside-$(ENVIRONMENT)
ECOSYSTEM := .build/ecosystem-py$(VERSION)
ECOSYSTEM_2_0 := .build/ecosystem-sqlalchemy-2-0-py$(VERSION)
SOURCES := pyproject.toml LICENSE README.md $(shell find asgi_db adapters -name __pycache__ -prune -o -print)
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
WORKERS ?= 3

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
export COVERAGE_FILE = $(CURDIR)/.build/coverage/data
# The tests refuse to run against the source tree: what they test is the installed wheel.
PYTEST = ASGI_DB_TEST_INSTALLED=1 $(BIN)/python -P -m
# Most tests wait for servers, so there are more workers than processors; each has servers of its own.
PARALLEL = --numprocesses=$(WORKERS) --dist=loadfile
# What depends on Python: its event loop, its tasks, its garbage collector, its imports and types. The
# rest (servers, the command line, the documentation) is tested on one version.
ON_EVERY_PYTHON = tests/contract tests/typing $(patsubst %,tests/test_%.py,unit_of_work session \
	random_walks missing_greenlet observers modes hooks retries cancellation late_cancellation \
	failed_clean_up loops_without_dispose \
	garbage leaks lifespan composition websockets fair_pool public_api settings)
# What depends on the frameworks, on SQLAlchemy and on the drivers.
ON_LOWEST_VERSIONS = tests/contract $(patsubst %,tests/test_%.py,sqlalchemy_versions fastapi starlette \
	litestar composition)

.PHONY: help demo serve test test-pythons python-suite suite lowest lowest-suite ecosystem load chaos bench count pictures check docs format coverage build servers clean
.NOTPARALLEL:

help:
	@echo "make demo          run the example application, send it requests, print what happened"
	@echo "make serve         leave the example application running (HOST=$(HOST) PORT=$(PORT))"
	@echo "make test          check, then the whole suite with coverage, on the built wheel"
	@echo "make test-pythons  what depends on Python, on the other supported versions found here"
	@echo "make lowest        what depends on them, with the lowest supported versions of SQLAlchemy,"
	@echo "                   the frameworks and the drivers"
	@echo "make suite         the suite alone; ARGS='-k name' goes to pytest, WORKERS=1 runs one test at a time"
	@echo "make ecosystem     a small application for each library of docs/works-with.md;"
	@echo "                   ARGS='--write-page' writes the versions and the date into the page"
	@echo "make load          four busy processes beside the tests, which end after half an hour;"
	@echo "                   ARGS='--processes 8 --seconds 60' for more, or less"
	@echo "make chaos         the long runs with real faults, here and with other libraries, as one table;"
	@echo "                   ARGS='--only restart --contender asgi_db' selects, --help says what there is"
	@echo "make bench         how fast it is, beside other libraries: tables and plots, in 25 minutes;"
	@echo "                   ARGS='--write' puts them into docs/performance.md, '--quick' rehearses"
	@echo "make pictures      the dashboard in a browser under load: the pictures of the documentation, in 6 minutes"
	@echo "make count         the machine instructions of a request, counted by valgrind, beside the same by hand;"
	@echo "                   ARGS='--database sqlite --only read' selects"
	@echo "make check         ruff, import-linter, mypy, pyright"
	@echo "make docs          the documentation as a site, in .build/docs; a warning is an error"
	@echo "make format        ruff format, and the fixes which ruff can make itself"
	@echo "make coverage      the suite with coverage, and a report in .build/coverage/html"
	@echo "make build         sdist and wheel in dist/"
	@echo "make clean         remove everything that was built"

demo: .venv/ready
	.venv/bin/python examples/demo.py

serve: .venv/ready
	.venv/bin/uvicorn --app-dir examples --host $(HOST) --port $(PORT) shop:app

test: servers check docs coverage

test-pythons:
	@$(PYTHON) -m scripts.pythons

python-suite: $(VENV)/installed servers
	$(PYTEST) pytest $(PARALLEL) $(ON_EVERY_PYTHON) $(ARGS)

suite: $(VENV)/installed $(BESIDE)/installed servers
	$(PYTEST) pytest $(PARALLEL) $(ARGS)

ecosystem: $(ECOSYSTEM)/installed $(ECOSYSTEM_2_0)/installed
	@$(PYTHON) -m scripts.prepare ecosystem
	ASGI_DB_TEST_INSTALLED=1 $(ECOSYSTEM)/bin/python -P -m pytest $(PARALLEL) tests/ecosystem $(ARGS)
	ASGI_DB_TEST_INSTALLED=1 $(ECOSYSTEM_2_0)/bin/python -P -m pytest $(PARALLEL) tests/ecosystem $(ARGS)

lowest:
	@$(MAKE) --no-print-directory lowest-suite VERSIONS=lowest

lowest-suite: $(VENV)/installed servers
	$(PYTEST) pytest $(PARALLEL) $(ON_LOWEST_VERSIONS) $(ARGS)

load:
	@$(PYTHON) -m scripts.load $(ARGS)

# Everything, which is without arguments, begins with the sweeps over all ways of cancelling.
chaos: $(VENV)/installed $(PEERS)/installed $(PEERS_2_0)/installed servers
	@$(PYTHON) -m scripts.prepare chaos
	$(if $(ARGS),,$(PYTEST) pytest $(PARALLEL) -m sweep --whole-sweeps)
	$(BIN)/python -m tests.chaos --peers=$(PEERS)/bin/python --peers-2-0=$(PEERS_2_0)/bin/python $(ARGS)

bench: $(PEERS)/bench servers
	@$(PYTHON) -m scripts.prepare load
	$(PEERS)/bin/python -m tests.bench $(ARGS)

# The same test as in the suite; with the variable it runs its load for five minutes first.
pictures: $(VENV)/installed servers
	ASGI_DB_PICTURES=docs/dashboard $(PYTEST) pytest tests/test_dashboard_in_a_browser.py $(ARGS)

count: $(VENV)/installed servers
	@$(PYTHON) -m scripts.prepare count
	$(BIN)/python -m tests.bench.count $(ARGS)

check: $(VENV)/installed $(VENV)/sphinx
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy
	@echo "pyright looks at everything again, which takes a minute"
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/installed $(VENV)/sphinx
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --doctree-dir .build/doctrees docs .build/docs
	@echo "the site begins at .build/docs/index.html"

format: $(VENV)/tools
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

coverage: $(VENV)/installed $(BESIDE)/installed servers
	@rm -rf .build/coverage && mkdir .build/coverage
	$(PYTEST) coverage run -m pytest $(PARALLEL) $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage html --quiet --fail-under=0 --directory .build/coverage/html
	$(BIN)/coverage report

build: dist/built

servers:
	@$(PYTHON) -m scripts.prepare servers

clean:
	rm -rf .build .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: pyproject.toml
	@$(PYTHON) -m scripts.prepare venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[all]' --group demo
	@touch $@

$(VENV)/created:
	@$(PYTHON) -m scripts.prepare venv $(VENV)
	@touch $@

$(VENV)/tools: pyproject.toml $(VENV)/created $(PIP_CONSTRAINT)
	$(BIN)/python -m pip install --quiet --group test --group check --group build
	@touch $@

$(VENV)/sphinx: pyproject.toml $(VENV)/created
	$(BIN)/python -m pip install --quiet --group docs
	@touch $@

dist/built: $(SOURCES) | $(VENV)/tools
	@rm -rf dist
	@echo "building the sdist and the wheel; the output goes to .build/build.log"
	$(BIN)/python -m build --no-isolation --outdir dist . >.build/build.log 2>&1 || { cat .build/build.log; exit 1; }
	@touch $@

$(VENV)/installed: dist/built $(VENV)/tools
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(BIN)/python -m pip install --quiet "$$(echo dist/*.whl)[all]"
	@touch $@

$(BESIDE)/installed: pyproject.toml $(VENV)/tools
	$(BIN)/python -m pip install --quiet --upgrade --target $(BESIDE) --group beside
	@touch $@

# The wheel in the same call, so that nothing is installed in a version that its drivers refuse.
$(ECOSYSTEM)/installed: dist/built pyproject.toml
	@test -e $(ECOSYSTEM)/bin/python || $(PYTHON) -m scripts.prepare venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --group ecosystem "$$(echo dist/*.whl)[all]"
	$(ECOSYSTEM)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	@touch $@

$(ECOSYSTEM_2_0)/installed: dist/built pyproject.toml
	@test -e $(ECOSYSTEM_2_0)/bin/python || $(PYTHON) -m scripts.prepare venv $(ECOSYSTEM_2_0)
	$(ECOSYSTEM_2_0)/bin/python -m pip install --quiet --group ecosystem-sqlalchemy-2-0 "$$(echo dist/*.whl)[fastapi,mysql,postgresql]"
	$(ECOSYSTEM_2_0)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	@touch $@

$(PEERS)/installed: pyproject.toml
	@$(PYTHON) -m scripts.prepare venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --group chaos
	@touch $@

# advanced-alchemy's routing does not work with SQLAlchemy 2.1.
$(PEERS_2_0)/installed: export PIP_CONSTRAINT = $(CURDIR)/tests/constraints/sqlalchemy-2.0.txt
$(PEERS_2_0)/installed: pyproject.toml
	@$(PYTHON) -m scripts.prepare venv $(PEERS_2_0)
	$(PEERS_2_0)/bin/python -m pip install --quiet --group chaos
	@touch $@

# All that `make bench` compares, this library too, is in one environment, in the same versions.
$(PEERS)/bench: dist/built $(PEERS)/installed
	$(PEERS)/bin/python -m pip install --quiet --group bench
	$(PEERS)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(PEERS)/bin/python -m pip install --quiet "$$(echo dist/*.whl)[all]"
	@touch $@
