"""Folders of saved rounds: tensors and state of each, written whole, and checked when they are read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from fedra_engine.callbacks.run_folder import CHECKPOINTS, RunFolder, reading
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import content_hash, make_folders, remove_unfinished, whole_folder

_TENSORS_FILE = "state.safetensors"
_STATE_FILE = "state.json"
_KEPT = 2
"""Checkpoints that are kept: the newest, and a spare one in case it is damaged."""
_VERSION = 2
"""Format of the checkpoints; those of version 1 had no number and no fingerprint."""
_INTACT = "an intact checkpoint"


class Checkpoint(NamedTuple):
    """What a run needs to go on after `round`; `passed_over` says what is wrong with the newest, if that is damaged."""

    round: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    passed_over: str = ""


def save_checkpoint(folder: Path, round: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """`save_round` in `checkpoints` of a run's `folder`, where the newest `_KEPT` stay."""
    return save_round(folder / CHECKPOINTS, round, tensors, state, kept=_KEPT)


def save_round(
    parent: Path,
    round: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    kept: int,
    write_more: Callable[[Path], object] | None = None,
) -> Path:
    """Save `<parent>/round_0000`, which appears whole or not at all, and remove the oldest of those in `parent`.

    Args:
        parent: a folder.
        round: the finished round; folders of this round or later ones are removed.
        tensors: on any device.
        state: anything JSON can hold.
        kept: how many stay, of the newest.
        write_more: writes other files into the new folder.

    Returns:
        The round's folder.

    Raises:
        OSError: it cannot be written; earlier ones are kept.
    """
    final = round_folder(parent, round)
    make_folders(parent)
    remove_unfinished(parent)
    # safetensors refuses tensors that share memory.
    own = {name: of.detach().cpu().clone(memory_format=torch.contiguous_format) for name, of in tensors.items()}
    content = safetensors.torch.save(own)
    header = {"version": _VERSION, "round": round, "tensors": content_hash(content).hexdigest(), "state": dict(state)}
    with whole_folder(final) as temporary:
        if write_more is not None:
            write_more(temporary)
        (temporary / _TENSORS_FILE).write_bytes(content)
        (temporary / _STATE_FILE).write_text(json.dumps({**header, "digest": _digest_of_header(header)}))
        # After falling back to an older checkpoint, a run meets the damaged ones again.
        for saved, damaged in saved_rounds(parent):
            if saved >= round:
                shutil.rmtree(damaged)
    for _, outdated in saved_rounds(parent)[:-kept]:
        shutil.rmtree(outdated)
    return final


def load_newest_intact(folder: Path) -> Checkpoint | None:
    """Load a run's newest intact checkpoint, tensors on the CPU; None without any, InputError if all are damaged."""
    damage: InputError | None = None
    for round, path in reversed(saved_rounds(folder / CHECKPOINTS)):
        try:
            return load_round(round, path)._replace(passed_over=str(damage or ""))
        except InputError as error:
            damage = damage or error
    if damage is not None:
        raise damage
    return None


def load_best(folder: RunFolder) -> Checkpoint | None:
    """Load the best round of a run, the newest that `keep_best` has kept; None without any, InputError if damaged."""
    kept = saved_rounds(folder.best_folder)
    return load_round(*kept[-1]) if kept else None


def load_round(round: int, path: Path) -> Checkpoint:
    """Load what `save_round` has saved; InputError if it is damaged, or not of this `round`."""
    state_file, tensors_file = path / _STATE_FILE, path / _TENSORS_FILE
    with reading(state_file, _INTACT):
        header = dict(json.loads(state_file.read_bytes()))
        intact = header.pop("digest", None) == _digest_of_header(header)
    if header.get("version") != _VERSION:
        raise InputError(
            f"{state_file}: found version {header.get('version')!r}, expected version {_VERSION} (only the "
            "fedra-engine that began a run can resume it)"
        )
    if not intact:
        raise InputError(f"{state_file}: found other content than was written, expected {_INTACT}")
    if header["round"] != round:
        raise InputError(
            f"{state_file}: found the state of round_{header['round']:04d}, expected {_INTACT} of {path.name}"
        )
    with reading(tensors_file, _INTACT):
        content = tensors_file.read_bytes()
    if content_hash(content).hexdigest() != header["tensors"]:
        raise InputError(f"{tensors_file}: found other bytes than were written, expected {_INTACT}")
    return Checkpoint(round, safetensors.torch.load(content), header["state"])


def round_folder(parent: Path, round: int) -> Path:
    """Where `save_round` saves."""
    return parent / f"round_{round:04d}"


def saved_rounds(parent: Path) -> list[tuple[int, Path]]:
    """Number and folder of the rounds saved in `parent`, oldest first, without unfinished ones (a dot in front)."""
    paths = (path for path in parent.glob("round_*") if path.is_dir())
    names = ((re.fullmatch(r"round_(\d+)", path.name), path) for path in paths)
    return sorted((int(name[1]), path) for name, path in names if name)


def _digest_of_header(header: Mapping[str, Any]) -> str:
    # Reading JSON and writing it again does not change the text.
    return content_hash(json.dumps(header, sort_keys=True).encode()).hexdigest()
