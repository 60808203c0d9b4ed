# make demo       Encode, train, sample and evaluate the bundled data on a CPU in under ten minutes.
# make study      Run the study of docs/study.md: ten methods with five seeds each, in about three hours.
# make test       Run the tests, except those marked `long`, in $(JOBS) processes.
# make test-long  Run all tests.
# make lint       Run ruff and mypy.
#
# Each target first installs the required packages into .venv, if it does not exist or if a
# requirements file has changed since the last installation.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
DATA := data/fashion-mnist
RUN := exps/demo
ASSETS := assets/fashion-mnist
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Use one thread per process, because the tests use small tensors and the processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

.PHONY: demo study test test-long lint
.DELETE_ON_ERROR:

demo: $(VENV)/run
	$(PY) -m preprocessing.encode_latents --source $(ASSETS)/images.zip --dest $(DATA) --resolution 32 --vae $(ASSETS)/vae
	$(PY) train.py --exp-name demo --data-dir $(DATA) --model SiT-Ti/2 --batch-size 64 --max-train-steps 2000 \
	  --learning-rate 1e-3 --ema-decay 0.998 --log-every 20 --checkpointing-steps 250 --sampling-steps 500 --num-workers 0
	$(PY) sample_ddp.py --ckpt $(RUN) --num-fid-samples 2000 --labels balanced --mode ode --heun --num-steps 25 --cfg-scale 1.5 \
	  --per-proc-batch-size 100 --sample-dir $(RUN) --name generated
	$(PY) -m evaluations.curves $(RUN)
	$(PY) -m evaluations.evaluate $(RUN)/generated.npz --reference $(ASSETS)/images.zip --features fashion --out $(RUN)/metrics.json
	@echo "Look at $(RUN)/generated.png and $(RUN)/curves.png"

study: $(VENV)/dev
	$(PY) -m experiments.convergence --scale laptop
	@echo "Look at exps/study-laptop/study.png"

test: $(VENV)/dev
	$(PYTEST) -m "not long"

test-long: $(VENV)/dev
	$(PYTEST)

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: requirements.txt constraints.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt constraints.txt | $(VENV)/bin/python
	$(INSTALL) -r requirements-dev.txt
	@touch $@ $(VENV)/run
