# make demo    images -> latents -> training -> samples -> metrics, on the embedded data (CPU, under ten minutes)
# make study   the study of docs/study.md: six methods, five seeds each (CPU, under two hours)
# make test    the tests          make lint    ruff
# Each builds .venv first, when it is missing or older than the requirements.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DATA := data/fashion-mnist
RUN := exps/demo
ASSETS := assets/fashion-mnist

.PHONY: demo study test lint
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
	$(PY) -m pytest

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/run
