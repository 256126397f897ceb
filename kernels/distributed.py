"""What a reader may skip who thinks of a single process: errors and signals, ranks and their collectives, FSDP2.

Here belong: how a stage ends (`InputError`, `RunError`, `run_stage`, signals); the processes that torchrun started, their
numbers, their shares of the work and collectives; a model's weights across them: sharding, checkpoints, copies.
"""

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from kernels.transformer import Transformer, save_model

import torch
import torch.distributed as dist
from torch import Tensor

# --------------------------------------------------------------------------- how a stage ends


class InputError(ValueError):
    """A user error; its message says what is wrong and how to fix it. `run_stage` prints it as one line."""


class RunError(RuntimeError):
    """A run that can't continue: it diverged, a checkpoint can't be written, or the sampler and the trainer disagree.
    `run_stage` prints it as one line."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main. User errors, failed runs, disk-full and other file errors, and out-of-memory errors of a GPU
    become one line on stderr and exit status 2; anything else is a bug and keeps its traceback."""
    try:
        main()
    except (InputError, RunError) as error:
        message = str(error)
    except torch.OutOfMemoryError as error:
        advice = "lower --slots (rows of the KV cache); in training --micro_tokens, or add --activation_checkpointing"
        message = f"{str(error).splitlines()[0]} {advice}"
    except OSError as error:
        # Files are replaced as a whole and records are appended line by line, so this holds whatever has failed.
        message = f"{error}; what was saved before is intact, and the same command resumes once this is fixed"
    else:
        # Only on success: the call is collective and would hang a failing rank.
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --------------------------------------------------------------------------- processes


def init_distributed(device: str | None = None) -> torch.device:
    """Choose this process's device, and join the process group if torchrun started it.

    device: "cpu" or "cuda"; None: cuda if available. Under torchrun a process uses the GPU of its local rank.
    Raises InputError if there is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    message = f"--device {device}: no such device; use cpu or, if available, cuda"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(message) from None
    if found.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", found.index or 0))
        if index >= torch.cuda.device_count():  # the count is 0 in a build without CUDA
            raise InputError(message)
        found = torch.device("cuda", index)
        torch.cuda.set_device(found)  # streams, CUDA graphs and NCCL use the current device

    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # By default a collective fails after some minutes, but a rank that finishes early may wait for hours.
        timeout = timedelta(days=1)
        if found.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=found)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return found


def rank() -> int:
    """This process's number among those that torchrun started; 0 without torchrun."""
    if dist.is_initialized():
        return dist.get_rank()
    return 0


def world_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    if dist.is_initialized():
        return dist.get_world_size()
    return 1


def barrier() -> None:
    """Wait until every rank gets here; nothing without torchrun."""
    if dist.is_initialized():
        dist.barrier()


def log(*values: object) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(*values, flush=True)


