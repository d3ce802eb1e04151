"""What the engine aims at in the race, and whether it gets there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.entries import BY_HAND, PEFT, PRODUCTS, SWEEP
from benchmarks.peers.flops import pass_flops, round_flops
from benchmarks.peers.race import Standing
from benchmarks.peers.scenes import SCENES

Results = Mapping[str, Sequence[Standing]]
"""Standings by the name of the scene."""


@dataclass(frozen=True)
class Target:
    """An aim in one scene.

    Attributes:
        scene: its name.
        dtype: that of the sweep's row to which it applies.
        wanted: in words.
        reached: the figure; None if what it is made of was not measured.
        met: whether the figure is good enough.
    """

    scene: str
    dtype: str
    wanted: str
    reached: str | None
    met: bool


def find(standings: Sequence[Standing], label: str, dtype: str | None = None) -> Standing | None:
    """The fastest contestant of this name (and dtype) that raced; None if there is none."""
    raced = [each for each in standings if each.times and each.entry.label == label]
    return min((each for each in raced if dtype in (None, each.entry.dtype)), key=lambda each: each.cpu, default=None)


def targets(results: Results, *, has_amx: bool) -> list[Target]:
    """The targets of the scenes that were raced; some are for processors with AMX alone, or for others alone."""
    found = []
    if "vit192" in results and has_amx:
        found.append(_times_faster(results, "vit192", "bfloat16", 5.0, PEFT, None, "the fastest PEFT loop"))
    elif "vit192" in results:
        found.append(_times_faster(results, "vit192", "float32", 2.2, PEFT, "float32", "the PEFT loop in float32"))
    if "vit384-fedra" in results and has_amx:
        found.append(_times_faster(results, "vit384-fedra", "bfloat16", 3.0, PEFT, None, "the fastest PEFT loop"))
    if "vit768" in results:
        share = product_share(results["vit768"], "vit768", "bfloat16")
        reached = None if share is None else f"{share:.0%}"
        wanted = "≥ 50 % of the rate of bfloat16 products"
        found.append(Target("vit768", "bfloat16", wanted, reached, share is not None and share >= 0.5))
    for scene, factor in (("embedded-default", 3.0), ("embedded-256", 20.0)):
        if scene in results:
            dtype = _fastest_dtype(results[scene])
            found.append(_times_faster(results, scene, dtype, factor, BY_HAND, None, "the hand-written loop"))
    for scene in results:
        clients = SCENES[scene].clients
        if SCENES[scene].idle and clients >= 256:
            sweep = find(results[scene], SWEEP)
            cost = None if sweep is None else sweep.cpu / clients * 1000
            reached = None if cost is None else f"{cost:.3f} ms"
            found.append(Target(scene, "float32", "≤ 0.1 ms a client", reached, cost is not None and cost <= 0.1))
    return found


def product_rate(standings: Sequence[Standing], scene: str, dtype: str) -> float | None:
    """Floating-point operations that the frozen products alone reach in a CPU-second; None if not measured."""
    products = find(standings, PRODUCTS, dtype)
    return None if products is None else pass_flops(SCENES[scene]) / products.cpu


def product_share(standings: Sequence[Standing], scene: str, dtype: str) -> float | None:
    """The sweep's rate of frozen products, divided by the rate of the products alone; None if not measured."""
    sweep, rate = find(standings, SWEEP, dtype), product_rate(standings, scene, dtype)
    return None if sweep is None or rate is None else round_flops(SCENES[scene]) / sweep.cpu / rate


def _times_faster(
    results: Results, scene: str, dtype: str, factor: float, label: str, other: str | None, name: str
) -> Target:
    sweep, baseline = find(results[scene], SWEEP, dtype), find(results[scene], label, other)
    times = None if sweep is None or baseline is None else baseline.cpu / sweep.cpu
    reached = None if times is None else f"{times:.2f}×"
    rate = product_rate(results[scene], scene, dtype)
    if reached is not None and baseline is not None and rate is not None:
        reached += f" (frozen products alone: {baseline.cpu * rate / round_flops(SCENES[scene]):.2f}×)"
    return Target(scene, dtype, f"≥ {factor:g}× as fast as {name}", reached, times is not None and times >= factor)


def _fastest_dtype(standings: Sequence[Standing]) -> str:
    sweep = find(standings, SWEEP)
    return "float32" if sweep is None else sweep.entry.dtype
