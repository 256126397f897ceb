"""What vanishes when the code is read for one process: errors and signals, ranks and what they exchange, FSDP2.

Here belong: how a stage ends (`InputError`, `RunError`, `run_stage`, signals); the processes that torchrun started, their
numbers, their shares of the work and collectives; a model's weights over several of them: sharding, checkpoints, copies.
"""

import errno
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
    """Bad input: the message names the thing, the value and what to do; `run_stage` turns it into exit status 2."""


class RunError(RuntimeError):
    """A run that can't go on: it diverged, the disk is full, the sampler and the trainer disagree. `run_stage` turns it into
    one line and exit status 2, too."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main; an InputError, a RunError, a path that can't be written, a full disk or a full GPU becomes one
    line on stderr and exit status 2."""
    try:
        main()
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError as error:
        advice = "lower --slots (rows of the KV cache); in training --micro_tokens, or add --activation_checkpointing"
        print(f"error: {str(error).splitlines()[0]} {advice}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # libraries keep its text, not always its errno
        places = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
        if isinstance(error, places) or error.errno == errno.EROFS:
            advice = "choose another path"
        elif any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            advice = "make room: what was whole is intact, and the same command goes on"
        else:
            raise
        print(f"error: {error}; {advice}", file=sys.stderr)
        raise SystemExit(2) from None
    else:  # a rank that fails alone must not wait for the others, as it would: with NCCL this is collective
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------- processes


def init_distributed(device: str | None = None) -> torch.device:
    """Join the process group if torchrun started us; returns this process's device. Raises InputError if there is none
    of that name."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if found.type == "cuda":
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", found.index or 0)))
            torch.cuda.set_device(found)  # streams, graphs and NCCL go by the current one
    except (AssertionError, AttributeError, RuntimeError) as error:  # a build without CUDA raises any of them
        raise InputError(
            f"--device {device}: {str(error).splitlines()[0]}; say cpu, or cuda where there is one"
        ) from None
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # By default a rank gives up after minutes; but one that is done with its share may have to wait for hours.
        waiting = timedelta(days=1)
        if found.type == "cuda":
            dist.init_process_group("nccl", timeout=waiting, device_id=found)
        else:
            dist.init_process_group("gloo", timeout=waiting)
    return found


def rank() -> int:
    """This process's number among those torchrun started; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def log(*values: object) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(*values, flush=True)


def stop_on_signal() -> list[int]:
    """A list in which SIGTERM and Ctrl-C are noted from now on, in place of ending the process: the step may end, save
    and stop; the same command goes on from there."""
    signals: list[int] = []

    def note(number: int, _) -> None:
        signals.append(number)
        if rank() == 0:
            os.write(2, b"\nstopping after this step\n")  # print() isn't safe here: it may have been interrupted

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return signals


def work_queue(count: int, name: str) -> Iterator[list[int]]:
    """Deal the numbers 0 ... count - 1 out to the ranks, a few at a time, to whoever comes for more: a rank that is
    done early takes from what is left rather than wait. name: another one for each deal of a run."""
    store, dealt = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None, 0
    while dealt < count:
        few = max(1, (count - dealt) // (2 * world_size())) if store else count
        dealt = store.add(f"deal/{name}", few) if store else few
        yield list(range(dealt - few, min(dealt, count)))


def gather(mine: list) -> list:
    """Undo `everything[rank()::world_size()]`: what all ranks have, in order, on every rank."""
    if world_size() == 1:
        return mine
    parts: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


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
    """Copy the trained weights into the sampler's copy, in place (CUDA graphs keep its addresses). A collective.

    Raises RuntimeError if the sum of the copied weights differs between ranks: they would sample from different
    policies, without any other sign of it.
    """
    if inference is model:
        return
    copies = inference.state_dict()
    checksum = 0.0
    with torch.no_grad():
        for name, weight in gather_weights(model):
            copies[name].copy_(weight)
            # In blocks of rows, because a sum in fp64 makes an fp64 copy: 6 GB for an embedding of 152k x 5,120.
            for rows in copies[name].split(4096):
                checksum += rows.sum(dtype=torch.float64).item()  # in fp64 one changed weight changes the sum
    checksums = gather([checksum])
    if len(set(checksums)) > 1:
        raise RuntimeError(f"the sampler's weights differ between ranks; their sums: {checksums}")


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
