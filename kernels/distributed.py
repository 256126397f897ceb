"""What a reader may skip who thinks of a single process: errors and signals, ranks and their collectives, FSDP2.

Here belong: how a stage ends (`InputError`, `RunError`, `run_stage`, signals) and how fast it runs; the processes that
torchrun started, their numbers, their shares of the work and collectives; a model's weights across them: sharding,
checkpoints, copies.
"""

import io
import os
import pickle
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from kernels.transformer import Transformer, load_model, save_model

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
    """Run a stage's main. User errors, failed runs, disk-full and other file errors, out-of-memory errors and Ctrl-C
    become one line on stderr and exit status 2; anything else is a bug and keeps its traceback.

    Under torchrun the ranks print one line together; torchrun adds its own report to it. After success they end here
    and don't return."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know the characters of a model's text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (InputError, RunError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; what was saved before is intact, and the same command resumes"
    except torch.OutOfMemoryError as error:
        advice = "lower --slots (rows of the KV cache); in training --micro_tokens, or add --activation_checkpointing"
        message = f"{str(error).splitlines()[0]} {advice}"
    except MemoryError:
        message = "out of memory; free some, or use smaller files; the same command resumes"
    except OSError as error:
        # Files are replaced as a whole and records are appended line by line, so this holds whatever has failed.
        message = f"{error}; what was saved before is intact, and the same command resumes once this is fixed"
    except RuntimeError:
        if not _another_rank_has_failed():
            raise
        raise SystemExit(2) from None  # a collective that the other rank has left; it has said why
    else:
        # Only on success: the call is collective and would hang a failing rank.
        if dist.is_initialized():
            dist.destroy_process_group()
            # A thread of Gloo may still hold what the last collective sent. If it lets go of that while the interpreter
            # ends, the process aborts (PyTorch's pull request 179291), so the interpreter is left out.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return
    if _is_first_to_fail():
        print(f"error: {_printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def _printable(message: str) -> str:
    """The message on one line, with the escape sequences of a terminal spelled out."""
    line = " ".join(message.splitlines())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def _is_first_to_fail() -> bool:
    """Among ranks that fail together one is to say so: the first of them."""
    if not dist.is_initialized():
        # They haven't met yet. What fails before, such as a flag, fails on all of them.
        return not started_by_torchrun() or os.environ["RANK"] == "0" or not _has_rank()
    try:
        return _shared_store().add("failed ranks", 1) == 1
    except dist.DistError:  # the store has ended with torchrun
        return rank() == 0


def _another_rank_has_failed() -> bool:
    if world_size() == 1:
        return False
    try:
        return _shared_store().add("failed ranks", 0) > 0
    except dist.DistError:
        return True


# --------------------------------------------------------------------------- processes


TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started_by_torchrun() -> bool:
    """Do the environment's variables describe a process group? Other programs set some of them, too."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def _has_rank() -> bool:
    """Are RANK and WORLD_SIZE whole numbers, and 0 <= RANK < WORLD_SIZE?"""
    number, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    return number.isdecimal() and size.isdecimal() and int(number) < int(size)


