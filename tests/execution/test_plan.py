"""Plans of passes, and the tables that go to the device with them."""

from __future__ import annotations

import numpy as np
import torch

from fedra_engine.execution.plan import HostPlan, RequestedTables, SweepPlan

CPU = torch.device("cpu")
SLOTS = np.array([[0, -1, 1], [2, -1, -1]])


def host_plan(earlier: RequestedTables | None = None) -> HostPlan:
    return HostPlan([2, 3], SLOTS, np.arange(2), scale=1.0, dtype=torch.float32, device=CPU, earlier=earlier)


def planned(plan: HostPlan) -> SweepPlan:
    tables = iter([torch.from_numpy(table) for table in plan.tables()])
    there = plan.with_tables(tables)
    assert next(tables, None) is None
    return there


def step(plan: SweepPlan, tokens: int) -> list[torch.Tensor]:
    """Ask for tables as the kernels of a step on texts of `tokens` tokens do."""
    plan.requested.clear()
    asked = [plan.heads.filled]
    for rows in plan.blocks:
        if rows is not None:
            groups = rows.groups.per_token(tokens)
            asked += [groups.scales, groups.spans(4), groups.chunks(3).rows, groups.chunks(3).groups]
    return asked


def test_what_was_asked_of_a_plan_in_its_last_step_goes_with_the_next_one() -> None:
    plan = planned(host_plan())
    for tokens in (5, 7, 6):
        step(plan, tokens)
    again = host_plan(plan.requested)
    # Of the heads one table; of two blocks four arrays each, and which samples go through the one that not all hold.
    assert len(again.tables()) == 1 + 2 * 4 + 1
    found, expected = step(planned(again), 6), step(planned(host_plan()), 6)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_tables_that_were_not_asked_of_the_plan_before_are_made_when_they_are() -> None:
    plan = planned(host_plan())
    step(plan, 5)
    found, expected = step(planned(host_plan(plan.requested)), 7), step(planned(host_plan()), 7)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
