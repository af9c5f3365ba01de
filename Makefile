# Each target makes its own virtual environment; PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
# The CPU build by default: plain "torch" brings gigabytes of CUDA. On a GPU machine: make demo TORCH=torch
TORCH ?= torch==2.13.0
# Another release to test against: make clean test TRANSFORMERS='transformers==5.17.*'
TRANSFORMERS ?= transformers

.PHONY: demo test clean

demo: .venv-demo/ready
	.venv-demo/bin/python docs/examples/demo.py

# The tests and the type checker see the installed wheel, as a user's machine does.
test: .venv-test/ready
	rm -rf build
	.venv-test/bin/pip install --quiet --no-deps --force-reinstall .
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy -p mha2mla
	.venv-test/bin/python -m pytest -q -n 2 --dist loadgroup

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

clean:
	rm -rf .venv-demo .venv-test .cache out build dist src/*.egg-info
