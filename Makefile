# make demo | make test | make run RECIPE=recipes/demo.yaml RUN=runs/demo GPUS=1
# Every target makes its own .venv from requirements.txt first; PYTHON picks the interpreter (3.11 to 3.13).

PYTHON ?= python3
BIN := .venv/bin
RECIPE ?= recipes/demo.yaml
BENCH ?=
RUN ?= runs/$(basename $(notdir $(RECIPE)))
GPUS ?= 1
DEMO := runs/demo

# Idle OpenMP threads that spin slow a busy two-core machine down tenfold.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test run demo-base bench bench-gpu clean

# So small a model takes half as long again on two threads as on one.
demo: .venv/ready
	$(BIN)/python recipes/demo/data.py digits data/demo
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(MAKE) --no-print-directory run RECIPE=recipes/demo.yaml RUN=$(DEMO)

run: .venv/ready
	$(BIN)/python 01_config.py $(RECIPE) $(RUN)
	$(BIN)/python 02_data.py $(RUN)
	$(BIN)/python 03_load_model.py $(RUN)
	$(BIN)/python 04_lora.py $(RUN)
ifeq ($(GPUS),1)
	$(BIN)/python 05_train.py $(RUN)
else
	$(BIN)/torchrun --standalone --nproc-per-node $(GPUS) 05_train.py $(RUN)
endif
	$(BIN)/python 06_save.py $(RUN)

test: .venv/ready
	$(BIN)/python -m pytest tests -q --numprocesses auto --maxprocesses 4 --dist worksteal

# Train the demo's base model again, from random weights (about 10 minutes of training; Fashion-MNIST comes by apt-get).
demo-base: .venv/ready
	$(BIN)/python recipes/demo/data.py base data/demo_base
	$(BIN)/python recipes/demo/make_base.py data/demo_base
	$(MAKE) --no-print-directory run RECIPE=recipes/demo_base.yaml RUN=runs/demo_base

# Our training step against TRL's, on this machine with one thread; bench/README.md says what is fair about it.
bench: .venv-bench/ready
	OMP_NUM_THREADS=1 .venv-bench/bin/python -m bench.against_trl $(BENCH)

# Real sizes with random weights on one GPU, within 10 minutes.
bench-gpu: .venv-bench/ready
	.venv-bench/bin/python -m bench.gpu $(BENCH)

.venv-bench/ready: requirements.txt requirements-bench.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch $@

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else 'Python 3.11 to 3.13 is needed')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-bench runs data