def init_distributed(device: str | None = None) -> torch.device:
    """Choose this process's device, and join the process group if torchrun started it.

    device: "cpu" or "cuda"; None: cuda if available. Under torchrun a process uses the GPU of its local rank.
    Raises InputError if there is no such device, or if the group's description is not whole.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = find_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)  # streams, CUDA graphs and NCCL use the current device

    if not started_by_torchrun():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            lacking = ", ".join(name for name in TORCHRUN_VARIABLES if name not in os.environ)
            raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {lacking} is not set; start several "
                             "processes with torchrun, or one after: unset WORLD_SIZE")  # fmt: skip
    elif not _has_rank():
        raise InputError(f"RANK is {os.environ['RANK']!r} and WORLD_SIZE {os.environ['WORLD_SIZE']!r}, which must be "
                         "whole numbers, 0 <= RANK < WORLD_SIZE; start the processes with torchrun")  # fmt: skip
    elif not dist.is_initialized():
        # By default a collective fails after some minutes, but a rank that finishes early may wait for hours.
        timeout = timedelta(days=1)
        try:
            if found.type == "cuda":
                dist.init_process_group("nccl", timeout=timeout, device_id=found)
            else:
                dist.init_process_group("gloo", timeout=timeout)
        except (ValueError, dist.DistError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"the processes can't meet ({reason}); start them with torchrun") from None
    return found


def find_device(name: str) -> torch.device:
    """The device of a --device flag: the CPU, or a GPU of CUDA, under torchrun that of the local rank. Raises
    InputError if there is no such device, or if the others on this machine would have none."""
    message = f"--device {name}: no such device; use cpu or, if available, cuda"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise InputError(message) from None
    if found == torch.device("cpu") or found == torch.device("cpu", 0):
        return torch.device("cpu")
    if found.type != "cuda":
        raise InputError(message)
    index = found.index or 0
    needed = index + 1
    if started_by_torchrun():
        index = int(os.environ.get("LOCAL_RANK", index))
        # Of all local ranks, so that none of them goes on alone.
        needed = int(os.environ.get("LOCAL_WORLD_SIZE", index + 1))
    available = torch.cuda.device_count()  # 0 in a build without CUDA
    if available == 0:
        raise InputError(message)
    if needed > available:
        raise InputError(f"--device {name}: {needed} GPUs are needed, and there are {available}; start fewer processes")
    return torch.device("cuda", index)


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


def per_second(count: float, seconds: float) -> float:
    """A speed; 0 if the clock has not moved, as coarse or frozen ones don't."""
    if seconds <= 0:
        return 0.0
    return count / seconds


class Clock:
    """Seconds of the phases of a step: `with clock("sample"): ...`. Phases may stand in each other."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start

    def metrics(self, **tokens: int) -> dict[str, float]:
        """Seconds of all phases, and tokens per second of those given here with their tokens, of all ranks; over their
        time together, the tokens of the first."""
        numbers = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        for phase, count in tokens.items():
            numbers[f"time/{phase}_tokens_per_second"] = per_second(count, self.seconds[phase])
        first = next(iter(tokens.values()))
        numbers["time/tokens_per_second"] = per_second(first, sum(self.seconds[phase] for phase in tokens))
        return numbers


def stop_on_signal() -> list[int]:
    """Record the signals that ask a training to end in the returned list instead of ending the process, so that the
    loop that reads the list can finish its step, save and stop; the same command resumes from there.

    They are SIGTERM, Ctrl-C, those by which schedulers announce the end (SIGUSR1, SIGUSR2), and SIGHUP, unless it was
    ignored at the start (`nohup`). A second Ctrl-C ends the process at once, but not under torchrun, which passes each
    Ctrl-C on to processes that have had it already, and kills them half a minute later."""
    signals: list[int] = []

    def note(number: int, _) -> None:
        if number == signal.SIGINT and number in signals and not started_by_torchrun():
            raise KeyboardInterrupt
        signals.append(number)
        if rank() == 0:
            # Not print(): the signal may have interrupted another print(), which can't be entered twice.
            try:
                os.write(2, b"\nstopping after this step\n")
            except OSError:  # the terminal has gone, and all that is still to be printed would fail, too
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, note)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, note)
    return signals


def work_queue(count: int, name: str) -> Iterator[list[int]]:
    """Shared work queue: each rank repeatedly takes a batch of the indices 0 ... count - 1, until none are left.

    A batch is half of an equal share of what is left, so that the ranks come back seldom at first and finish at about
    the same time. 10 indices, 2 ranks, in the order in which batches are taken, by whichever rank:

        left    10    8     6   5   4   3   2   1
        batch   0 1   2 3   4   5   6   7   8   9

    name: a different one for each queue of a run.
    """
    if not dist.is_initialized():
        if count > 0:
            yield list(range(count))
        return
    # The ranks share a counter of the indices taken so far.
    store = _shared_store()
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


def _shared_store() -> dist.Store:
    """The key-value store that the process group was made with. PyTorch has no public function that returns it, and
    another store would need an address of its own."""
    return dist.distributed_c10d._get_default_store()


def my_part(everything: list) -> list:
    """This rank's share of a list that all ranks have, every world_size-th of it; `gather` puts the shares together."""
    return everything[rank() :: world_size()]


