# make install     .venv with everything
# make quickstart  train a tiny Llama in BF16, FP8 and NVFP4, evaluate, compare: table, plot, model card
# make test        what CI runs: ruff, then the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs/quickstart
RECIPES := bf16 fp8 nvfp4

.PHONY: install quickstart test clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[scripts,dev]'
	touch $@

quickstart: install
	for recipe in $(RECIPES); do \
		$(BIN)/python scripts/train.py --recipe $$recipe --output_dir $(RUNS)/$$recipe --overwrite_output_dir || exit 1; \
	done
	$(BIN)/python scripts/evaluate.py $(RECIPES:%=$(RUNS)/%) --precision as-trained bf16
	$(BIN)/python scripts/report.py $(RECIPES:%=$(RUNS)/%) --output $(RUNS)

# Many small tensors: one thread a process is fastest, and two processes use both cores. Without a GPU the kernels run
# in Triton's interpreter, and are compiled for every architecture.
test: install
	$(BIN)/ruff check .
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	$(BIN)/python scripts/compile_kernels.py --arch 80 89 90 100 120

clean:
	rm -rf $(VENV) runs build *.egg-info
