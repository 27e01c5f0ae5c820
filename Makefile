# Everything runs in .venv; `make demo` installs only what the demo needs, `make setup` all that developing needs.

# The first of these that is new enough. Name another: make setup PYTHON=/path/to/python3
NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python $(NEW_ENOUGH) 2>/dev/null && echo $$python && break; done)
# From an index of CPU builds where pip has one: on Linux the ordinary wheel brings gigabytes of CUDA along.
TORCH ?= torch==2.13.0

BIN = .venv/bin
# The package lies in three folders. A strict editable install makes one of them, of links, which Python, mypy and
# editors see. Where only files came or went, the links are made again (seconds) and nothing is resolved.
EDITABLE = --no-build-isolation --config-settings editable_mode=strict
install = $(PIP) install $(EDITABLE) -e '.[cpu,$(1)]'
LINKED = $(firstword $(wildcard build/__editable__*))
FOLDERS = $(shell find src convert apps -type d -not -name __pycache__ -not -name '*.egg-info' -not -path 'apps/ios/*')
PIP = $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.NOTPARALLEL:
SWIFT = apps/ios/swift.sh
# Files of tests in this many processes; each may hold a gigabyte or two.
WORKERS ?= 2
SIDE_BY_SIDE = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
CHAT = apps/ios/HierMemChat/Sources
VITAL = apps/demo/vital
LEARN_VITAL = mkdir -p build && cat $(VITAL)/study*.jsonl.gz > build/study.jsonl.gz && \
	$(BIN)/python tests/replay.py build/study.jsonl.gz \
	$(BIN)/hiermem learn $(VITAL)/documents.jsonl --teacher-url {url} --config $(VITAL)/learn.toml
# What is no measurement, is given its corpus or model, or is for Linux alone.
OTHER = common banks material cpu_tricks labels learn_corpora learn_settings editing elements_ways evaluation_equality \
	followups harm history knowledge plans plot plot_replication rare_words reach replication retrieval \
	settings_replication sources
# What has a small form that takes seconds; the rest of benchmarks/ takes minutes however little is asked for.
QUICK = fetch growth hidden_fetch swap decode minilm start

# Hostile files, processes that die, disks that fail: `make torture INPUTS=1000000 TRIALS=1000 KILLS=200`. The default
# takes some ten minutes on a quiet machine.
INPUTS ?= 10000
TRIALS ?= 200
KILLS ?= 3

.PHONY: help setup demo test test-fast test-swift torture lint elements vital vital-large bench bench-quick

help:  ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/dev.stamp .venv/links.stamp  ## make .venv with everything for developing

demo: .venv/demo.stamp .venv/links.stamp  ## the tour on real weights; works on a fresh clone
	$(BIN)/hiermem demo

test: setup  ## run all tests, on tiny random models and on the real weights
	$(BIN)/python -c 'from mlx_hiermem.assets import ASSETS, fetch; [fetch(name, print) for name in ASSETS]'
	$(BIN)/python -m pytest -rs $(SIDE_BY_SIDE)

test-fast: setup  ## run the tests that need no real weights, no browser and little time
	$(BIN)/python -m pytest -m unit $(SIDE_BY_SIDE)

test-swift: setup  ## build and test the Swift package; on Debian, .ci/swift-root makes a root with Swift
	$(BIN)/python tests/swift_goldens.py --real build/swift
	$(BIN)/python tests/torture/swift.py --write --inputs 1200
	$(SWIFT) swift test -Xswiftc -O
	$(SWIFT) swiftc -parse $(CHAT)/*.swift
	$(SWIFT) swiftc -typecheck -swift-version 6 -I .build/debug/Modules $(CHAT)/Assistant.swift

torture: setup  ## hostile files, deaths, failing disks, many clients (INPUTS, TRIALS and KILLS set the scale)
	$(BIN)/python tests/torture/fuzz.py --inputs $(INPUTS)
	if [ -e .build/debug ]; then $(BIN)/python tests/torture/swift.py --inputs $(INPUTS); fi
	$(BIN)/python tests/torture/processes.py --trials $(TRIALS)
	$(BIN)/python tests/torture/kills.py --kills $(KILLS)
	$(BIN)/python tests/torture/kills.py --kills $(KILLS) --how full read-only eio short slow
	$(BIN)/python tests/torture/memory.py
	$(BIN)/python tests/torture/clients.py

lint: setup  ## check style, format, types, and the page of commands
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	MYPYPATH=$(LINKED) $(BIN)/mypy
	$(BIN)/python docs/make_commands.py --check

elements: setup  ## learn the bank of tests/elements again from its corpus (an hour or more, resumes)
	mkdir -p build
	$(BIN)/python tests/elements/wordings.py > build/prompts.jsonl
	$(BIN)/hiermem learn tests/elements/elements.jsonl build/elements --config tests/elements/elements.toml \
		--prompts build/prompts.jsonl

vital: setup  ## learn the 480 articles of apps/demo/vital from their stored study (hours, resumes)
	$(LEARN_VITAL) build/vital
	$(BIN)/hiermem bank quantize build/vital build/vital-4bit --bits 4

vital-large: setup  ## the same with larger blocks, 480 MB
	$(LEARN_VITAL) build/vital-large --config $(VITAL)/large.toml

bench: .venv/bench.stamp  ## measure everything (hours; results in benchmarks/results/)
	@for file in $(filter-out $(OTHER:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do \
		echo "== $$file"; $(BIN)/python $$file || exit 1; done
	@$(BIN)/python benchmarks/plot.py

bench-quick: .venv/bench.stamp  ## measure speed in little (two minutes)
	@for name in $(QUICK); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

.venv/bin/python:
	@$(or $(PYTHON),false) $(NEW_ENOUGH) || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade pip 'setuptools>=77'

.venv/demo.stamp: pyproject.toml | .venv/bin/python
	$(call install,demo)
	@touch $@ .venv/links.stamp

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(PIP) install '$(TORCH)'
	$(call install,dev)
	@$(call install,coreai) || echo 'Core AI is left out: its packages are for macOS 26, and for Linux on x86-64'
	@touch $@ .venv/demo.stamp .venv/links.stamp

.venv/links.stamp: $(FOLDERS)
	$(PIP) install --quiet --no-deps $(EDITABLE) -e .
	@touch $@

.venv/bench.stamp: .venv/dev.stamp
	$(call install,bench)
	@touch $@
