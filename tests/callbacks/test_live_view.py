"""The display of a run fits its terminal, whatever there is to show."""

import io
from collections.abc import Mapping

import pytest
import torch
from rich.cells import cell_len

from fedra_engine.callbacks import live_view
from fedra_engine.callbacks.live_view import LiveView, memory_text, sparkline
from fedra_engine.callbacks.meter import Meter
from fedra_engine.federation.records import RoundMetrics
from fedra_engine.runtime.stages import LOCAL_STEPS, Stage
from fedra_engine.runtime.tables import PlainConsole

HEADER = {
    "method": "fedra, 80 rounds, seed 0",
    "model": "ViTForImageClassification, 12 blocks, 403,914 frozen parameters",
    "clients": "30 in 6 domains",
    "samples": "840 training, 360 test",
    "folder": "runs/fedra-digits_vit-20261129-101500",
}
DOMAINS = ("clean", "inverted", "rotated", "noisy", "edges", "textured")


def trained(rounds: int, domains: Mapping[str, float] | tuple[str, ...] = DOMAINS) -> Meter:
    """Of a run of 80 rounds that has trained so many, was evaluated after every second one, and is in the next."""
    now = 0.0
    meter = Meter(clock=lambda: now)
    meter.frozen = dict.fromkeys(domains, 0.25)
    meter.expected = 6
    for round in range(rounds):
        meter.round_started(round, rounds=80)
        now += 2.0
        meter.round_finished(RoundMetrics(round, 6, 900, 2.0 - round / 80, lr=0.1, blocks_held=12, seconds=2.0))
        if round % 2:
            meter.evaluations.append({name: 0.25 + 0.01 * place * round for place, name in enumerate(domains)})
    meter.round_started(rounds, rounds=80)
    return meter


def drawn(view: LiveView, width: int, height: int) -> list[str]:
    """The lines of the display in a terminal of this size, without the blanks at their ends."""
    console = PlainConsole(file=io.StringIO(), width=width, height=height, force_terminal=True, record=True)
    console.print(view)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture(autouse=True)
def _same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_view, "memory_text", lambda device: "812 MiB in this process")


def test_eighty_columns_and_24_lines_hold_everything() -> None:
    meter = trained(10)
    view = LiveView(meter, HEADER)
    view.lanes = 4
    meter.clients, meter.loss = 4, 1.5
    with Stage(LOCAL_STEPS, 30) as stage:
        stage.advance(15)
        lines = drawn(view, 80, 24)
    assert lines == [
        "method    fedra, 80 rounds, seed 0",
        "model     ViTForImageClassification, 12 blocks, 403,914 frozen parameters",
        "clients   30 in 6 domains",
        "samples   840 training, 360 test",
        "folder    runs/fedra-digits_vit-20261129-101500",
        "",
        "rounds    ━━━━──────────────────────────  10 of 80, ETA 0:02:12",
        "round 11  ━━━━━━━━━━━━━━━━━━━━──────────  4 of 6 clients",
        "now       wave 2 of 2, 4 lanes, 15 of 30 local steps",
        "",
        "loss      1.500  █▇▆▆▅▄▃▃▂▁",
        "speed     450 samples/s",
        "memory    812 MiB in this process",
        "",
        "accuracy (%)  frozen     now   change",
        "clean           25.0    25.0     +0.0  ▁▁▁▁▁▁",
        "inverted        25.0    34.0     +9.0  ▁▁▁▂▂▂",
        "rotated         25.0    43.0    +18.0  ▁▁▂▃▃▄",
        "noisy           25.0    52.0    +27.0  ▁▁▂▃▄▅",
        "edges           25.0    61.0    +36.0  ▁▂▃▄▅▇",
        "textured        25.0    70.0    +45.0  ▁▂▃▅▆█",
        "average         25.0    47.5    +22.5  ▁▁▂▃▄▅",
    ]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 24), (60, 12), (40, 10), (20, 8), (80, 5), (200, 60)])
