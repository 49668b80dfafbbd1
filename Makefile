.DEFAULT_GOAL := help
.PHONY: help install test slow interop lint format types check smoke data

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/'

install:  ## install the project in the active environment, with everything that development needs
	python -m pip install -e ".[dev]"

test:  ## run the tests (a few minutes)
	python -m pytest

slow:  ## run the tests that take minutes or many gigabytes
	python -m pytest -m slow

interop:  ## run the tests against diffusers and transformers (pip install -e ".[interop]" first)
	python -c "import accelerate, diffusers, transformers"
	python -m pytest -m interop

lint:  ## check style and formatting
	ruff check .
	ruff format --check .

format:  ## rewrite the files in the project's style
	ruff check --fix .
	ruff format .

types:  ## check the type hints
	mypy

check: lint types test  ## what has to pass before a change lands

smoke:  ## train and sample tiny models of every kind through the commands (some minutes)
	python -m pytest -m slow --dist load tests/test_main_smoke.py

data:  ## build the emoji pictures that the embedded model was trained on
	python scripts/data/build_emoji.py

bench:  ## measure time, memory and arithmetic of everything (hours on a CPU; ARGS="--quick" in minutes)
	python scripts/bench.py $(ARGS)
