# The verbs of the project. `make grpo` and `make test` need nothing set up before.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  := .models/SmolLM2-135M-Instruct.Q4_1.gguf

# A machine with a GPU takes the CUDA pins, every other the CPU pins.
CONSTRAINTS := $(if $(shell command -v nvidia-smi),constraints/gpu.txt,constraints/cpu.txt)
EXTRAS      := dev,train
STAMP       := $(VENV)/.installed
# Test processes side by side, a file each at a time, in the order of the folders: those of few and
# long tests must not be the last. One more than cores, at most 4: much of the suite waits for
# deadlines and other processes. WORKERS=0 runs all in one. (nproc would count OMP_NUM_THREADS.)
WORKERS     ?= $(shell n=$$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || echo 2); [ $$n -gt 3 ] && n=3; echo $$((n + 1)))
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Compiled tests and sources stay for the other test processes and for the servers that tests start,
# whatever the shell says: each would spend most of a minute on them again.
unexport PYTHONDONTWRITEBYTECODE
# Clients of the server, which are large and run on the CPU only.
CLIENTS     := .venv-clients
# What drives the system's Chromium through the dashboard.
BROWSER     := .venv-browser

.PHONY: setup grpo ppo sft serve test test-long test-fast gpu-test clients-test browser-test check format clean help

help:            ## list these verbs
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(STAMP) $(MODEL)   ## create .venv with pinned versions and bring the default model

$(STAMP): pyproject.toml $(CONSTRAINTS) scripts/make_venv.sh
	PYTHON=$(PYTHON) sh scripts/make_venv.sh $(VENV) $(CONSTRAINTS) "$(EXTRAS)"
	@touch $@

$(MODEL): | $(STAMP)
	$(BIN)/python scripts/get_model.py $@

grpo: setup      ## watch the default model learn by GRPO; ARGS="--task addition" passes flags on
	$(BIN)/python recipes/grpo.py --dashboard on $(ARGS)

ppo: setup       ## the same by PPO, with a critic
	$(BIN)/python recipes/ppo.py --dashboard on $(ARGS)

sft: setup       ## watch the default model learn a task's answers, supervised; ARGS as for grpo
	$(BIN)/python recipes/sft.py --dashboard on $(ARGS)

serve: setup     ## serve the default model at port 30000; ARGS="--model PATH --port 30001" has others
	$(BIN)/python -m rollout serve $(if $(findstring --model,$(ARGS)),,--model $(MODEL)) $(ARGS)

test: setup      ## the CPU suite, slow tests included
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not long"

test-long: setup ## the whole fault matrices, of which `make test` runs a slice; TEST_SHARE=0/2 runs half of them
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m long

test-fast: setup ## the suite without the slow tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not long"

gpu-test: setup  ## tests that need a GPU; skipped without one
	$(BIN)/python -m pytest -m "gpu or multi_gpu" -rs

clients-test: $(CLIENTS)/.installed ## TRL, openai, langchain-openai and lm-eval against a server, a fleet on Ray
	$(CLIENTS)/bin/python -m pytest tests/clients tests/rollout/http/vllm/test_trl_client.py -W default

$(CLIENTS)/.installed: pyproject.toml constraints/clients.txt scripts/make_venv.sh
	NO_COMPILE=1 PYTHON=$(PYTHON) sh scripts/make_venv.sh $(CLIENTS) constraints/clients.txt "dev,clients"
	@touch $@

browser-test: $(BROWSER)/.installed ## the dashboard in headless Chromium, which has to be installed; SCREENSHOTS=DIR keeps pictures
	$(BROWSER)/bin/python -m pytest tests/browser -rs

$(BROWSER)/.installed: pyproject.toml constraints/browser.txt constraints/cpu.txt scripts/make_venv.sh
	NO_COMPILE=1 PYTHON=$(PYTHON) sh scripts/make_venv.sh $(BROWSER) constraints/browser.txt "dev,browser"
	@touch $@

check: setup     ## format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: setup    ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove the environment, the model and caches
	rm -rf $(VENV) $(CLIENTS) $(BROWSER) .models .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
