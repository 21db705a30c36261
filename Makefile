# make demo    the whole job on a small real model and real text: about a quarter of an hour on two quiet cores
# make test    all tests but those of make test-long, which take three quarters of an hour by themselves
# make cluster a Ray head, two workers, SeaweedFS and PostgreSQL on this machine; make cluster-down ends them
# make check   format, lint, types, import rules
# make upgrade the newest versions that pyproject.toml allows into constraints.txt and the images' lock; then `make test`

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-long cluster cluster-down check format upgrade clean

demo: $(STAMP)
	$(BIN)/midiscover sweep demo
	$(BIN)/midiscover features demo
	$(BIN)/midiscover concepts demo --module numbers --module questions
	$(BIN)/midiscover publish demo
	@echo "To query these SAEs over HTTP, with a page for the browser: $(BIN)/midiscover serve"

# Two at a time, but for what must be alone; the slow files come first. Both halves read one finished run. Threads that
# wait must not spin: OpenMP's would take the other's core.
test: $(STAMP)
	set -e; finished=$$(mktemp -d); trap 'rm -rf "$$finished"' EXIT; \
	export MIDISCOVER_TEST_FINISHED="$$finished" OMP_WAIT_POLICY=PASSIVE; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone and not long"; \
	$(BIN)/python -m pytest -m "alone and not long"

# Minutes each, on several Ray nodes: lost nodes, outages, an autoscaler.
test-long: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m long

cluster: $(STAMP)
	$(BIN)/python -m cluster.local up

cluster-down: $(STAMP)
	$(BIN)/python -m cluster.local down

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch by itself first: what else is asked for may admit a newer one, and the one that is there is then left alone.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "miDiscover needs Python 3.11 or newer; set PYTHON=python3.12, say."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@

# Triton is not pinned: each of torch's CUDA builds asks for one of its own.
upgrade:
	rm -rf $(VENV)/upgrade
	$(PYTHON) -m venv $(VENV)/upgrade
	$(VENV)/upgrade/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/upgrade/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)/upgrade/bin/python -m pip install --quiet '.[dev]'
	$(VENV)/upgrade/bin/python -m pip freeze --exclude midiscover | sed 's/+cpu$$//' | grep -v -e '@ file' -e '^triton==' > constraints.txt
	$(VENV)/upgrade/bin/python -m pip install --quiet uv
	(echo "$$(head -1 cluster/requirements.lock)"; $(VENV)/upgrade/bin/uv pip compile pyproject.toml -c constraints.txt \
	    --quiet --generate-hashes --no-emit-index-url --no-header --no-annotate --python-version 3.11 \
	    --python-platform x86_64-unknown-linux-gnu) > $(VENV)/requirements.lock
	mv $(VENV)/requirements.lock cluster/requirements.lock
	rm -rf $(VENV)/upgrade

clean:
	rm -rf $(VENV) build *.egg-info
