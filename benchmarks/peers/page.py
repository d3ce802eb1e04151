"""The race's results as a Markdown page and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.peers.agreement import LARGEST_DIFFERENCE, LARGEST_DIFFERENCE_IN_BFLOAT16, SMALLEST_COSINE
from benchmarks.peers.entries import BY_HAND, PEFT, PRODUCTS, SWEEP
from benchmarks.peers.machine import has_amx, instructions, processor, versions
from benchmarks.peers.race import TRIALS, Standing
from benchmarks.peers.scenes import EPS, FEDRA, SCENES
from benchmarks.peers.targets import Results, Target, find, product_rate, product_share, targets
from fedra_engine.runtime.tables import markdown_table

_NAMES = {"float32": "fp32", "bfloat16": "bf16"}
_CAPACITIES = ", ".join(map(str, FEDRA))
_METHOD = f"""## How it is measured

- **Equal work.** The engine draws clients, blocks, batches and the initial state of its own round; all contestants get
  these, the same frozen weights, LoRA of rank 8 on all six Linears of a block, AdamW with clipped gradients, and a
  classifier that is trained, too. Contestants other than the engine's rows share one local training: PEFT's layers
  around a model that is loaded and wrapped once. So they differ in what the frameworks do around it.
- **Equal results.** After each round the change of every contestant's global adapters and classifier is compared
  with that of the first contestant: in fp32 the norm of the difference may be {LARGEST_DIFFERENCE:g} of the change's;
  in bf16 {LARGEST_DIFFERENCE_IN_BFLOAT16:g}, and the cosine with the change in fp32 must be {SMALLEST_COSINE:g}.
  AdamW's eps is {EPS:g} (in the embedded default 1e-8), which costs the same but keeps rounding from deciding the sign
  of steps. If a check fails, the command fails.
- **Paired.** Every contestant has a process of its own. They run a round in turn, again and again, so that what slows
  the machine meets all of them. The first round of each is not counted. CPU-seconds are those of a process and of all
  that it started: medians, and the least and the most.
- **Variants.** A contestant with several implementations of attention first runs {TRIALS} rounds with each, in turn,
  and races with that of the fastest. pfl-research, Flower and FedRA's structure have that of the fastest PEFT loop.
- **Full depth or FedRA.** Clients hold all 12 blocks, or {_CAPACITIES} in turn, drawn by the engine.
  At full depth pfl-research and Flower run their own federated averaging. Neither knows clients that lack blocks, so
  in FedRA's settings a subclass averages each block over its holders.
- **Threads.** Torch has as many as the setting says; Flower has an actor of one thread for each.
- **FedRA's structure** is a loop that does as the published code: each client keeps a whole model, and all weights are
  copied to every client in every round. It is written anew, with the optimizer of the others, and races where clients
  lack blocks. This engine's sequential executor, which builds each client's sub-model anew, races in some settings.
