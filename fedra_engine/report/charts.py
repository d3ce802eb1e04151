"""The charts of a run. Blocks and rounds are counted from 1 here, as wherever people read them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import mean

from fedra_engine.federation.averages import average
from fedra_engine.federation.measure_text import SHARES, measure_name
from fedra_engine.report.facts import RoundFacts, RunFacts, StartFacts
from fedra_engine.report.marks import (
    MOST_CELLS,
    Chart,
    Rows,
    binned,
    block_bars,
    heat_map,
    line_chart,
    runs_text,
    short,
    thinned,
    tip,
    with_line_at,
)
from fedra_engine.runtime.errors import first_few
from fedra_engine.runtime.selection import some_of

AVERAGE = "average"
_MOST_DOMAINS = 8
"""Lines that can be told apart, beside that of the average."""
_MOST_EVALUATIONS = 200
"""Points of the line of a domain."""
_MOST_SLANTED = 12
"""Most names below a chart that are slanted; more are vertical."""
_MOST_NAMED = 10
"""Clients that a cell names, and groups of neighbouring blocks."""
_MOST_EMPTY = 100
"""Up to so many clients, each has a row; of more, only those that took part."""
_PERCENT = ".1f"
_PERCENT_LABEL = "round(100 * datum.value) + ' %'"


def run_charts(run: RunFacts) -> list[Chart]:
    """All charts for which the run has what they show."""
    made = [accuracy_by_round(run), gains(run), loss(run), shares(run), seconds(run), simulated_seconds(run)]
    made += [allocation(run), participation(run), trainings(run), block_changes(run), label_matrix(run)]
    return [chart for chart in made if chart is not None]


def accuracy_by_round(run: RunFacts) -> Chart | None:
    """The accuracy of each domain and on average, wherever it was measured."""
    if not run.curve:
        return None
    last = list(run.curve.values())[-1]
    domains = sorted(last, key=last.__getitem__)[:_MOST_DOMAINS] if len(last) > _MOST_DOMAINS else list(last)
    note = "The thick line is the average over the domains. Round 0 is the frozen model."
    if len(domains) < len(last):
        note += f" Of {len(last)} domains, the {len(domains)} of the lowest accuracy are shown."
    rows: Rows = []
    for number, accuracy in some_of([*run.curve.items()], _MOST_EVALUATIONS):
        shown = {AVERAGE: average(accuracy), **{name: accuracy[name] for name in domains}}
        rows += [{"round": number, "series": name, "value": 100 * value} for name, value in shown.items()]
    spec = line_chart(rows, "accuracy (%)", _PERCENT, [AVERAGE, *domains], strong=AVERAGE)
    if run.best is not None:
        note += " The dashed line is at the best round."
        spec = with_line_at(spec, run.best.number, f"best round by {measure_name(run.best.measure)}")
    return Chart("accuracy", "Accuracy by round", note, spec, wide=True)


def gains(run: RunFacts) -> Chart | None:
    """Frozen and tuned accuracy, a row for each domain."""
    if not run.has_ended:
        return None
    pairs = {AVERAGE: (average(run.frozen), average(run.tuned))}
    pairs |= {name: (run.frozen[name], tuned) for name, tuned in run.tuned.items()}
    rows = [
        {"domain": name, "frozen": 100 * frozen, "tuned": 100 * tuned, "gain": 100 * (tuned - frozen)}
        for name, (frozen, tuned) in pairs.items()
    ]
    tips = [tip("domain"), *(tip(name, format=_PERCENT) for name in ("frozen", "tuned")), tip("gain", format="+.1f")]
    x = {"type": "quantitative", "title": "accuracy (%)", "scale": {"zero": False, "nice": False, "padding": 14}}
    model = {"field": "model", "type": "nominal", "title": None}
    spec = {
        "data": {"values": rows},
        "width": "container",
        "height": 26 * len(pairs),
        "encoding": {
            "y": {"field": "domain", "type": "nominal", "sort": list(pairs), "title": None},
            "tooltip": tips,
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 3},
                "encoding": {"x": {"field": "frozen", **x}, "x2": {"field": "tuned"}},
            },
            {
                "transform": [{"fold": ["frozen", "tuned"], "as": ["model", "value"]}],
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {
                    "x": {"field": "value", **x},
                    "color": {**model, "scale": {"domain": ["frozen", "tuned"]}},
                    "shape": {**model, "scale": {"domain": ["frozen", "tuned"], "range": ["diamond", "circle"]}},
                },
            },
        ],
    }
    return Chart("gains", "What tuning changed", "From the frozen model to the tuned one, domain by domain.", spec)


def loss(run: RunFacts) -> Chart | None:
    """The training loss of every round, and the loss on held-out samples wherever it was measured."""
    held_out = run.measured_on
    measured = some_of([*run.measured("test_loss").items()], _MOST_EVALUATIONS)
    points = {held_out: measured, "training": thinned(run.rounds, lambda each: each.loss)}
    note = f"In training, mean over the samples of a round; on {held_out}, average over the domains."
    return _lines("loss", "Loss by round", note, points, "loss", ".4f")


def shares(run: RunFacts) -> Chart | None:
    """The measures that are shares beside the accuracy, on average over the domains."""
    measured = {name: some_of([*run.measured(name).items()], _MOST_EVALUATIONS) for name in SHARES}
    points = {measure_name(name): [(at, 100 * value) for at, value in of] for name, of in measured.items()}
    note = "Average over the domains. The calibration error is how far confidence and accuracy are apart: low is good."
    return _lines("measures", "Macro-F1 and calibration error", note, points, "%", _PERCENT)


def seconds(run: RunFacts) -> Chart | None:
    """The wall-clock time of every round."""
    rows = [{"round": number, "value": value} for number, value in thinned(run.rounds, lambda each: each.seconds)]
    spec = line_chart(rows, "seconds", ".3g", zero=True)
    return Chart("seconds", "Time of a round", "Wall-clock time, without evaluation.", spec) if rows else None


def simulated_seconds(run: RunFacts) -> Chart | None:
    """The time of every round on the clients' devices, where these are simulated."""
    found = thinned(run.rounds, lambda each: each.simulated_seconds)
    rows = [{"round": number, "value": value} for number, value in found]
    spec = line_chart(rows, "simulated seconds", ".3g", zero=True)
    note = "What the round takes on the clients' simulated devices."
    return Chart("simulated_seconds", "Simulated time of a round", note, spec) if rows else None


