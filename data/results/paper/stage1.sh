#!/usr/bin/env bash
# Stage I (Section 3.1): solutions, verifications, and labels by each method of the paper. After data.sh.
#
#   bash data/results/paper/stage1.sh   # into runs/paper/verify/labels_<method>.jsonl
#
# The verifier wants cards of 141 GB: 80 GB leave space for two answers at a time beside its 61 GiB of weights.
source "$(dirname "$0")/settings.sh"

# ours: the prompt, which asks for <step> tags; the release's asks for numbered prose and a last line "Answer: ...".
# tokens: 8,000 problems x 8 solutions x 8,192 = 524,288,000 by 14B; no rate measured
stage generate.py --model "$generator" --problems data/train/labelled.jsonl --out "$runs/solutions.jsonl" \
  --num_samples 8 --temperature 0.7 --top_p 0.95 --max_new_tokens 8192

# In the released code only: right and wrong solutions in equal numbers, chosen with the answers. To label these, give
# verify.py this file as --solutions, and another --out.
# tokens: none
python -m data.prepare balance --solutions "$runs/solutions.jsonl" --gold data/train/gold/skywork.jsonl \
  --out "$runs/balanced.jsonl"

# Thinking is on, as Qwen3's template has it. ours: the wording of the prompt and its two worked examples.
verify=(--model "$verifier" --solutions "$runs/solutions.jsonl" --out "$runs/verify"
  --temperature 0.8 --top_p 0.95 --max_new_tokens 8192 --worked_examples 2)

# tokens: 64,000 solutions x 16 verifications x 8,192 = 8,388,608,000 by 32B; no rate measured
stage verify.py "${verify[@]}" --method step_consistency --num_verifications 16

# tokens: none, if the 16 verifications are there
stage verify.py "${verify[@]}" --method outcome_consistency --num_verifications 16
stage verify.py "${verify[@]}" --method single --num_verifications 1

# tokens: 64,000 solutions x 2 calls x 8,192 = 1,048,576,000 by 32B for each of the three; no rate measured
# ours: `hybrid` criticises what step consistency chose, as in the released configuration, `hybrid_outcome` what outcome
# consistency chose, as in its README; which of them the paper's row is, is not known.
critique=(--critique_rounds 1 --critique_temperature 0)
stage verify.py "${verify[@]}" "${critique[@]}" --method meta_critique --num_verifications 1
stage verify.py "${verify[@]}" "${critique[@]}" --method hybrid --num_verifications 16
stage verify.py "${verify[@]}" "${critique[@]}" --method hybrid_outcome --num_verifications 16

# tokens: 64,000 solutions x 1 verification x 8,192 = 524,288,000 by 32B; no rate measured
# ours: one verification; the release samples 8 or 16 (its scripts differ) and keeps one, by a rule that is not
# published.
stage verify.py "${verify[@]}" --method reference_guided --num_verifications 1 --answers data/train/gold/skywork.jsonl

# Are the labels right? Gold answers tell it of outcomes, not of steps. The submission has no numbers for it.
# tokens: none
python evaluate.py labels --verifications "$runs/verify/verifications.jsonl" --gold data/train/gold/skywork.jsonl \
  --labels "$runs"/verify/labels_*.jsonl --out "$runs/labels.json"
