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


# --------------------------------------------------------------------------- collectives: every rank must get here


def gather(mine: list) -> list:
    """All ranks' lists merged, on every rank: the inverse of `everything[rank()::world_size()]`. A collective.

    Rank 0 has [a c e], rank 1 has [b d]: every rank gets [a b c d e].
    """
    if world_size() == 1:
        return mine
    parts: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, mine)
    everything = []
    for i in range(sum(len(part) for part in parts)):
        owner = i % world_size()
        everything.append(parts[owner][i // world_size()])
    return everything


def free_cached_memory() -> None:
    """Give a GPU's cached memory back after the samplers' caches have been freed. If PyTorch kept it, the optimizer's state
    would come to lie in between, and the next caches, of another size, might find no piece that is large enough."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over all ranks. A collective."""
    return _reduce(list(values), dist.ReduceOp.SUM)


def max_over_ranks(value: float) -> float:
    """The largest of all ranks' values. A collective."""
    return _reduce([value], dist.ReduceOp.MAX)[0]


def _reduce(values: list[float], operation: dist.ReduceOp) -> list[float]:
    if world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    reduced = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(reduced, operation)
    return reduced.tolist()


# --------------------------------------------------------------------------- FSDP2, and the sampler's copy of the weights


def prepare_training(model: Transformer, checkpointing: bool) -> Transformer:
    """Shard the model over all ranks (FSDP2): fp32 master weights, bf16 compute on GPUs. A collective.

    The master weights are fp32 because an update of 1e-6 is lost in most bf16 weights. A single CPU process needs no
    sharding and gets the model back as it is. checkpointing: recompute activations in the backward pass.
    """
    model.train()
    model.checkpointing = checkpointing
    if world_size() == 1 and model.device.type == "cpu":
        # Otherwise every checkpoint would warn that there is no process group, which is intended here.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        return model

    # 1. FSDP needs a process group; one GPU without torchrun gets a group of one.
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=model.device)

    # 2. An explicit mesh: FSDP would otherwise pick CUDA whenever it is available, even for a model on the CPU.
    from torch.distributed.device_mesh import init_device_mesh  # here, so that commands without training start fast
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if model.device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    # 3. Each layer is gathered when its turn comes and sharded again after it; the root has the rest, embedding and head.
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    reshard_root = None  # FSDP's default: the root stays gathered until its backward pass, which needs it first
    if not any(p.requires_grad for p in model.parameters()):
        reshard_root = True  # a frozen model has no backward pass to reshard the root after
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_root)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, gathered from all ranks (a collective); any other as it is."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def gather_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight), one at a time, so that no rank needs memory for all of them. A collective."""
    for name, tensor in model.state_dict().items():
        yield name, whole(tensor)


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


# --------------------------------------------------------------------------- checkpoints


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first; `.metadata` is written last."""
    return sorted(path for path in directory.glob("step_*") if (path / ".metadata").is_file())


def save_checkpoint(
    directory: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, keep: int = 2
) -> None:
    """Write weights and optimizer state as directory/step_<step>, whole or not at all; keep the newest few. A
    collective. Raises RunError if it can't be written."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    path = directory / f"step_{step:07d}"
    temporary = directory / f".step_{step:07d}"

    # 1. Rank 0 removes what killed runs left unfinished and creates the directory; the others wait for it.
    if rank() == 0:
        for unfinished in directory.glob(".step_*"):
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    if dist.is_initialized():
        dist.barrier()

    # 2. Every rank writes its shards.
    weights, state = get_state_dict(model, optimizer)
    checkpoint = {"model": weights, "optimizer": state}
    try:
        dcp.save(checkpoint, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # raised on every rank, and it hides an OSError such as a full disk
        cause, _ = next(iter(error.failures.values()))
        reason = " ".join(str(cause).split())  # on one line
        raise RunError(f"{path}: can't be written ({reason}); is the disk full? What was saved before is intact, and "
                         "the same command resumes from there") from None  # fmt: skip

    # 3. Rank 0 gives it its name, now that it is complete, and removes older ones.
    if rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        newest = complete_checkpoints(directory)[-keep:]
        for other in list(directory.glob("step_*")):
            if other not in newest:
                shutil.rmtree(other)
    if dist.is_initialized():
        dist.barrier()


def load_checkpoint(directory: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint into model and optimizer, whatever the number of ranks that wrote it; returns
    its step, 0 if there is none. A collective."""
    saved = complete_checkpoints(directory)
    if not saved:
        return 0
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, state = get_state_dict(model, optimizer)
    checkpoint = {"model": weights, "optimizer": state}
    dcp.load(checkpoint, checkpoint_id=saved[-1], no_dist=not dist.is_initialized())  # in place
    set_state_dict(model, optimizer, model_state_dict=checkpoint["model"], optim_state_dict=checkpoint["optimizer"])
    return int(saved[-1].name.removeprefix("step_"))


def export(model: Transformer, source: Path, out: Path) -> None:
    """Write the whole model as a Hugging Face directory, with the tokenizer files of `source`. A collective; rank 0
    writes."""
    weights = {}
    for name, weight in gather_weights(model):
        if rank() == 0:
            weights[name] = weight.cpu()
    if rank() == 0:
        save_model(model, out, tokenizer_from=source, weights=weights)