# --------------------------------------------------------------------------- collectives: every rank must get here


def gather(mine: list) -> list:
    """All ranks' lists merged, on every rank: the inverse of `my_part`. A collective.

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


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank. A collective."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


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


# --------------------------------------------------------------------------- FSDP2, and the sampler's copy of weights


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

    # 3. Each layer is gathered when its turn comes and sharded again after it; the root has the rest, embedding and
    # head.
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    reshard_root = None  # FSDP's default: the root stays gathered until its backward pass, which needs it first
    if not any(p.requires_grad for p in model.parameters()):
        reshard_root = True  # a frozen model has no backward pass to reshard the root after
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_root)


def load_reference(model: Transformer, source: Path) -> Transformer:
    """A frozen copy of the model as it was in its directory, for the KL term: sharded, in bf16 on GPUs. A
    collective."""
    reference = _load_copy(model, source).requires_grad_(False)
    return prepare_training(reference, False)


def load_inference(model: Transformer, source: Path) -> Transformer:
    """A whole copy of the model for the sampler, in bf16 on GPUs. A single CPU process samples with the model
    itself."""
    if model.device.type == "cpu" and world_size() == 1:
        return model
    return _load_copy(model, source)


def _load_copy(model: Transformer, source: Path) -> Transformer:
    """The model of a directory on the same device, with the same rows of the head left out."""
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    copy = load_model(source, model.device, dtype)
    copy.vocabulary = model.vocabulary
    return copy


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, gathered from all ranks (a collective); any other as it is."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    return tensor


def gather_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight), one at a time, so that no rank needs memory for all of them. A collective."""
    for name, tensor in model.state_dict().items():
        yield name, whole(tensor)


def free_cached_memory() -> None:
    """Give a GPU's cached memory back after the samplers' caches have been freed. If PyTorch kept it, the optimizer's
    state would come to lie in between, and the next caches, of another size, might find no piece that is large
    enough."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def copy_weights(inference: Transformer, model: Transformer) -> None:
    """Copy the trained weights into the sampler's copy, in place (CUDA graphs keep its addresses). A collective.

    Raises RuntimeError if the sum of the copied weights differs between ranks: they would sample from different
    policies, without any other sign of it.
    """
    if inference is model:
        return
    copies = inference.state_dict()
    checksum = torch.zeros((), dtype=torch.float64, device=inference.device)
    with torch.no_grad():
        for name, weight in gather_weights(model):
            copies[name].copy_(weight)
            # In blocks of rows, because a sum in fp64 makes an fp64 copy: 6 GB for an embedding of 152k x 5,120.
            for rows in copies[name].split(4096):
                checksum += rows.sum(dtype=torch.float64)  # in fp64 one changed weight changes the sum
    checksums = gather([checksum.item()])  # read once: each read waits for the device
    if len(set(checksums)) > 1:
        raise RuntimeError(f"the sampler's weights differ between ranks; their sums: {checksums}")


# --------------------------------------------------------------------------- checkpoints


CHECKPOINT_NAME = re.compile("step_[0-9]+")


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, step_0000012: 12."""
    return int(checkpoint.name.removeprefix("step_"))


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first; `.metadata` is written last."""
    found = []
    for path in directory.glob("step_*"):
        if CHECKPOINT_NAME.fullmatch(path.name) and (path / ".metadata").is_file():
            found.append(path)
    return sorted(found, key=step_of)


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
        for unfinished in directory.glob(".step_*/"):
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    barrier()

    # 2. Every rank writes its shards.
    weights, state = get_state_dict(model, optimizer)
    checkpoint = {"model": weights, "optimizer": state}
    try:
        dcp.save(checkpoint, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # raised on every rank, and it hides an OSError such as a full disk
        reason = _reason(error)
        raise RunError(f"{path}: can't be written ({reason}); is the disk full? What was saved before is intact, and "
                         "the same command resumes from there") from None  # fmt: skip

    # 3. Rank 0 gives it its name, now that it is complete, and removes older ones.
    if rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        newest = complete_checkpoints(directory)[-keep:]
        for other in list(directory.glob("step_*/")):
            if other not in newest and CHECKPOINT_NAME.fullmatch(other.name):
                shutil.rmtree(other)
    barrier()


def load_checkpoint(directory: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint into model and optimizer, whatever the number of ranks that wrote it; returns
    its step, 0 if there is none. A collective.

    If it is damaged, the one before is loaded, and a line says so. Raises InputError if no checkpoint can be read."""
    saved = complete_checkpoints(directory)
    if not saved:
        return 0
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for path in reversed(saved):
        weights, state = get_state_dict(model, optimizer)
        checkpoint = {"model": weights, "optimizer": state}
        problems = [problem for problem in gather([find_damage(path)]) if problem]  # all ranks take the same one
        if not problems:
            try:
                dcp.load(checkpoint, checkpoint_id=path, no_dist=not dist.is_initialized())  # in place
                set_state_dict(
                    model, optimizer, model_state_dict=checkpoint["model"], optim_state_dict=checkpoint["optimizer"]
                )
                return step_of(path)
            except dcp.CheckpointException as error:
                problems = [_reason(error)]
        log(f"{path} is damaged ({problems[0]}); trying the checkpoint before it")
    raise InputError(f"{directory}: no checkpoint can be read, {path.name} is damaged, too ({problems[0]}); restore "
                     "one, or remove the directory to start again")  # fmt: skip


