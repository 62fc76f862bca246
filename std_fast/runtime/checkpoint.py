"""Checkpoints: written atomically, verified when read, tensors only.

One safetensors file holds everything: tensors under `model.`, `ema.` and `optim.`, and as its metadata one JSON
document with the step, the recipe, the ledger, versions, and a digest of it all. Nothing in it can run code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import re
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.files import replacing
from pipelines.read.base import MAX_CLASSES
from std_fast.config.legacy import upgrade_meta, upgrade_tensors
from std_fast.runtime.memory import ran_out

FORMAT = 1
KEY = "std_fast"
ALIGNED = 64  # bytes; where a tensor may begin in a buffer of many
log = logging.getLogger("std_fast")


def initial_meta() -> dict[str, Any]:
    """Metadata of a run that begins; for what a file lacks too."""
    return {
        "step": 0, "complete": False, "class_names": None, "content": {}, "devices": 1, "seconds": {}, "costs": {},
        "micro_batch": 0, "best": {}, "result": {}, "evaluation_pending": False, "bad_steps": [], "snapshot_step": 0,
    }  # fmt: skip


def digest(tensors: dict[str, Tensor], meta: Any) -> str:
    """BLAKE2b over the metadata and over names, types, shapes and bytes of the tensors, in the order of their names."""
    h = hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)};".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with the mode of the umask; safetensors lets its owner alone read it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def save(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Writes the file under another name, flushes it to the disk, then renames it: never a partial file.

    Raises:
        OSError: the disk is full or cannot be written; nothing is left behind under either name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    meta = {**meta, "format": FORMAT}
    meta["digest"] = digest(tensors, meta)
    try:
        with replacing(path, flush=True) as draft:
            write_tensors(draft, tensors, {KEY: json.dumps(meta)})
    except SafetensorError as error:  # safetensors wraps the system's error, such as a full disk
        raise OSError(f"{path}: cannot be written ({error})") from None


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (on the CPU) and metadata of one checkpoint.

    Raises:
        UserError: the file is missing, cut short, damaged, of another format, or holds what no run saves.
    """
    try:
        if not path.is_file():  # reading a pipe would block
            raise FileNotFoundError("no such file")
        data = path.read_bytes()  # not through a memory map, which ends the process where the disk fails
        tensors = from_bytes(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header.get("__metadata__", {}).get(KEY, "null"))
    except Exception as error:  # besides its own, safetensors raises torch's for types that torch lacks
        raise UserError(f"{path}: is no complete checkpoint ({error}); use an older one of the run") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else "another program's"
        raise UserError(f"{path}: checkpoint format {found}, not {FORMAT}; use the version of std-fast that wrote it")
    if digest(tensors, {key: value for key, value in meta.items() if key != "digest"}) != meta.get("digest"):
        raise UserError(f"{path}: its digest does not match: the file is damaged; use an older one of the run")
    tensors, meta = upgrade_tensors(tensors), upgrade_meta(meta)
    if fault := _fault(tensors, meta):
        raise UserError(f"{path}: {fault}, which no run saves: do not trust the file, use another one")
    return tensors, initial_meta() | meta


