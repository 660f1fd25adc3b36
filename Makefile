# A fresh machine needs Python 3.10-3.12 and make: every target makes .venv first, once.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3 python; do \
	$$p -c 'import sys, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
INSTALLED := .venv/.installed
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: quickstart test test-all check format bench

quickstart: $(INSTALLED)  ## the whole chain on synthetic videos, or on your own: make quickstart CLIPS=DIR
ifdef CLIPS
	.venv/bin/evatok run experiments/quickstart.yaml \
		--set name=quickstart-$$(basename '$(CLIPS)' | tr -c 'A-Za-z0-9._\n-' '_') \
		--set index.source.kind=folder --set 'index.source.path=$(CLIPS)'
else
	.venv/bin/evatok run experiments/quickstart.yaml
endif

test: $(INSTALLED)
	.venv/bin/python -m pytest -m 'not slow'

test-all: $(INSTALLED)
	.venv/bin/python -m pytest

check: $(INSTALLED)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: $(INSTALLED)
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: quickstart  ## every benchmark; that of routers reads the quickstart's reward table
	mkdir -p runs
	.venv/bin/evatok bench all --json | tee runs/bench.json

$(INSTALLED): pyproject.toml cluster/requirements.txt
	@test -n '$(PYTHON)' || { echo 'evatok needs Python 3.10, 3.11 or 3.12 with its venv module' >&2; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		-r cluster/requirements.txt -e '.[dev]'
	touch $@