def _reason(error: Exception) -> str:
    """Why a rank could not save or load a checkpoint. PyTorch wraps every exception, Ctrl-C included."""
    cause, _ = next(iter(error.failures.values()))
    if isinstance(cause, (KeyboardInterrupt, torch.OutOfMemoryError)):
        raise cause
    return _one_line(cause)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# The names that a checkpoint's `.metadata` needs, by module.
METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.serialization": "_get_layout",
    "torch": "Size bfloat16 bool float16 float32 float64 int32 int64 uint8",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",  # its name in Python 3.13
}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads a checkpoint's `.metadata`. Any other name in a pickle may be code, to be run with what follows it."""

    def find_class(self, module: str, name: str) -> object:
        if name not in METADATA_NAMES.get(module, "").split():
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def find_damage(path: Path) -> str | None:
    """Why a checkpoint can't be read or isn't safe to read; None if nothing is found. PyTorch would run code hidden in
    the pickles of its metadata or of the optimizer's settings; here they are read without, before PyTorch does."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    try:
        # 1. The table of contents.
        with open(path / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        for stored in metadata.storage_data.values():
            name = stored.relative_path
            if Path(name).name != name or stored.transform_descriptors:
                return f"{name} is not a plain file of this directory"

        # 2. What isn't a tensor, such as the optimizer's betas, is pickled as a part of a file. (Tensors are always
        # read without running code.)
        for name, kind in metadata.state_dict_metadata.items():
            if not isinstance(kind, BytesStorageMetadata):
                continue
            stored = metadata.storage_data[MetadataIndex(name)]
            with open(path / stored.relative_path, "rb") as file:
                file.seek(stored.offset)
                torch.load(io.BytesIO(file.read(stored.length)), weights_only=True)
    except Exception as error:  # a damaged pickle may raise any
        return _one_line(error)
    return None


def export(model: Transformer, source: Path, out: Path) -> None:
    """Write the whole model as a Hugging Face directory, with the tokenizer files of `source`. A collective; rank 0
    writes."""
    weights = {}
    for name, weight in gather_weights(model):
        if rank() == 0:
            weights[name] = weight.cpu()
    if rank() == 0:
        save_model(model, out, tokenizer_from=source, weights=weights)
