"""What the race's page says of its results."""

from __future__ import annotations

import json

import pytest

from benchmarks.peers import page as pages
from benchmarks.peers.entries import BY_HAND, FLOWER, PEFT, PRODUCTS, SWEEP, Entry
from benchmarks.peers.flops import pass_flops, round_flops
from benchmarks.peers.page import page, records
from benchmarks.peers.race import Standing
from benchmarks.peers.scenes import SCENES
from benchmarks.peers.targets import Results, product_share, targets
from tests.benchmarks.peers.standings import OTHER_WORK, standing

RESULTS: Results = {
    "vit192": [
        standing(PEFT, 9.0, 11.0, 10.0),
        standing(PEFT, 8.0, dtype="bfloat16"),
        standing(SWEEP, 4.0),
        standing(SWEEP, 2.0, dtype="bfloat16", agreement=OTHER_WORK),
    ],
    "embedded-256": [standing(BY_HAND, 21.0), standing(SWEEP, 1.0)],
    "overhead-256": [Standing(Entry(FLOWER, ""), skipped="left out: about 99 s a round"), standing(SWEEP, 0.0512)],
}


@pytest.mark.parametrize(
    ("has_amx", "reached"),
    [
        (False, [("2.50×", True), ("21.00×", True), ("0.200 ms", False)]),
        (True, [("4.00×", False), ("21.00×", True), ("0.200 ms", False)]),
    ],
)
def test_targets_depend_on_the_processor(has_amx: bool, reached: list[tuple[str, bool]]) -> None:
    """In float32 the loop of the same precision counts, in bfloat16 the fastest of all."""
    assert [(target.reached, target.met) for target in targets(RESULTS, has_amx=has_amx)] == reached


def test_a_target_whose_figures_were_not_measured_is_not_met() -> None:
    (target,) = targets({"vit192": [standing(SWEEP, 4.0)]}, has_amx=False)
    assert (target.reached, target.met) == (None, False)


def test_missed_targets_failed_checks_and_who_was_left_out_stand_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "has_amx", lambda: True)
    text = page(RESULTS, 3, "fedra bench peers")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {SWEEP} | bf16"))
    assert row.split(" | ")[3:] == [
        "2 (2–2)",
        "2",
        "4.00",
        "≥ 5× as fast as the fastest PEFT loop: missed",
        "failed: cosine 0.9000 |",
    ]
    assert "| PEFT loop | fp32 | sdpa | 10 (9–11) | 10 | 0.80 |" in text
    assert f"| {FLOWER} | left out: about 99 s a round |" in text
    assert f"| {SWEEP} | 0.2 (0.2–0.2) |" in text
    assert json.loads(json.dumps(records(RESULTS, 3)))["scenes"]["vit192"][0]["times"][1]["cpu"] == 11.0


def test_the_sweeps_share_of_the_products_rate() -> None:
    """A round has a pass's products, less those that are not made in the first and the last block of a client."""
    of_block = pass_flops(SCENES["vit768"]) / 12
    # Forward and backward of nine twelfths of a block's products, for all tokens but one; backward of three.
    left_out = of_block * (9 / 12 * 196 / 197 + 3 / 12 / 2)
    assert round_flops(SCENES["vit768"]) == pytest.approx(12 * of_block - left_out)
    # FedRA's clients hold 43 of 72 blocks; there are six instead of four.
    assert round_flops(SCENES["vit768-fedra"]) == pytest.approx(6 / 4 * (43 / 6 * of_block - left_out))
    bert = 12 - 3 / 12 / 2
    assert round_flops(SCENES["bert384"]) == pytest.approx(pass_flops(SCENES["bert384"]) / 12 * bert)
    standings = [standing(PRODUCTS, 1.0, dtype="bfloat16"), standing(SWEEP, 4.0, dtype="bfloat16")]
    share = (12 - 9 / 12 * 196 / 197 - 3 / 12 / 2) / 12 / 4
    assert product_share(standings, "vit768", "bfloat16") == pytest.approx(share)
    assert product_share(standings, "vit768", "float32") is None
