python := .venv/bin/python

.PHONY: demo test lint format clean

demo: .venv/ready    ## SGD and SWA side by side on digits
	$(python) -W ignore::FutureWarning -m fastai_swa demo

test: .venv/ready    ## the whole suite, notebooks included
	$(python) -m pytest

lint: .venv/ready
	$(python) -m ruff check .
	$(python) -m ruff format --check .

format: .venv/ready
	$(python) -m ruff format .

.venv/ready: setup.cfg
	test -x $(python) || python3 -m venv .venv
	$(python) -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