def stop_on_signal() -> list[int]:
    """Record SIGTERM and Ctrl-C in the returned list instead of ending the process, so that the loop that reads the list
    can finish its step, save and stop; the same command resumes from there."""
    signals: list[int] = []

    def note(number: int, _) -> None:
        signals.append(number)
        if rank() == 0:
            # Not print(): the signal may have interrupted another print(), which can't be entered twice.
            os.write(2, b"\nstopping after this step\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return signals


def work_queue(count: int, name: str) -> Iterator[list[int]]:
    """Shared work queue: each rank repeatedly takes a batch of the indices 0 ... count - 1, until none are left.

    A batch is half of an equal share of what is left, so that the ranks come back seldom at first and finish at about the
    same time. 10 indices, 2 ranks, in the order in which batches are taken, by whichever rank:

        left    10    8     6   5   4   3   2   1
        batch   0 1   2 3   4   5   6   7   8   9

    name: a different one for each queue of a run.
    """
    if not dist.is_initialized():
        if count > 0:
            yield list(range(count))
        return
    # The ranks share a counter of the indices taken so far. It lives in the key-value store that the process group was
    # made with. PyTorch has no public function that returns it, and another store would need an address of its own.
    store = dist.distributed_c10d._get_default_store()
    counter = f"work_queue/{name}"
    while True:
        left = count - store.add(counter, 0)  # adding 0 reads the counter
        batch_size = max(1, left // (2 * world_size()))
        # `add` is atomic and returns the new value, so no two ranks get the same indices.
        end = store.add(counter, batch_size)
        start = end - batch_size
        if start >= count:
            return
        yield list(range(start, min(end, count)))


def gather(mine: list) -> list:
    """Undo `everything[rank()::world_size()]`: what all ranks have, in order, on every rank."""
    if world_size() == 1:
        return mine
    parts: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def free_cached_memory() -> None:
    """Give a GPU's cached memory back after the samplers' caches have been freed. If PyTorch kept it, the optimizer's state
    would come to lie in between, and the next caches, of another size, might find no piece that is large enough."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over all ranks."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: float) -> float:
    """The largest of all ranks' values."""
    if world_size() == 1:
        return value
    most = torch.tensor(value, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


# --------------------------------------------------------------------------- weights: FSDP2, copies, checkpoints


def prepare_training(model: Transformer, checkpointing: bool) -> Transformer:
    """Shard the model over all ranks (FSDP2), fp32 master weights with bf16 compute on GPUs.

    Master weights are fp32 because a step of 1e-6 changes hardly any bf16 weight. A single CPU process stays as it is.
    """
    model.train()
    model.checkpointing = checkpointing
    if world_size() == 1 and model.device.type == "cpu":
        # Saving a checkpoint would warn of it every time, but one process is what is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        return model
    if not dist.is_initialized():  # one GPU without torchrun: a group of one
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=model.device)
    # Named, because FSDP would choose a GPU wherever PyTorch was built for one, for a model on the CPU, too.
    from torch.distributed.device_mesh import init_device_mesh  # here, so that commands that train nothing start fast
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if model.device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # What is frozen has no backward pass, which is where the root's weights would be shared out again.
    frozen = not any(p.requires_grad for p in model.parameters())
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True if frozen else None)


def gather_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight) one at a time, so that no rank needs room for all; under FSDP every rank must take part."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_weights(inference: Transformer, model: Transformer) -> None:
    """Copy the trained weights into the sampler's static copy, in place. Raises RuntimeError if a checksum of the copy
    differs between ranks: they would sample from different policies, and nothing else would say so."""
    if inference is model:
        return
    static, checksum = inference.state_dict(), 0
    with torch.no_grad():
        for name, tensor in gather_weights(model):
            bits = static[name].copy_(tensor).view(torch.int16 if static[name].element_size() == 2 else torch.int32)
            for piece in bits.flatten().split(1 << 26):  # a sum in int64 may take a copy in int64
                checksum = (checksum + piece.sum(dtype=torch.int64).item()) % 2**50  # exact as a float64
    if (max_over_ranks(checksum), -max_over_ranks(-checksum)) != (checksum, checksum):
        raise RuntimeError(f"rank {rank()}: the sampler's weights differ between ranks (checksum {checksum})")


def whole_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, the newest last."""
    return sorted(path for path in directory.glob("step_*") if (path / ".metadata").is_file())  # it is written last


def save_checkpoint(
    directory: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, keep: int = 2
) -> None:
    """Write weights and optimizer as directory/step_<step>, whole or not at all; keep the newest few."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    path = directory / f"step_{step:07d}"
    temporary = directory / f".step_{step:07d}"
    if rank() == 0:
        for torn in directory.glob(".step_*"):  # by a kill, perhaps at a step that is never saved again
            shutil.rmtree(torn)
        temporary.mkdir(parents=True)
    if dist.is_initialized():
        dist.barrier()
    weights, state = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # on every rank; no Exception, and it doesn't say that a disk is full
        reason = " ".join(str(next(iter(error.failures.values()))[0]).split())
        raise RunError(f"{path}: can't be written ({reason}); is the disk full? What was saved before is intact, and "
                         "the same command goes on from there") from None  # fmt: skip
    if rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        for other in {*directory.glob("step_*")} - {*whole_checkpoints(directory)[-keep:]}:
            shutil.rmtree(other)
    if dist.is_initialized():
        dist.barrier()


def load_checkpoint(directory: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint into model and optimizer; returns its step, 0 if there is none."""
    saved = whole_checkpoints(directory)
    if not saved:
        return 0
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, state = get_state_dict(model, optimizer)
    both = {"model": weights, "optimizer": state}
    dcp.load(both, checkpoint_id=saved[-1], no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    return int(saved[-1].name.removeprefix("step_"))


def export(model: Transformer, source: Path, out: Path) -> None:
    """Write the whole model as a Hugging Face directory (rank 0), with the tokenizer files of `source`."""
    weights = {name: tensor.cpu() for name, tensor in gather_weights(model) if rank() == 0}
    if rank() == 0:
        save_model(model, out, tokenizer_from=source, weights=weights)
