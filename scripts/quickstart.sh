#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M-Instruct on dialogues of real people and shows what it learned.
#
#   ./scripts/quickstart.sh
#
# Creates .venv, assets/ and runs/quickstart/ in the checkout, whatever the working directory. The script is idempotent:
# finished steps are skipped, and a stopped run resumes from its last checkpoint. PYTHON names the interpreter to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Silence the warning of transformers that PyTorch is missing; it is not needed here.
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1

# Large pages for large arrays, where glibc and the kernel support them: saves a tenth of a step on a CPU.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

run=runs/quickstart
model=assets/smollm2-135m-instruct
python=.venv/bin/python
command=.venv/bin/dialog_jax
held_out=assets/chitchat/validation.jsonl

step() { printf '\n== %s\n' "$*"; }

step "1/6 environment"
scripts/setup_environment.sh
"$python" -c 'import sys, jax; print(f"Python {sys.version.split()[0]}, JAX {jax.__version__} on {jax.devices()[0].device_kind}")'

step "2/6 model and dialogues"
"$python" scripts/prepare_demo.py --assets_dir=assets

step "3/6 training"
"$command" train --config=experiments/quickstart.py --output_dir="$run"

step "4/6 export"
"$command" export --run="$run" --out="$run/model"

step "5/6 plot"
"$command" plot --run="$run"

step "6/6 one held-out dialogue, before and after"
if [[ ! -f $run/compare.txt || $run/compare.txt -ot $run/model/export.json ]]; then
  "$command" compare --models="$model,$run/model" --config.data.train="$held_out" \
    --index=36 --turn=2 >"$run/compare.unfinished"
  mv "$run/compare.unfinished" "$run/compare.txt"
fi
cat "$run/compare.txt"

cat <<END

== Done. In $PWD:
  $run/plot.png           loss over steps; held-out loss by turn, before and after
  $run/model/             the model, for Hugging Face transformers, vLLM and the commands below
  $run/compare.txt        the replies above
  $run/metrics.jsonl      one line per step;  $run/evaluation.jsonl  held-out figures
  $run/checkpoints/       train states to resume from

Next:
  chat with it      $command chat --config.model=$run/model
  score a file      $command score --config.model=$run/model --config.data.train=$held_out --out=scores.jsonl
  train your own    $command train --config.model=$model --config.data.train=my.jsonl --output_dir=runs/mine
  the full run      $command train --config=experiments/chitchat.py --output_dir=runs/chitchat
                      (for a GPU or TPU; the README says how to install for one)
END
