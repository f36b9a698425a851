# Every target needs Python (3.6 or newer) and make alone.
PYTHON ?= $(shell command -v python3 || command -v python)
RUN = $(PYTHON) -B test_tofupilot_runs.py

help:
	@echo "make demo      the seven subcommands against a server on this machine"
	@echo "make test      the tests with this Python, in a minute or two"
	@echo "make test-all  the tests with every Python from 3.6 to 3.13 that is found"
	@echo "make trials    10,000 kills and faults: nothing lost, nothing twice (long)"
	@echo "make bench     speed and memory as ratios, measured here; PEER_PYTHON= names a"
	@echo "               Python that has the official SDK"
	@echo "make sandbox   a server to try things on, until Ctrl-C"

demo test trials bench sandbox:
	@$(RUN) $@

test-all:
	@$(RUN) test --all

.PHONY: help demo test test-all trials bench sandbox
