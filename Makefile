# Each target makes its own virtual environment; PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
# The release that figures were measured with. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes pip take
# its CPU build, which is gigabytes smaller. On a GPU machine: make demo TORCH=torch
TORCH ?= torch==2.13.0
# Another release to test against: make clean test TRANSFORMERS='transformers==5.17.*'
TRANSFORMERS ?= transformers

.PHONY: demo test serve-test docs release clean

demo: .venv-demo/ready
	.venv-demo/bin/python docs/examples/demo.py

# The tests and the type checker see the installed wheel, as a user's machine does.
test: .venv-test/ready
	rm -rf build
	.venv-test/bin/pip install --quiet --no-deps --force-reinstall .
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy -p mha2mla
	.venv-test/bin/mypy benchmarks
	.venv-test/bin/python -m pytest -q -n 2 --dist loadgroup

# Exports in real engines, vLLM on the CPU and llama.cpp: 3.5 GB in a virtual environment of their own.
serve-test: .venv-test/ready .venv-serve/ready
	rm -rf build
	.venv-test/bin/pip install --quiet --no-deps --force-reinstall .
	SERVE_PYTHON=$(CURDIR)/.venv-serve/bin/python .venv-test/bin/python -m pytest -q tests/serving

# The documentation site, in site/; a link that leads nowhere is an error. To look at it: .venv-docs/bin/mkdocs serve
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/.venv-docs/bin:$$PATH" mkdocs build --strict

# What would be published, in dist/: the sdist and the wheel made of it, checked, and the wheel run in an environment
# that holds nothing but what it asks for.
release: .venv-release/ready
	rm -rf build dist .venv-wheel
	.venv-release/bin/python -m build
	.venv-release/bin/twine check --strict dist/*
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install --quiet $(TORCH) dist/*.whl
	PATH="$(CURDIR)/.venv-wheel/bin:$$PATH" python tests/smoke.py

.venv-demo/ready: pyproject.toml
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/pip install --quiet $(TORCH)
	.venv-demo/bin/pip install --quiet --editable '.[gguf]'
	touch $@

.venv-test/ready: pyproject.toml
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet $(TORCH)
	rm -rf build
	.venv-test/bin/pip install --quiet '.[dev,gguf,eval]' '$(TRANSFORMERS)'
	touch $@

.venv-serve/ready: tests/serving/requirements.txt
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --quiet $(TORCH)
	.venv-serve/bin/pip install --quiet --no-deps --require-hashes --requirement tests/serving/requirements.txt
	touch $@

.venv-docs/ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --requirement docs/requirements.txt
	touch $@

.venv-release/ready:
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet build twine
	touch $@

clean:
	rm -rf .venv-demo .venv-test .venv-serve .venv-docs .venv-release .venv-wheel site .cache out build dist src/*.egg-info
