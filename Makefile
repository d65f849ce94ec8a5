# From a bare clone: `make test` and `make bench` set up all they need in .venv.
# With PYTHON=/path/python they use that interpreter and its packages as they are, and add only the in-place build.

PACKAGES := torch==2.13.0 numpy ninja pybind11 pytest pillow setuptools wheel

INTEGRATIONS := torch==2.13.0 diffusers==0.42.1 accelerate==1.15.0 peft==0.21.2 transformers==5.24.0 monai==1.6.1 \
    einops==0.8.2 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 kernels==0.17.2 \
    kernel-abi-check==0.14.1 numpy pytest
# Installed without its dependencies: the file of blocks that is tested needs none of them.
INTEGRATIONS_ALONE := taming-transformers==0.0.1

TORCHES := 2.11 2.12 2.13 2.14

ifdef PYTHON
PY := $(PYTHON)
else
PY := .venv/bin/python
# Named after what is in it, so that another list is installed anew.
READY := .venv/ready-$(shell echo '$(PACKAGES)' | cksum | cut -d' ' -f1)
endif
READY_INTEGRATIONS := .venv-integrations/ready-$(shell \
    echo '$(INTEGRATIONS) $(INTEGRATIONS_ALONE)' | cksum | cut -d' ' -f1)

# The tree comes before any installed ldm_fused, in programs that the tests start too.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

OUT ?= build/gpu
STAGE := correct time
DEVICES := H200 A100 'RTX 4090' T4
# The tests whose result depends on the emulated device. The others are the same on each, and float16 is planned as
# bfloat16 is.
DEVICE_TESTS = (emulated or test_cuda_kernels and not tier and not order and not workload and not every_device) \
    and not torch.float16

.PHONY: help build test test-integrations hf-kernel devices sanitize bench gpu traffic sass mutants wheel \
    wheel-test check-all clean toolkit

help: ## this list
	@echo "ldm_fused. Set-up is part of every target; nothing outside this folder is changed."
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile
	@echo "PYTHON=/path/python uses that interpreter, and whatever torch from 2.11 on it has, in place of .venv."
	@echo "ARGS='...' is handed to pytest, or to the script that the target runs (ARGS=--help lists its options)."
	@echo "The build reads FORCE_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS."

test: build ## build, then run the tests
	$(PY) -m pytest $(ARGS)

# They have a conftest.py of their own, since that of tests/ is for the emulator.
test-integrations: build hf-kernel $(READY_INTEGRATIONS) ## test with diffusers, kernels, PEFT, MONAI, taming, ONNX
	.venv-integrations/bin/python -m pytest --confcutdir tests/integrations tests/integrations $(ARGS)

hf-kernel: toolkit ## build what Hugging Face's kernels package loads, into build/hf-kernel
	@tools/quietly 'Hugging Face kernel' $(PY) tools/hf_kernel.py

devices: build ## test the CUDA kernels as they run on an H200, A100, RTX 4090 and T4, in the emulator
	@for device in $(DEVICES); do echo "== $$device"; \
	    LDM_FUSED_EMULATED_DEVICE="$$device" $(PY) -m pytest -q -k '$(DEVICE_TESTS)' $(ARGS) || exit 1; done

sanitize: $(READY) ## build with sanitizers, apart, and test the CPU and the emulated CUDA kernels
	$(PY) tools/sanitizers.py $(ARGS)

traffic: build ## count the bytes that the CUDA kernels move, in the emulator
	$(PY) tools/traffic.py $(ARGS)

bench: build ## build, then run the benchmark
	$(PY) benchmarks/bench_fused.py $(ARGS)

# Needs nvcc and nvdisasm (all that `cuobjdump -sass` does is to run it), which a part of a toolkit may lack.
sass: toolkit ## compile the CUDA kernels for every architecture; check spills, widths and instructions
ifndef PYTHON
	@PATH="$$PATH:$$CUDA_HOME/bin:/usr/local/cuda/bin:$$(echo .venv/lib/python*/site-packages/nvidia/cu*/bin)"; \
	command -v nvdisasm >/dev/null || $(PY) -m pip install -q nvidia-cuda-nvdisasm
endif
	$(PY) tools/check_sass.py $(ARGS)

