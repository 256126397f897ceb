"""The five stages, one after another, as a newcomer runs them: real checkpoints, few samples."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(where: Path, *command: str) -> str:
    """Run a stage in `where`; returns its output, fails with it if the stage fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(path: Path) -> list[dict]:
    """All records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stages_one_to_three_run_with_the_gold_file_deleted(tmp_path):
    """Guards against a stage that reads answers on the quiet: reference-free means it runs where there are none."""
    for name in ("generate.py", "verify.py", "train_prm.py", "grpo.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data/tiny/gold.jsonl").unlink()
    for path in tmp_path.glob("data/tiny/*.jsonl"):
        assert all("answer" not in record for record in records(path))

    out = tmp_path / "runs/tiny"
    run(tmp_path, "generate.py", "--limit", "6")
    solutions = records(out / "solutions.jsonl")
    assert len(solutions) == 6 * 8 and len({s["id"] for s in solutions}) == 6 * 8
    assert all(s["steps"] for s in solutions[:8])

    run(tmp_path, "verify.py", "--num_verifications", "4")
    verifications = records(out / "verify/verifications.jsonl")
    assert len(verifications) == 6 * 8 * 4
    labels = records(out / "verify/labels_step_consistency.jsonl")
    texts = {v["text"] for v in verifications}
    assert all(label["text"] in texts for label in labels if label["dropped"] is None)
    assert sum(label["dropped"] is None for label in labels) > len(labels) / 2

    run(tmp_path, "train_prm.py", "--epochs", "1")
    metrics = records(out / "prm_cot/metrics.jsonl")
    assert metrics[-1]["train/loss"] < 0.5  # it starts from a verifier: what it reads must look familiar

    run(tmp_path, "grpo.py", "--steps", "2", "--batch_size", "4", "--group_size", "4")
    steps = records(out / "grpo/metrics.jsonl")
    assert [s["step"] for s in steps] == [1, 2]
    assert all(s["reward/unparsed"] < 0.2 and s["gap/mean"] < 1e-4 for s in steps)
    assert (out / "grpo/model.safetensors").exists()
