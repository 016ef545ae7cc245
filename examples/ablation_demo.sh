#!/usr/bin/env bash
# Which data is worth it, and what the next stage should read: SmolLM2's annealing ablations in miniature, on a laptop.
# bash examples/ablation_demo.sh, after make install; less than three minutes on two cores, fetching the text apart. Killed, it goes on where it was.
#
# The answer is planted, so that you see whether it is found: of four candidates `textbook` is of the kind that is measured,
# and `rubbish` is base64 of pseudo-random bytes (megatron_smol/ablate/demo.py says all of it).
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
STARTED=$SECONDS
step() { printf '\n\033[1m[%s] %s\033[0m\n' "$(date +%H:%M:%S)" "$*"; }

step "1/5 text: documentation, code, worked maths (by pip, once)"
python tools/make_demo_data.py --out data/demo

step "2/5 what is planted, a small tokenizer, tokens"
python -m megatron_smol.ablate.demo data/demo/raw data/ablation-demo

step "3/5 the run in progress: 256,000 tokens, a tenth of them rubbish"
smol train examples/ablation_demo_base.yaml

step "4/5 the ablation: four candidates and the control, two seeds each"
smol ablate examples/ablation_demo.yaml

step "5/5 a proposal for the next stage; nothing is applied"
smol rebalance runs/ablation-demo/base --next decay --tokens 4M --recipe examples/ablation_demo_base.yaml

echo "table again:    smol ablate examples/ablation_demo.yaml --results"
echo "whole ablation: $((SECONDS - STARTED)) s"
