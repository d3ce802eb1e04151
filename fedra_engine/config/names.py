"""Which option somebody meant who typed one that there is not."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

ALIASES = {
    "batch": "training.batch_size",
    "batch_size": "training.batch_size",
    "data": "data.source",
    "dataset": "data.source",
    "epochs": "training.local_epochs",
    "learning_rate": "training.lr",
    "lr": "training.lr",
    "method": "method.name",
    "model": "model.path",
    "num_clients": "data.clients",
    "num_epochs": "training.local_epochs",
    "num_rounds": "rounds",
    "optimizer": "training.optimizer",
    "output": "output_dir",
    "r": "lora.rank",
    "rank": "lora.rank",
}
"""What other programs call an option, and its name here."""


def nearest(found: str, names: Sequence[str]) -> str | None:
    """The one of `names` that an unknown name most likely stands for; None if none is near.

    The last part counts most: `training.learning_rate` and `lr` are `training.lr`, `server.learning_rate` is
    `server.lr`.
    """
    group, _, last = found.rpartition(".")
    alias = ALIASES.get(last, last)
    for name in (f"{group}.{alias.rpartition('.')[2]}", alias):
        if name in names:
            return name
    same = [name for name in names if name.rpartition(".")[2] == last]
    if close := get_close_matches(found, same, n=1, cutoff=0) or get_close_matches(found, names, n=1):
        return close[0]
    by_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = get_close_matches(last, list(by_last), n=1)
    return by_last[close[0]] if close else None


def known_name(found: str, names: Sequence[str]) -> str:
    """What to expect in place of an unknown name, which may have dashes in front, with the nearest that there is."""
    name = nearest(found.lstrip("-").replace("-", "_"), names)
    dashes = "--" if found.startswith("--") else ""
    return "one that --help-all lists" + (f" (did you mean {dashes}{name}?)" if name else "")
