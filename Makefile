# `make demo` and `make test` need Python >= 3.10 with pip and venv, and a C++17 compiler. Everything goes into .venv.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: demo test lint soak wheel clean

demo:
	@$(PYTHON) tools/bootstrap.py demo
	$(VENV)/python tools/demo.py

test:
	@$(PYTHON) tools/bootstrap.py test
	$(VENV)/python -m pytest -q -n 2 --dist loadfile

soak:
	@$(PYTHON) tools/bootstrap.py test
	FASTLATENT_SOAK=1 $(VENV)/python -m pytest -q

lint:
	@$(PYTHON) tools/bootstrap.py lint
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/python tools/readme_tables --check

# A wheel, installed in a clean environment elsewhere and exercised there.
wheel:
	@$(PYTHON) tools/check_wheel.py

clean:
	rm -rf .venv build dist demo