- **Hand-written** is a loop over cached sub-models with LoRA layers of its own, torch's fused AdamW and clipping.
- **Without work** clients take no steps, on the embedded model. What is left is sampling, handing out and collecting
  states, and aggregation; for this engine also drawing blocks and batches."""


def page(results: Results, repeats: int, command: str) -> str:
    """The whole page; `command` is what made it."""
    aims = targets(results, has_amx=has_amx())
    training = [name for name in results if not SCENES[name].idle]
    parts = [
        "# Against other engines",
        "CPU-seconds of one federated round of LoRA tuning, by this engine and by what people use today.",
        f"```sh\n{command}\n```",
        _machine(repeats),
        *(["## Targets", _targets_table(aims)] if aims else []),
        *(part for name in training for part in (f"## {SCENES[name].title}", _scene_table(name, results[name], aims))),
        *_overhead(results),
        *_rates(results),
        _METHOD,
    ]
    return "\n\n".join(parts) + "\n"


def records(results: Results, repeats: int) -> dict[str, Any]:
    """All figures, for programs."""
    return {
        "processor": processor(),
        "instructions": instructions(),
        "versions": versions(),
        "repeats": repeats,
        "targets": [asdict(target) for target in targets(results, has_amx=has_amx())],
        "scenes": {name: [asdict(standing) for standing in standings] for name, standings in results.items()},
    }


def _machine(repeats: int) -> str:
    known = ", ".join(instructions()) or "not known"
    libraries = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        f"Measured on {processor()} ({known}), one thread where nothing else is said, medians of {repeats} rounds. "
        f"{libraries}."
    )


def _targets_table(aims: Sequence[Target]) -> str:
    rows = [["setting", "precision", "target", "reached", "met"]]
    for aim in aims:
        met = "yes" if aim.met else "no"
        title, precision = SCENES[aim.scene].title, _NAMES.get(aim.dtype, aim.dtype)
        rows.append([title, precision, aim.wanted, aim.reached or "not measured", met])
    return markdown_table(rows)


def _scene_table(scene: str, standings: Sequence[Standing], aims: Sequence[Target]) -> str:
    base = BY_HAND if find(standings, PEFT) is None else PEFT
    baseline = find(standings, base)
    against = "the hand-written loop" if base == BY_HAND else "the fastest PEFT loop"
    rows = [["contestant", "precision", "attention", "CPU-s", "wall s", f"{against} / this", "target", "agreement"]]
    for standing in standings:
        entry = standing.entry
        if entry.label == PRODUCTS or not standing.times:
            continue
        least, most = standing.spread
        wanted = [aim for aim in aims if (aim.scene, aim.dtype) == (scene, entry.dtype) and entry.label == SWEEP]
        rows.append(
            [
                entry.label,
                _NAMES.get(entry.dtype, entry.dtype),
                _attention(standing),
                f"{standing.cpu:.3g} ({least:.3g}–{most:.3g})",
                f"{standing.wall:.3g}",
                "" if baseline is None else f"{baseline.cpu / standing.cpu:.2f}",
                "; ".join(f"{aim.wanted}: {'met' if aim.met else 'missed'}" for aim in wanted),
                _agreement(standing),
            ]
        )
    return markdown_table(rows)


def _attention(standing: Standing) -> str:
    """The implementation that raced, and what others took before the race."""
    slower = {name: seconds for name, seconds in standing.variants.items() if name != standing.entry.attention}
    others = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in slower.items())
    return standing.attention + (f" ({others})" if others else "")


def _agreement(standing: Standing) -> str:
    check = standing.agreement
    if check is None:
        return ""
    figure = f"cosine {check.cosine:.4f}" if standing.entry.dtype == "bfloat16" else f"{check.difference:.1e} apart"
    return figure if check.holds else f"failed: {figure}"


def _overhead(results: Results) -> list[str]:
    """Milliseconds a client of contestants whose clients do nothing."""
    scenes = [name for name in results if SCENES[name].idle]
    if not scenes:
        return []
    labels = list(dict.fromkeys(standing.entry.label for name in scenes for standing in results[name]))
    rows = [["CPU-ms a client", *(f"{SCENES[name].clients:,} clients" for name in scenes)]]
    for label in labels:
        cells = []
        for name in scenes:
            (standing,) = (each for each in results[name] if each.entry.label == label)
            per_client = 1000 / SCENES[name].clients
            least, most = standing.spread if standing.times else (0.0, 0.0)
            cells.append(
                f"{standing.cpu * per_client:.3g} ({least * per_client:.3g}–{most * per_client:.3g})"
                if standing.times
                else standing.skipped
            )
        rows.append([label, *cells])
    return ["## Clients without work", markdown_table(rows)]


def _rates(results: Results) -> list[str]:
    """How fast frozen products are alone, and how much of this the sweep reaches."""
    rows = [["setting", "precision", "products alone, GFLOP/s", "share that the sweep reaches"]]
    for name, standings in results.items():
        for dtype, shown in _NAMES.items():
            rate, share = product_rate(standings, name, dtype), product_share(standings, name, dtype)
            if rate is not None and share is not None:
                rows.append([SCENES[name].title, shown, f"{rate / 1e9:.0f}", f"{share:.0%}"])
    if len(rows) == 1:
        return []
    text = (
        "The frozen products of a round, forward and backward, counted (two operations for each multiplication), by "
        "the sweep's CPU-seconds, which also hold attention, norms, adapters, optimizer and aggregation; and the rate "
        "at which the same products run alone on the samples of all clients. Counted is what the sweep computes: "
        "tokens other than the class token do not go through the last products of a client's last block, and its "
        "first block needs no gradient of its input. "
        "[Kernels](../kernels.md#on-a-cpu) says what takes the rest of the time."
    )
    return ["## Share of the processor's rate", text, markdown_table(rows)]
