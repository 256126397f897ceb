#!/usr/bin/env bash
# The main job: all five stages on the tiny world, one after another. No network, no GPU.
#
#   bash data/tiny/run.sh            # into runs/tiny, with the numbers of each stage's TINY dict
#   bash data/tiny/run.sh --short    # into runs/short, a smaller copy that shows that everything runs
#
# Each stage can be stopped and started again: what is done is kept.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Keep freed memory instead of giving it back: page faults cost a small model on a CPU a fifth of its time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

out=runs/tiny
generate=() verify=() train=() grpo=() benchmark=() processbench=()
if [[ "${1:-}" == --short ]]; then
  out=runs/short
  generate=(--out $out/solutions.jsonl --limit 24)
  verify=(--solutions $out/solutions.jsonl --out $out/verify --num_verifications 4)
  train=(--labels $out/verify/labels_step_consistency.jsonl --epochs 1)
  processbench=(--limit 40 --out $out/processbench.jsonl)
  grpo=(--prm $out/prm_cot --out $out/grpo --steps 4 --heldout_every 2)
  benchmark=(--model $out/grpo data/tiny/policy --limit 40 --out $out/benchmark.jsonl)
elif [[ $# -gt 0 ]]; then
  echo "usage: bash data/tiny/run.sh [--short]" >&2
  exit 2
fi

SECONDS=0
stage() { echo; echo "== $* ($((SECONDS / 60)) min $((SECONDS % 60)) s)"; python "$@"; }

stage generate.py "${generate[@]}"
stage verify.py "${verify[@]}"
stage evaluate.py labels --verifications $out/verify/verifications.jsonl --labels $out/verify/labels_step_consistency.jsonl --out $out/labels.json
stage train_prm.py --kind prm --out $out/prm "${train[@]}"
stage train_prm.py --kind prm_cot --out $out/prm_cot "${train[@]}"
stage evaluate.py processbench --model $out/prm $out/prm_cot --kind prm prm_cot "${processbench[@]}"
stage grpo.py --dump_rollouts "${grpo[@]}"
stage evaluate.py benchmark --greedy "${benchmark[@]}"
stage evaluate.py plot --runs $out/grpo --out $out/curves.png
stage -m data.page --out $out/page.html
echo
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: results in $out, curves in $out/curves.png, a page to look at in $out/page.html"