mutants: build ## make one mistake at a time in the CUDA kernels, and show that the tests catch it
	$(PY) tools/check_mutants.py

gpu: toolkit ## on a GPU machine STAGE=correct or STAGE=time, of 4 minutes each; both without it; results go to OUT
	@status=0; for stage in $(STAGE); do \
	    $(PY) tools/gpu.py $$stage --out '$(OUT)'/$$stage $(ARGS) || status=1; done; exit $$status

wheel: $(READY) ## a wheel in dist, from the source distribution; CUDA=13 or CUDA=12: with CUDA kernels
	tools/quietly wheel $(PY) tools/build_wheel.py $(if $(CUDA),cu$(CUDA),cpu)

wheel-test: $(TORCHES:%=.venv-torch-%/ready) ## test the wheels in dist with each torch from 2.11 to 2.14
	@ls dist/*.whl >/dev/null 2>&1 || { echo "There is no wheel in dist: run make wheel first."; exit 1; }
	@for torch in $(TORCHES); do for wheel in dist/*.whl; do \
	    tools/test_wheel .venv-torch-$$torch/bin/python "$$wheel" $(ARGS) || exit 1; done; done

check-all: ## what .ci/run checks, and all the repetitions that it leaves out
	.ci/run all

# --force: by itself setuptools goes by file times, and would keep a binary built for another torch; ninja knows better.
# Where there are GPUs, only their architectures are compiled (7.5 is the oldest that CUDA 13 knows).
build: toolkit ## compile ldm_fused/_C.abi3.so
	@archs=$${TORCH_CUDA_ARCH_LIST:-$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	    | awk '/^[0-9.]+$$/ && $$1 >= 7.5' | sort -u | paste -sd';' -)}; \
	TORCH_CUDA_ARCH_LIST="$$archs" tools/quietly build $(PY) setup.py build_ext --inplace --force

# A machine with a GPU needs no CUDA toolkit of its own: .venv takes the compiler of torch's CUDA version.
toolkit: $(READY)
ifdef PYTHON
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "ldm_fused needs Python 3.10 or later, and $(PY) is not."; exit 1; }
else
	@[ -e /proc/driver/nvidia/version ] || nvidia-smi >/dev/null 2>&1 || exit 0; \
	[ "$$FORCE_CUDA" != 0 ] || exit 0; \
	! ls .venv/lib/python*/site-packages/nvidia/cu*/bin/nvcc >/dev/null 2>&1 || exit 0; \
	cuda=$$($(PY) -c 'import torch; print(torch.version.cuda or "")') || exit 1; \
	if [ -n "$$cuda" ] && ! FORCE_CUDA=1 $(PY) setup.py --name >/dev/null 2>&1; then \
	    tools/quietly "compiler of torch's CUDA $$cuda into .venv, for there is no toolkit" \
	        $(PY) -m pip install -q "cuda-toolkit[nvcc,cccl]==$$cuda.*"; \
	fi
endif

.venv/ready-%:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "ldm_fused needs Python 3.10 or later, and python3 is not: name one with PYTHON=/path/python."; exit 1; }
	@python3 -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "python3 cannot make virtual environments: install its venv module (Debian: python3-venv)."; exit 1; }
	@python3 -m venv .venv
	@tools/quietly 'PyTorch and tools into .venv' .venv/bin/python -m pip install -q $(PACKAGES)
	@touch $@

.venv-integrations/ready-%:
	@python3 -m venv .venv-integrations
	@tools/quietly 'libraries into .venv-integrations' .venv-integrations/bin/python -m pip install -q $(INTEGRATIONS)
	@.venv-integrations/bin/python -m pip install -q --no-deps $(INTEGRATIONS_ALONE)
	@touch $@

.venv-torch-%/ready:
	@python3 -m venv .venv-torch-$*
	@tools/quietly 'torch $* into .venv-torch-$*' .venv-torch-$*/bin/python -m pip install -q 'torch==$*.*' \
	    numpy pybind11 pytest
	@touch $@

clean: ## remove what was built (the .venv* stay)
	rm -rf build dist *.egg-info ldm_fused/_C*.so .pytest_cache
	find . -name .venv\* -prune -o -name __pycache__ -type d -exec rm -rf {} +
