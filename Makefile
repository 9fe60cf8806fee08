.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
UV_VERSION := 0.9.30
BIN := .venv/bin
HOME_DIR := $(CURDIR)/.utaforge
READY := .venv/.ready
JOB ?= jobs/demo.yaml
GOLDEN ?= ../shared/golden
PORT ?= 5000
IMAGE ?= utaforge
TAG ?= $(shell git describe --tags --always --dirty)
BASE ?= debian:bookworm-slim
IMAGES := $(if $(REGISTRY),$(REGISTRY)/)$(IMAGE)
COMPOSE := docker compose --file docker/compose.yaml

RAYS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder --durations=10

export UTAFORGE_HOME ?= $(HOME_DIR)
export TORCH_EXTENSIONS_DIR ?= $(HOME_DIR)/cache/torch_extensions

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv and warm the compiled parts

$(READY): requirements.lock pyproject.toml
	@command -v g++ >/dev/null || { echo "no C++ compiler (g++) found; install one, e.g. apt install g++"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "python's venv module is missing; install it, e.g. apt install python3-venv"; exit 1; }
	@echo "installing: torch, ray, deepspeed, mlflow and the rest into .venv (about 6 GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/python -W ignore -m compileall -q -j 0 -x '/tests?/' .venv/lib || true
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@echo "compiling DeepSpeed's communication op (once)"
	@$(BIN)/python -m trainer.engine --warm
	@touch $@

submit: $(READY) ## run a job: make submit JOB=jobs/demo.yaml (DRY_RUN=1: print what would be sent)
	@$(BIN)/utaforge submit $(JOB) $(if $(DRY_RUN),--dry-run,--yes)

plan: $(READY) ## what a job will take: make plan JOB=…
	@$(BIN)/utaforge plan $(JOB)

prepare: $(READY) ## make the shards of a job: make prepare JOB=…
	@$(BIN)/utaforge prepare $(JOB)

list: $(READY) ## all runs
	@$(BIN)/utaforge list

doctor: $(READY) ## what is missing on this machine, and the cure
	@$(BIN)/utaforge doctor

ui: $(READY) ## MLflow on http://127.0.0.1:5000 (PORT=… for another port)
	@$(BIN)/python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT))).close()' 2>/dev/null || \
		{ echo "port $(PORT) is in use; choose another: make ui PORT=5001"; exit 1; }
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --workers 1 --host 127.0.0.1 --port $(PORT) --backend-store-uri sqlite:///$(UTAFORGE_HOME)/mlflow.db \
		--artifacts-destination $(UTAFORGE_HOME)/mlartifacts

test: $(READY) ## all tests but those on Kubernetes (RAYS=1: one Ray at a time, for slow machines)
	@$(PYTEST) --numprocesses 2 -m "not ray"
	@$(PYTEST) --numprocesses $(RAYS) -m ray tests/cluster

test-kubernetes: $(READY) ## tests on a real Kubernetes (as root on Debian), or on that of KUBECONFIG
	@$(BIN)/python -m pytest tests/kubernetes --timeout=1800 -o timeout_func_only=true --durations=15

cluster-up: $(READY) ## bring up that Kubernetes; the tests do it too
	@$(BIN)/python -m tests.kubernetes.cluster up

cluster-down: $(READY) ## end it
	@$(BIN)/python -m tests.kubernetes.cluster down

check: $(READY) ## lint, types, layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/hadolint --config docker/hadolint.yaml $$(git ls-files '*Dockerfile')

fix: $(READY) ## what the linters can repair
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

image: ## build the images utaforge-trainer and utaforge-launcher (BASE=nvidia/cuda:… REGISTRY=host/project PUSH=1 BUILD="--secret …")
	@mkdir -p $(UTAFORGE_HOME)/images
	@$(call build,trainer,--build-arg BASE=$(BASE))
	@$(call build,launcher)

define build
set -e; image=$(IMAGES)-$(1):$(TAG); \
DOCKER_BUILDKIT=1 docker build $(BUILD) $(2) --build-arg UV_VERSION=$(UV_VERSION) --file docker/Dockerfile --target $(1) --tag $$image \
	--label org.opencontainers.image.title=utaforge-$(1) \
	--label org.opencontainers.image.description="Fine-tune open music models on a Ray cluster from one YAML file" \
	--label org.opencontainers.image.licenses=Apache-2.0 \
	--label org.opencontainers.image.version=$(TAG) \
	--label org.opencontainers.image.revision=$$(git rev-parse HEAD) \
	--label org.opencontainers.image.created=$$(git log -1 --format=%cI) \
	$(if $(SOURCE),--label org.opencontainers.image.source=$(SOURCE)) .; \
docker run --rm --network none $$image cat /usr/share/doc/utaforge/sbom.json > $(UTAFORGE_HOME)/images/utaforge-$(1).cdx.json; \
$(if $(PUSH),docker push $$image;) \
echo "$$image, its parts in $(UTAFORGE_HOME)/images/utaforge-$(1).cdx.json"
endef

up: docker/.env ## MLflow, PostgreSQL and an S3 server on this machine's loopback, by Docker
	@$(COMPOSE) up --detach --wait

down: ## end what `make up` started; its data stay
	@$(COMPOSE) down

docker/.env:
	@umask 077; for name in DATABASE_PASSWORD S3_ACCESS_KEY S3_SECRET_KEY; do \
		echo "$$name=$$($(PYTHON) -c 'import secrets; print(secrets.token_hex(16))')"; done > $@
	@printf 'MLFLOW_ENABLE_PROXY_MULTIPART_%s=false\n' UPLOAD DOWNLOAD >> $@

bench: $(READY) ## measure, and write tests/bench/results
	@$(BIN)/python -m tests.bench

bench-gpu: $(READY) ## LoRA steps beside plain PEFT, on the GPU if there is one: make bench-gpu FAMILIES="musicgen songbloom"
	@$(BIN)/python -m tests.bench.gpu $(FAMILIES)

bench-launcher: $(READY) ## how long plan, status, why, list and a submit to Kubernetes take
	@$(BIN)/python -m tests.bench launcher $(if $(KUBECONFIG),kubernetes)

demo-base: $(READY) ## make builtin:pocket again (codebooks and base network)
	@$(BIN)/python -m trainer.builtin

goldens: $(READY) ## write committed copies again: upstream's cases (from GOLDEN=../shared/golden) and the job schema
	@for case in $$(cd $(GOLDEN) && ls -d */*/); do \
		mkdir -p tests/golden/cases/$$case && cp --no-preserve=mode $(GOLDEN)/$$case* tests/golden/cases/$$case; done
	@$(BIN)/utaforge schema -o jobs/job.schema.json
	@git diff --stat -- tests/golden jobs/job.schema.json

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header pyproject.toml

lock: $(READY) ## resolve requirements.lock again, and from it what the images hold
	@$(COMPILE) --upgrade --all-extras -o requirements.lock
	@$(COMPILE) --no-annotate --constraint requirements.lock $(addprefix --extra ,train audio ray tracking s3) -o requirements-trainer.lock
	@$(COMPILE) --no-annotate --constraint requirements.lock --extra kubernetes -o requirements-launcher.lock

clean: ## remove .venv and caches; runs, datasets and MLflow's records stay
	@rm -rf .venv .utaforge/cache

.PHONY: help setup submit plan prepare list doctor ui test check fix bench bench-gpu demo-base goldens lock clean test-kubernetes cluster-up cluster-down image up down bench-launcher
