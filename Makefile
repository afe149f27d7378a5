# make demo       from nothing to a trained, exported model, in minutes, on two cores or one GPU
# make test       the tests of every push             make test-slow   the ones that take minutes
# make lint       ruff, format check, mypy            make install     only the environment
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# One GPU where there is one, otherwise two CPU processes.
ifeq ($(shell nvidia-smi -L 2>/dev/null | head -c 3),GPU)
LAUNCH := deepspeed --num_gpus 1
else
LAUNCH := DS_ACCELERATOR=cpu deepspeed --num_accelerators 2
endif

# A process a core, each with the tests of whole files, and with one thread, for tensors this small
# gain nothing by threads and lose much where these wait for each other.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-slow lint install

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@echo "== installing requirements.txt into .venv"
	$(PYTHON) -m venv .venv
	pip install --disable-pip-version-check -r requirements.txt
	touch $@

demo: install
	@echo "== 1/6 a made-up corpus in the real formats"
	python -m data_prep.synthetic demo/raw
	@echo "== 2/6 raw files to packed, tokenised shards"
	python -m data_prep --config configs/demo.yaml
	python -m data_prep report demo/data
	@echo "== 3/6 pretraining"
	$(LAUNCH) train/main.py --config configs/demo.yaml
	@echo "== 4/6 the newest checkpoint to a Hugging Face folder"
	python -m model.export "$$(ls -d demo/run/checkpoints/step_* | tail -n 1)" demo/model
	@echo "== 5/6 filling masks with it"
	python -m evaluation.fill_mask demo/model \
	  "In the ED, initial vitals were T 101.0 BP 106/58 [MASK] 115 RR 24 O2 92% RA." \
	  "Hemoglobin was 7.9 g/dL. He was given [MASK] and admitted to MEDICINE." \
	  "ICD 10 code for E11: Type 2 [MASK] mellitus"
	@echo "== 6/6 the report"
	python -m train.report demo/run
	@echo "data: demo/data/rows-512/report.html"
	@echo "model: demo/model"
	@echo "tensorboard: demo/run/tensorboard"
	@echo "report: demo/run/report.html"

test: install
	$(PYTEST) -m "not gpu and not slow"

test-slow: install
	$(PYTEST) -m "slow and not gpu"

lint: install
	ruff check .
	ruff format --check .
	mypy