def allocation(run: RunFacts, cells: int = MOST_CELLS) -> Chart | None:
    """Heat map, of at most `cells` cells, of the share of participants that held each block in each round."""
    if not any(each.holders for each in run.rounds):
        return None
    depth, rows = block_count(run), list[dict[str, object]]()
    shares = [0.0]
    for name, group in binned(run.rounds, cells // depth):
        people = sum(each.participants for each in group)
        for block in range(depth):
            held = sum(each.holders[block] for each in group if block < len(each.holders))
            shares.append(round(held / max(people, 1), 4))
            clients = _holders(group, block)
            rows.append({"x": name, "y": block + 1, "v": shares[-1], "n": f"{held:,} of {people:,}", "c": clients})
    tips = [tip("x", "round"), tip("y", "block"), tip("n", "participants with it"), tip("c", "clients")]
    color = {
        "title": "share of the participants",
        "legend": {"labelExpr": _PERCENT_LABEL},
        "scale": {"domain": [0, max(shares)]},
    }
    y = {"title": "block", "sort": "descending"}
    spec = heat_map(rows, {"title": "round"}, y, color, tips, height=320, lines=depth)
    note = "Block 1 is next to the input. A cell in the colour of 0 %: no participant held the block."
    if len(rows) < depth * len(run.rounds):
        note += " Of so many rounds, a column is the mean over neighbours."
    return Chart("allocation", "Who holds which block", note, spec, wide=True)


def participation(run: RunFacts) -> Chart | None:
    """Heat map of how many blocks each client held in each round; of many, how many of a domain took part."""
    start, rows = run.start, list[dict[str, object]]()
    held = [(each, client) for each in run.rounds for client in each.held or {}]
    if start is None or not held or not start.client_domains:
        return None
    if len(held) > MOST_CELLS:
        return _participation_by_domain(run, start)
    everyone, seen = range(len(start.client_domains)), {client for _, client in held}
    clients = _by_domain(everyone if len(everyone) <= _MOST_EMPTY else seen, start)
    for each, client in held:
        blocks = (each.held or {})[client]
        text = first_few(runs_text([block + 1 for block in blocks]).split(", "), _MOST_NAMED)
        rows.append({"x": each.number, "y": _client_name(client, start), "v": len(blocks), "t": text})
    tips = [tip("x", "round"), tip("y", "client"), tip("v", "number of blocks"), tip("t", "blocks held")]
    names = [_client_name(client, start) for client in clients]
    y = {"title": None, "sort": names, "scale": {"domain": names}}
    color = {"title": "blocks held", "scale": {"domain": [0, start.blocks]}, "legend": {"tickMinStep": 1}}
    x = {"title": "round", "sort": "ascending"}
    spec = heat_map(rows, x, y, color, tips, height=560, lines=len(clients))
    note = f"Empty cells: the client did not take part, or its update did not count.{_never(run, start)}"
    return Chart("participation", "Who takes part", note, spec, wide=True)


def _participation_by_domain(run: RunFacts, start: StartFacts) -> Chart | None:
    """Heat map of how many clients of each domain took part in a round."""
    domains, rows = list(dict.fromkeys(start.client_domains)), list[dict[str, object]]()
    if len(domains) > MOST_CELLS:
        return None
    for name, group in binned(run.rounds, MOST_CELLS // len(domains)):
        held = {domain: list[int]() for domain in domains}
        for each in group:
            for client, blocks in (each.held or {}).items():
                held[start.client_domains[client]].append(len(blocks))
        for domain, counts in held.items():
            if counts:
                clients, usual = round(len(counts) / len(group), 2), round(mean(counts), 2)
                rows.append({"x": name, "y": short(domain), "v": clients, "t": usual})
    tips = [
        tip("x", "round"),
        tip("y", "domain"),
        tip("v", "clients in a round"),
        tip("t", "blocks held by one, on average"),
    ]
    color = {"title": "clients", "scale": {"domainMin": 0}}
    y = {"title": None, "sort": [short(domain) for domain in domains]}
    spec = heat_map(rows, {"title": "round"}, y, color, tips, height=320, lines=len(domains))
    note = "How many clients of each domain trained in a round; there are too many to show them one by one."
    note += _never(run, start)
    return Chart("participation", "Who takes part", note, spec, wide=True)


def trainings(run: RunFacts) -> Chart | None:
    """How many updates trained each block."""
    if not any(each.trainers for each in run.rounds):
        return None
    note = "How many updates of clients have trained the block, over all rounds."
    return Chart("trainings", "Trainings of each block", note, block_bars(training_counts(run), "updates", ",d"))


def block_changes(run: RunFacts) -> Chart | None:
    """How far tuning has moved the weights of each block."""
    if run.block_changes is None:
        return None
    note = "Frobenius norm of what tuning adds to the weights of the block."
    return Chart("block_changes", "Change of each block", note, block_bars(run.block_changes, "norm", ".3g"))


def label_matrix(run: RunFacts) -> Chart | None:
    """Heat map of the training samples of each class, by client or, for many clients, by domain."""
    start = run.start
    if start is None or not start.classes:
        return None
    clients = _by_domain(range(len(start.client_domains)), start)
    groups = {_client_name(client, start): [client] for client in clients}
    if len(groups) * len(start.classes) > MOST_CELLS:
        groups = {name: [c for c in clients if start.client_domains[c] == name] for name in start.client_domains}
    if len(groups) * len(start.classes) > MOST_CELLS:
        return None
    classes = [short(label) for label in start.classes]
    classes = classes if len(set(classes)) == len(classes) else start.classes
    cells = (
        (label, name, sum(counts[client] for client in members))
        for label, counts in zip(classes, start.label_counts, strict=True)
        for name, members in groups.items()
    )
    rows = [{"x": name, "y": label, "v": samples} for label, name, samples in cells if samples]
    tips = [tip("x", "of"), tip("y", "class"), tip("v", "samples")]
    many = len(groups) > _MOST_SLANTED
    axis = {"labelAngle": -90 if many else -45, "labelOverlap": many, "labelLimit": 120}
    x = {"title": None, "sort": list(groups), "axis": axis}
    color = {"title": "training samples", "scale": {"type": "sqrt", "domainMin": 0}}
    y = {"title": "class", "sort": classes}
    spec = heat_map(rows, x, y, color, tips, height=420, lines=len(start.classes))
    return Chart("labels", "Labels of the clients", "Training samples. Empty cells: none.", spec, wide=True)


def _lines(
    name: str, title: str, note: str, points: Mapping[str, Iterable[tuple[float, float]]], unit: str, digits: str
) -> Chart | None:
    """A chart of a line for each of the `points`, round and value, that has any."""
    rows = [{"round": at, "series": line, "value": value} for line, of in points.items() for at, value in of]
    names = list(dict.fromkeys(str(row["series"]) for row in rows))
    return Chart(name, title, note, line_chart(rows, unit, digits, names)) if rows else None


def training_counts(run: RunFacts) -> list[int]:
    """How many updates trained each block, [blocks]."""
    counts = [0] * block_count(run)
    for each in run.rounds:
        for block, trainers in enumerate(each.trainers):
            counts[block] += trainers
    return counts


def block_count(run: RunFacts) -> int:
    """Number of the model's blocks; of those that were ever held, where that is all that is known."""
    if run.start is not None:
        return run.start.blocks
    return max([len(each.holders) for each in run.rounds] + [len(run.block_changes or [])], default=0)


def _holders(group: Sequence[RoundFacts], block: int) -> str:
    """The clients that hold a block, in a single round whose holders are known; else a dash."""
    if len(group) > 1 or group[0].held is None:
        return "–"
    clients = [str(client) for client, blocks in group[0].held.items() if block in blocks]
    return first_few(clients, _MOST_NAMED) or "none"


def _never(run: RunFacts, start: StartFacts) -> str:
    """A sentence, after a space, about the clients that took part in no round; empty if all did, or it is not known."""
    if any(each.held is None for each in run.rounds):
        return ""
    seen = {client for each in run.rounds for client in each.held or {}}
    never = [client for client in range(len(start.client_domains)) if client not in seen]
    if not never:
        return ""
    named = first_few([_client_name(client, start) for client in never], _MOST_NAMED)
    return f" Of {len(start.client_domains):,} clients, {len(never):,} took part in no round: {named}."


def _client_name(client: int, start: StartFacts) -> str:
    """`client 3 (sketch)`."""
    return f"client {client} ({short(start.client_domains[client])})"


def _by_domain(clients: Collection[int], start: StartFacts) -> list[int]:
    """The clients ordered by domain, as the domains first appear, then by number."""
    place = {domain: index for index, domain in enumerate(dict.fromkeys(start.client_domains))}
    return sorted(clients, key=lambda client: (place[start.client_domains[client]], client))
