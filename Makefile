python := .venv/bin/python
lowest := .venv-lowest/bin/python

.PHONY: demo test test-lowest docs lint format clean

demo: .venv/ready    ## SGD and SWA side by side on digits
	$(python) -m fastai_swa demo

test: .venv/ready    ## the whole suite, notebooks included
	$(python) -m pytest

test-lowest: .venv-lowest/ready    ## the core tests, with the lowest versions supported
	$(lowest) -m pytest -m core

docs: .venv/docs    ## the site, in build/site
	$(python) -W ignore -m sphinx -W --keep-going -q -c docs . build/site
	@echo 'build/site/index.html'

.venv/docs: .venv/ready
	$(python) -m pip install --quiet --editable '.[docs]'
	touch $@

lint: .venv/ready
	$(python) -m ruff check .
	$(python) -m ruff format --check .

format: .venv/ready
	$(python) -m ruff format .

.venv/ready: setup.cfg
	test -x $(python) || python3 -m venv .venv
	$(python) -m pip install --quiet --editable '.[dev]'
	touch $@

.venv-lowest/ready: setup.cfg constraints-lowest.txt    # with the lowest Python, where the machine has it
	test -x $(lowest) || python3.10 -m venv .venv-lowest 2> /dev/null || python3 -m venv .venv-lowest
	$(lowest) -m pip install --quiet --editable '.[dev]' --constraint constraints-lowest.txt
	touch $@

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info
