"""tests/gpu.py finds its own mistakes without a GPU; with one, its parts are tests."""

import subprocess
import sys

import pytest
import torch

QUICK = ["env", "logprob", "attention", "packed", "sampler", "train", "speed", "memory"]


def run(parts: list[str], out) -> str:
    """The report of these parts, by a process of its own: some of them join a process group."""
    command = [sys.executable, "-m", "tests.gpu", "--out", str(out), "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return (out / "gpu.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs for real there")
def test_dry_run(tmp_path):
    """Guards: minutes of a GPU lost to a name that has changed since."""
    report = run(QUICK, tmp_path)
    assert report.count("PASS") > 20 and "FAIL" not in report
    assert all(f"---- {part}" in report for part in QUICK)


@pytest.mark.slow
def test_dry_run_of_the_stages(tmp_path):
    """Guards: commands of the part `tiny` whose flags have changed since."""
    assert run(["tiny"], tmp_path).count("PASS") >= 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("part", ["logprob", "attention", "packed", "sampler", "train", "tiny"])
def test_on_a_gpu(part, tmp_path):
    """Guards: whatever differs on a GPU: kernels, graphs, flash attention, NCCL, bf16."""
    assert "FAIL" not in run([part], tmp_path)
