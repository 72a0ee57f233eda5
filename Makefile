# make demo   set up, then compress, measure, export, verify and record a real model, publish it and pull it back
# make test   set up, then lint, type-check and run every test
# Both skip what is done. Set-up: about 12 minutes on 2 cores the first time, most of it compiling llama.cpp.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPILED := $(VENV)/.compiled
RUNNER := CMakeLists.txt $(wildcard zoo/runner/csrc/*)
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The header of some GCCs (12.2 for one) says that loading a tile configuration reads 8 of its 64 bytes, so the rest
# may be written too late (PR target/114098): llama.cpp so compiled dies of an illegal instruction where there is AMX.
AMX_IS_BROKEN = grep -q amx_int8 /proc/cpuinfo 2>/dev/null && \
  echo '\#include <immintrin.h>' | c++ -xc++ -mamx-tile -E - 2>/dev/null | grep 'ldtilecfg.*void \*\*' >/dev/null
RECIPE := pipelines/recipes/smollm2-135m-8of16-w4.yaml

.PHONY: demo test lint clean

# What is made here is recorded in a registry of its own, which git ignores, beside the repository's entries.
demo: export ZOO_REGISTRY := .zoo/registry.db
demo: $(READY)
	@echo "== Recording in $$ZOO_REGISTRY, which git ignores, beside the entries of registry.db"
	$(BIN)/zoo registry merge registry.db --prefer ours
	@echo "== Compressing SmolLM2-135M to 8 of 16 weights in 4 bits: 5 to 10 minutes on 2 cores"
	$(BIN)/zoo run $(RECIPE)
	@echo "== Publishing it on a server of its own, pulling it into an empty cache, and generating from that"
	$(BIN)/python -m pipelines.demo $$(sed -n 's/^name: //p' $(RECIPE))
	@echo "== Done. For zoo list, zoo app and all others to know it: export ZOO_REGISTRY=\"\$$PWD/$$ZOO_REGISTRY\""

# A process of the tests that crashes ends them, naming the test; pytest-xdist would wait for ever for its others.
test: $(READY) lint
	@echo "== Tests, those on real models included: about 45 minutes on 2 cores"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(COMPILED): pyproject.toml constraints.txt
	@echo "== Set-up in $(VENV): about 12 minutes the first time (llama.cpp is compiled on $(CORES) cores)"
	@command -v c++ >/dev/null || { echo "No C++ compiler: apt-get install g++"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "This Python cannot make a virtual environment: apt-get install python3-venv"; exit 1; }
	@echo "== PyTorch and the other packages, with llama.cpp compiling beside them"
	@if $(AMX_IS_BROKEN); then \
	  export CFLAGS="$$CFLAGS -mno-amx-int8" CXXFLAGS="$$CXXFLAGS -mno-amx-int8"; anew=--no-cache-dir; fi; \
	CMAKE_BUILD_PARALLEL_LEVEL=$(CORES) $(PIP) wheel $$anew --quiet --no-deps --constraint constraints.txt \
	  --wheel-dir $(VENV)/wheels llama-cpp-python > $(VENV)/llama.log 2>&1 & compiling=$$!; \
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0 \
	  && wait $$compiling || { tail -n 20 $(VENV)/llama.log; exit 1; }
	@touch $@

# Again whenever the runner's C++ has changed: an editable install does not compile it anew.
$(READY): $(COMPILED) $(RUNNER)
	@echo "== This project, its runner compiled"
	@$(PIP) install --quiet --constraint constraints.txt --find-links $(VENV)/wheels \
	  --editable '.[pipelines,app,bench,serve,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist
