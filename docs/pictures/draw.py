"""Draws the pictures of the documentation: `python docs/pictures/draw.py` writes them beside this file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
BLOCKS = 12
CAPACITIES = (12, 10, 8, 6, 4, 3)
COLOURS = ("#3b6fd4", "#d9822b", "#2f9e73", "#b0509a", "#8a6fd1", "#c2483d")
"""A colour for each client; all can be told from both backgrounds."""
HELD = {"A": (0, 1, 2, 3, 4, 5), "B": (0, 2, 3, 5), "C": (1, 3, 4), "D": (2, 5)}
"""The blocks of each client in the picture of the sweep."""
STYLE = """
  .paper { fill: #ffffff; stroke: #d0d7de }
  .ink { fill: #24292f }
  .faint { fill: #59636e }
  .empty { fill: #eff2f5 }
  text { font: 14px system-ui, sans-serif }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #15181e; stroke: #3d444d }
    .ink { fill: #e6e9ee }
    .faint { fill: #9aa4b1 }
    .empty { fill: #262c35 }
  }
"""


def svg(width: int, height: int, title: str, parts: Iterator[str]) -> str:
    """An SVG with a sheet of its own, which follows the reader's light or dark colours."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, content: str, *, kind: str = "ink", anchor: str = "start") -> str:
    """A line of text whose baseline is at y."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{content}</text>'


def box(x: float, y: float, width: float, height: float, colour: str | None) -> str:
    """A cell in a client's colour, or an empty one."""
    fill = 'class="empty"' if colour is None else f'fill="{colour}"'
    return f'<rect {fill} x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"/>'


def allocation() -> Iterator[str]:
    """Who holds which block in two rounds, and how many clients each block's mean is over."""
    rng = np.random.default_rng(7)
    for number, top in ((1, 40), (2, 290)):
        draws = [np.sort(rng.choice(BLOCKS, capacity, replace=False)) for capacity in CAPACITIES]
        yield text(24, top, f"Round {number}")
        for block in range(BLOCKS):
            yield text(211 + 38 * block, top, str(block + 1), kind="faint", anchor="middle")
        for client, (capacity, blocks) in enumerate(zip(CAPACITIES, draws, strict=True)):
            y = top + 14 + 28 * client
            yield text(24, y + 17, f"client {client + 1} holds {capacity}", kind="faint")
            for block in range(BLOCKS):
                yield box(195 + 38 * block, y, 32, 22, COLOURS[client] if block in blocks else None)
        y = top + 14 + 28 * len(CAPACITIES)
        yield text(24, y + 17, "the mean is over")
        for block in range(BLOCKS):
            count = sum(block in blocks for blocks in draws)
            yield text(211 + 38 * block, y + 17, str(count), anchor="middle")


def sweep() -> Iterator[str]:
    """The way of each client's samples through the model: through the blocks that it holds, around the others."""
    left, step, lane = 162, 112, 56
    yield text(24, 38, "one batch", kind="faint")
    for block in range(6):
        x = left + step * block
        yield box(x, 52, 60, lane * len(HELD) + 8, None)
        yield text(x + 30, 38, f"block {block + 1}", anchor="middle")
    for number, (name, held) in enumerate(HELD.items()):
        yield from _way(number, name, held, left, step, 84 + lane * number)
    x = left + step * 6 - 20
    yield text(x, 38, "heads", kind="faint")
    y = 52 + lane * len(HELD) + 32
    yield text(left, y, "Each block's frozen weights are read once, for all clients that hold it.")
    yield text(left, y + 22, "A filled cell: the product with the client's own A and B is added.", kind="faint")


def _way(number: int, name: str, held: Sequence[int], left: int, step: int, y: int) -> Iterator[str]:
    """The line of a client's samples at height y."""
    colour, path = COLOURS[number], f"M 122 {y}"
    for block in range(6):
        x = left + step * block
        path += f" H {x}"
        if block in held:
            path += f" H {x + 60}"
        else:
            path += f" c 8 0 6 19 14 19 H {x + 46} c 8 0 6 -19 14 -19"
    yield f'<path d="{path} H {left + step * 6 - 26}" fill="none" stroke="{colour}" stroke-width="3"/>'
    for block in held:
        yield box(left + step * block + 8, y - 12, 44, 24, colour)
    for sample in range(3):
        yield f'<circle cx="{112 - 10 * sample}" cy="{y}" r="4" fill="{colour}"/>'
    yield text(24, y + 5, f"client {name}", kind="faint")
    yield box(left + step * 6 - 26, y - 9, 44, 18, colour)


PICTURES = {
    "allocation.svg": lambda: svg(672, 512, "Two rounds of an allocation", allocation()),
    "sweep.svg": lambda: svg(894, 352, "The layer sweep", sweep()),
}
"""What makes each file."""


if __name__ == "__main__":
    for file, draw in PICTURES.items():
        (HERE / file).write_text(draw(), encoding="utf-8")
