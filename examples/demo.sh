#!/usr/bin/env bash
# The whole of SmolLM2's recipe in miniature, on a laptop: text in, a Hugging Face model out. `make demo` runs this.
# About 5 minutes on two cores the first time (the data is fetched once); what is already there is not done again.
#
# The same six steps train the 1.7B on 256 H100s: only the recipe and the launcher differ (README, "to 256 GPUs").
set -euo pipefail
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1   # everything the demo needs is local

DATA=data/demo RUN=runs/demo RECIPE=examples/demo.yaml
STARTED=$SECONDS
step() { printf '\n\033[1m[%s] %s\033[0m\n' "$(date +%H:%M:%S)" "$*"; }

echo "make demo: about 5 minutes on two cores, then at once"

step "1/6 text and tokenizer: documentation, code, worked maths (by pip, once)"
python tools/make_demo_data.py --out $DATA

step "2/6 text to tokens"
for source in docs code math textbook; do
  smol preprocess $DATA/raw/$source.jsonl --output $DATA/$source --tokenizer $DATA/tokenizer --overwrite
done

step "3/6 the plan: what will be read, when, at which learning rate"
smol plan $RECIPE

step "4/6 training: six stages in one job, two ranks of megatron-core"
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m megatron_smol train $RECIPE

step "5/6 to Hugging Face, logits compared"
smol convert to-hf $RUN $RUN/hf --overwrite
smol generate $RUN/hf --max-new-tokens 40 --json $RUN/samples.json \
  "To create a new model, you can use" "The following example"

step "6/6 report"
smol report $RUN

python tools/demo_summary.py $RUN
echo "whole demo: $((SECONDS - STARTED)) s"
