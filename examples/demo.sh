#!/usr/bin/env bash
# The whole of SmolLM2's recipe in miniature, on a laptop: text in, an evaluated chat model out. `make demo` runs this.
# About 8 minutes on two cores the first time (the data is fetched once); what is already there is not done again.
#
# The same steps train the 1.7B on 256 H100s: only the recipe and the launcher differ (README, "to 256 GPUs").
set -euo pipefail
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1   # everything the demo needs is local

DATA=data/demo RUN=runs/demo RECIPE=examples/demo.yaml
STARTED=$SECONDS
step() { printf '\n\033[1m[%s] %s\033[0m\n' "$(date +%H:%M:%S)" "$*"; }
# done_since MADE FROM...: MADE is there and no older than what it was made from, as make decides.
done_since() { [ -e "$1" ] && [ -z "$(find "${@:2}" -maxdepth 0 -newer "$1")" ] && echo "$1 is there already"; }

echo "make demo: about 8 minutes on two cores, then at once"

step "1/9 text and tokenizer: documentation, code, worked maths (by pip, once)"
python tools/make_demo_data.py --out $DATA

step "2/9 text to tokens"
for source in docs code math textbook; do
  done_since $DATA/$source/manifest.json $DATA/raw/$source.jsonl ||
    smol preprocess $DATA/raw/$source.jsonl --output $DATA/$source --tokenizer $DATA/tokenizer --overwrite
done

step "3/9 the plan: what will be read, when, at which learning rate"
smol plan $RECIPE

step "4/9 training: six stages in one job, two ranks of megatron-core"
OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m megatron_smol train $RECIPE

step "5/9 to Hugging Face, logits compared"
done_since $RUN/hf/config.json $RUN/checkpoints || smol convert to-hf $RUN $RUN/hf --overwrite
done_since $RUN/samples.json $RUN/hf/config.json || smol generate $RUN/hf --max-new-tokens 40 --json $RUN/samples.json \
  "To create a new model, you can use" "The following example"

step "6/9 SFT: questions and answers, 240 conversations"
[ -e $DATA/chat/demo_answers/test.jsonl ] || python tools/make_demo_chat.py --out $DATA/chat
done_since $RUN/sft/tail.json $RUN/hf/config.json $RECIPE || smol sft $RUN/hf --recipe $RECIPE --output $RUN/sft --overwrite

step "7/9 DPO: right answers rather than wrong ones, 120 pairs"
done_since $RUN/dpo/tail.json $RUN/sft/tail.json $RECIPE || smol dpo $RUN/sft --recipe $RECIPE --output $RUN/dpo --overwrite
for question in "On which weekday did May 5, 2022 fall? State the weekday (Monday through Sunday)." \
  "State the final answer to the following arithmetic problem: 12 + 30 ="; do
  printf '\nyou    %s\nmodel  ' "$question"
  smol chat $RUN/dpo --prompt "$question" --temperature 0 --max-new-tokens 30
done

step "8/9 evaluation of the model at the end of every stage: which kind of answer does a question ask for?"
smol eval $RUN --stages --tasks examples/evals/demo_answers.yaml --data-dir $DATA/chat --chat
smol eval --compare $RUN/checkpoints/long-context-* $RUN/dpo

step "9/9 report"
smol report $RUN

python tools/demo_summary.py $RUN
echo "chat        smol chat $RUN"
echo "whole demo: $((SECONDS - STARTED)) s"
