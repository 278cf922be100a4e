# The two lines of the README: `make demo` and `make test`. Everything lives in $(VENV), made once.
PYTHON ?= python3
VENV ?= .venv
PYTEST_PROCESSES ?= 2
IN_PARALLEL := -n $(PYTEST_PROCESSES) --dist worksteal
BIN := $(VENV)/bin
DEMO := build/demo
# pip would compile what it installs file by file, for minutes; this does it on all cores. What cannot be compiled is left.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE := @$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
BUILT := pyproject.toml setup.py $(wildcard cpu_kernels/native/*)  # what an installation is made of, beside Python

.PHONY: demo demo-model test proofs test-all mutations gates lint types clean
.NOTPARALLEL:

demo: $(VENV)/.runs
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/python -m gptoss_jax.generate --show-reasoning "What is 417 + 258?"
	@echo
	@echo "The same model as it would be published, converted as the 20b and the 120b are, and run:"
	@echo
	$(BIN)/python -m converters.export "$$($(BIN)/python -m gptoss_jax.runtime.demo_model)" $(DEMO)/published
	$(BIN)/python -m converters.convert $(DEMO)/published $(DEMO)/checkpoint --verify
	$(BIN)/python -m gptoss_jax.generate --checkpoint $(DEMO)/checkpoint --reasoning-effort high "What is 47 * 36?"

# The model in the package, made anew: data, training, examination, archive; interrupted, it goes on.
demo-model: $(VENV)/.develops
	PYTHON=$(BIN)/python demo/make.sh

# What a contributor needs, in 10 to 14 minutes on two cores; docs/testing.md says what each folder of tests holds.
test: lint types
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "unit or commands"

# Interpreted kernels for GPUs and TPUs, the parity gate and its mutations, meshes, batch invariance, sanitizers.
proofs: $(VENV)/.develops
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "accelerators or proofs"

test-all: test proofs

# 100,000 broken harmony streams through the parser, as many well-formed ones beside openai-harmony, and 10,000 broken
# ones up to what people see of them; about 12 minutes.
mutations: $(VENV)/.develops
	$(BIN)/python -m pytest tests/unit/test_parser.py tests/unit/test_answer_view.py -k "mutations or well_formed" --hypothesis-profile=full

# What needs other wheels: comparisons with transformers, PEFT and llama.cpp, run live (any CPU build of torch will do),
# GGUF files, jobs on Ray, and the vendors' compilers for GPUs and TPUs, in a folder of their own: JAX would look for devices otherwise.
gates: $(VENV)/.gates $(VENV)/.npm $(VENV)/.compilers
	$(BIN)/python -m pytest -m live
	PYTHONPATH=$(VENV)/compilers $(BIN)/python -m pytest $(IN_PARALLEL) -m compilers

lint: $(VENV)/.develops
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.develops
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis cpu_kernels/*.so
	find gptoss_jax pallas_kernels cpu_kernels converters demo benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: each is written last, so what was interrupted is done again, and a changed pyproject.toml is installed again.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed: name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runs: $(VENV)/.created $(BUILT)
	@echo "Installing gptoss-jax and what it needs into $(VENV); the first time this takes minutes."
	$(INSTALL) --editable .
	$(COMPILE)
	@touch $@

$(VENV)/.develops: $(VENV)/.created $(BUILT)
	@echo "Installing gptoss-jax and its development tools into $(VENV); the first time this takes minutes."
	$(INSTALL) --editable '.[dev]'
	$(COMPILE)
	@touch $@

$(VENV)/.gates: $(VENV)/.develops
	@echo "Installing torch, transformers, PEFT, gguf, llama.cpp and ray into $(VENV); the first time this takes minutes."
	$(INSTALL) 'torch==2.13.0' 'transformers>=5.23,<6' accelerate 'peft>=0.19,<0.22' 'gguf>=0.19,<0.20' 'xllamacpp>=2026.10,<2027' --editable '.[dev,ray]'
	$(COMPILE)
	@touch $@

# Without npm, or its registry, the tests of clients for Node are skipped, and say so.
$(VENV)/.npm: $(VENV)/.created
	-@npm install --silent --no-audit --no-fund --prefix $(VENV)/npm openai@7 @openai/agents@0.20 zod@4 && touch $@

$(VENV)/.compilers: $(VENV)/.develops
	@echo "Installing compilers for GPUs and TPUs into $(VENV)/compilers; the first time this takes minutes."
	$(BIN)/python -m benchmarks.compilers | xargs $(INSTALL) --no-deps --target $(VENV)/compilers
	@touch $@