@pytest.mark.parametrize("domains", [1, 6, 40])
def test_the_progress_is_there_below_the_header_and_nothing_leaves_the_terminal(
    width: int, height: int, domains: int
) -> None:
    names = tuple(f"domain {'名' * 12} {number}" for number in range(domains))
    view = LiveView(trained(33, names), HEADER)
    with Stage("evaluating held-out samples", 1_000_000):
        lines = drawn(view, width, height)
    # The last line stays free, or the first one would have left when the display is cleared.
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width
    # Of few lines, those that change come first.
    first = [*[*HEADER][: max(height - 7, 0)], "rounds", "round", "now", "loss", "speed", "memory"][: height - 1]
    assert [line.split()[0] for line in lines if line][: len(first)] == first


def test_of_more_domains_than_lines_some_are_counted_and_the_average_is_there() -> None:
    lines = drawn(LiveView(trained(10, tuple(f"d{number}" for number in range(40))), HEADER), 80, 24)
    assert len(lines) == 23
    assert lines[-3].startswith("d5 ")
    assert lines[-2] == "… and 34 more"
    assert lines[-1].startswith("average ")


def test_where_lines_are_few_they_are_for_domains() -> None:
    lines = drawn(LiveView(trained(10), HEADER), 60, 19)
    assert len(lines) == 18
    assert "" not in lines
    assert [line.split()[0] for line in lines[-7:]] == ["accuracy", *DOMAINS[:4], "…", "average"]


def test_before_the_first_round_it_shows_what_is_being_done() -> None:
    meter = Meter()
    meter.rounds = 80
    with Stage("decoding images", 2_780) as stage:
        stage.advance(1_016)
        lines = drawn(LiveView(meter, HEADER), 80, 24)
    assert [line for line in lines if line[:3] in ("rou", "now")] == [
        f"rounds    {'─' * 30}  0 of 80, ETA -:--:--",
        "now       decoding images, 1,016 of 2,780",
    ]
    with Stage("loading the model"):
        assert "now       loading the model, 0 s" in drawn(LiveView(meter, HEADER), 80, 24)
    assert "speed     –" in lines
    assert not any("accuracy" in line for line in lines)


def test_a_notice_is_shown_in_place_of_what_is_being_done() -> None:
    view = LiveView(trained(1), HEADER)
    view.show_notice("interrupted, closing files …")
    with Stage(LOCAL_STEPS, 30):
        assert "now       interrupted, closing files …" in drawn(view, 80, 24)


def test_with_several_processes_it_counts_no_waves() -> None:
    view = LiveView(trained(1), HEADER)
    view.lanes, view.processes = 4, 2
    with Stage(LOCAL_STEPS, 30):
        assert "now       4 lanes here, 2 processes, 0 of 30 local steps" in drawn(view, 80, 24)


def test_names_are_neither_markup_nor_control_characters() -> None:
    lines = drawn(LiveView(trained(1, ("[red]a", "b\x1b[2J")), {"model": "x\x1b[2J"}), 80, 24)
    assert lines[0] == "model     x\\x1b[2J"
    assert any(line.startswith("[red]a ") for line in lines)
    assert any(line.startswith("b\\x1b[2J ") for line in lines)


def test_a_sparkline_is_as_high_as_its_values_and_flat_if_they_are_equal() -> None:
    assert sparkline([number / 7 for number in range(8)], 0.0, 1.0) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.3, 0.3], 0.3, 0.3) == "▁▁"
    assert sparkline([], 0.0, 0.0) == ""


def test_a_long_history_has_a_short_line() -> None:
    meter = trained(33)
    meter.evaluations *= 100
    meter.losses *= 100
    lines = drawn(LiveView(meter, HEADER), 80, 24)
    assert all(len(line.split()[-1]) == 24 for line in lines if line.startswith(("loss", "clean", "average")))


def test_memory_is_that_of_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"allocated_bytes.all.current": 3 << 30, "allocated_bytes.all.peak": 5 << 30}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert memory_text(torch.device("cuda")) == "3 GiB of the GPU, peak 5 GiB"
    for device in (None, torch.device("cpu")):
        assert memory_text(device).endswith("iB in this process")