def _fault(tensors: dict[str, Tensor], meta: dict) -> str:
    """A fault of a file with a valid digest, which is no signature: anyone can make one; "" where there is none."""

    def integer(key: str, low: int, high: int) -> bool:
        return type(meta.get(key)) is int and low <= meta[key] <= high

    def numbers(value: Any) -> bool:
        is_number = (isinstance(x, (int, float)) and math.isfinite(x) for x in value.values())
        return all(isinstance(key, str) for key in value) and all(is_number)

    def is_name(value: Any) -> bool:
        return isinstance(value, str) and value.isprintable()

    def is_steps(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= 1 << 20 and all(type(x) is int and x >= 1 for x in value)

    names, content = meta.get("class_names"), meta.get("content", {})
    sound = {
        "step": integer("step", 0, 1 << 53),
        "num_classes": integer("num_classes", 1, MAX_CLASSES),
        "devices": "devices" not in meta or integer("devices", 1, 1 << 20),
        "snapshot_step": "snapshot_step" not in meta or integer("snapshot_step", 0, 1 << 53),
        "bad_steps": is_steps(meta.get("bad_steps", [])),
        "recipe": isinstance(meta.get("recipe"), str),
        "complete": isinstance(meta.get("complete", False), bool),
        "class_names": names is None or isinstance(names, list) and all(map(is_name, names)),
        "content": isinstance(content, dict) and all(map(is_name, [*content, *content.values()])),
    }
    sound |= {
        key: isinstance(meta.get(key, {}), dict) and numbers(meta.get(key, {})) for key in ("seconds", "best", "costs")
    }
    for key, good in sound.items():
        if not good:
            return f"its metadata have {key} {meta.get(key)!r}"
    for name in tensors:
        if not re.fullmatch(r"(snapshot\.)?((model|ema)\.[^:]+|optim\.[^:]+:\w+)", name):
            return f"it has a tensor named {name!r}"
    return ""


def listed(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, by the step in their names."""
    found = [(int(m[1]), p) for p in folder.glob("step-*.safetensors") if (m := re.fullmatch(r"step-(\d+)", p.stem))]
    return [path for _, path in sorted(found)]


def remove_drafts(folder: Path) -> None:
    """Removes partial files of killed saves, safetensors' too. For the folder's only writer, before its first save."""
    for draft in (*folder.glob(".step-*.partial"), *folder.glob(".tmp??????")):
        draft.unlink(missing_ok=True)


def quarantine(folder: Path, step: int) -> None:
    """Renames checkpoints of later steps than this, which could not be read: `Writer` would keep them in place of good
    ones. For the folder's only writer."""
    for path in listed(folder):
        if int(path.stem.removeprefix("step-")) > step:
            path.rename(path.with_name(f"{path.name}.quarantined"))
            log.warning("%s: renamed to %s.quarantined", path, path.name)


def is_checkpoint(path: Path) -> bool:
    """Whether the path is a file in the `checkpoints` of a run's folder, where that folder may be given too."""
    return path.suffix == ".safetensors" and path.absolute().parent.name == "checkpoints" and path.is_file()


def newest(folder: Path) -> tuple[Path, dict[str, Tensor], dict] | None:
    """The newest complete checkpoint of a run; damaged ones are named in the log and passed over."""
    for path in reversed(listed(folder)):
        try:
            return path, *load(path)
        except UserError as error:
            log.warning("passed over a checkpoint: %s", error)
    return None


def host_copies(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Copies in host memory, and the event after which those from a GPU are there; None without a GPU.

    From a GPU all go into one pinned buffer, on the current stream: the host does not wait, and the next step, which
    changes the tensors, runs after the copies.
    """
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, None
    sizes = {name: -(-tensor.nbytes // ALIGNED) * ALIGNED for name, tensor in tensors.items()}
    buffer = torch.empty(sum(sizes.values()), dtype=torch.uint8, pin_memory=True)
    copies = {}
    for part, (name, tensor) in zip(buffer.split(list(sizes.values())), tensors.items(), strict=True):
        copies[name] = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies[name].copy_(tensor.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(device))
    return copies, copied


class Writer:
    """Saves beside the training: a thread waits for the copies from the device and writes the file.

    At most one save is under way; a failed one raises in the next call, and in `wait`.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.seconds = 0.0  # of the last save, in the thread
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict) -> None:
        """Saves `step-NNNNNNNN.safetensors`; then removes all but the `keep` newest."""
        self.wait()
        copies, copied = host_copies(tensors)
        # the metadata is copied too: a value that changes between digest and file makes a checkpoint that is refused
        given = (step, copies, copied, copy.deepcopy(meta))
        self._thread = threading.Thread(target=self._write, args=given, name="checkpoint")
        self._thread.start()

    def _write(self, step: int, tensors: dict[str, Tensor], copied: torch.cuda.Event | None, meta: dict) -> None:
        began = time.perf_counter()
        try:
            if copied is not None:
                copied.synchronize()
            save(self.folder / f"step-{step:08d}.safetensors", tensors, meta)
            for path in listed(self.folder)[: -self.keep]:
                path.unlink(missing_ok=True)
            self.seconds = time.perf_counter() - began
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Waits until the save under way is on the disk. Raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, OSError):
                raise UserError(f"{self.folder}: a checkpoint was not saved ({error}); make room and resume") from None
            raise error


def training_tensors(student: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> dict:
    """All tensors that a resumed run needs, by names that do not depend on the order of construction."""
    tensors = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in average.items()}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{name}:{key}"] = value
    return tensors


def restore(tensors: dict[str, Tensor], student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies `training_tensors` into the student and the optimizer; returns the moving average's tensors.

    Raises:
        UserError: the tensors are not those of this student and optimizer.
    """
    try:
        return _restore(tensors, student, optimizer)
    except (KeyError, RuntimeError) as error:
        if ran_out(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint does not fit the model of its recipe ({reason}); use another one") from None


def _restore(tensors: dict[str, Tensor], student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    part: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("model", "ema", "optim")}
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        part[kind][rest] = tensor
    student.load_state_dict(part["model"])
    parameters = dict(student.named_parameters())
    stored: dict[str, dict[str, Tensor]] = {}
    for name, value in part["optim"].items():
        name, key = name.rsplit(":", 1)
        stored.setdefault(name, {})[key] = value
    if unknown := stored.keys() - parameters.keys():
        raise KeyError(f"it has an optimizer state for {min(unknown)}")
    for name, parameter in parameters.items():
        if name not in stored:
            optimizer.state.pop(parameter, None)  # it has had no step yet
        for key, value in stored.get(name, {}).items():
            state = optimizer.state[parameter]
            if key not in state:
                like_parameter = value.shape == parameter.shape and key != "step"
                state[key] = torch.empty_like(parameter if like_parameter else value, device=parameter.device)
            state[key].copy_(value)
    return part["ema"]
