"""Draws docs/kernels-layout.svg from the layout's own functions: visible patches, packed tiles, Morton order and slots.

python docs/kernels_figure.py
"""

from pathlib import Path
from xml.sax.saxutils import escape

import torch

from mpmae.kernels import morton_sites, tile_slots
from mpmae.masking import draw_visible

SIDE, NUM_VISIBLE, TILE = 7, 19, 4
INK, GREY, LINE, EMPTY = "#1f2328", "#6a737d", "#8a8f98", "#eef0f2"
BLUE, ORANGE, GREEN = "#a6cbe8", "#fbd1a2", "#b5dcae"
WIDTH, HEIGHT = 940, 560
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"


class Page:
    """SVG elements in order."""

    def __init__(self):
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, size: int = 12, colour: str = INK, anchor: str = "start", bold: bool = False
    ):
        """A line of text with its baseline at y."""
        style = f"font-size='{size}' fill='{colour}' text-anchor='{anchor}'" + (" font-weight='bold'" if bold else "")
        self.parts.append(f"<text x='{x:g}' y='{y:g}' {style}>{escape(words)}</text>")

    def square(self, x: float, y: float, side: float, fill: str, words: str = "", stroke: str = "#ffffff", wide: float = 1):
        """A square with words in the middle."""
        place = f"x='{x:g}' y='{y:g}' width='{side:g}' height='{side:g}'"
        self.parts.append(f"<rect {place} fill='{fill}' stroke='{stroke}' stroke-width='{wide:g}'/>")
        if words:
            size = 11 if side > 20 else 9
            self.text(x + side / 2, y + side / 2 + size * 0.36, words, size, anchor="middle")

    def path(self, points: list[tuple[float, float]], colour: str, wide: float = 1.4):
        """A line through points."""
        line = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='{wide:g}'/>")

    def svg(self) -> str:
        """The whole file."""
        size = f"viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}'"
        back = f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#ffffff' rx='8'/>"
        return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT}>", back, *self.parts, "</svg>", ""])


def draw_patches(page: Page, x: float, y: float, slots: torch.Tensor, chosen: tuple[int, int]) -> None:
    """The image's patches with the slots of the visible ones; the neighbourhood of one patch is marked."""
    cell, row, column = 32, *chosen
    for r in range(SIDE):
        for c in range(SIDE):
            slot = int(slots[r + 3, c + 3])
            near = max(abs(r - row), abs(c - column)) <= 1
            fill = EMPTY if slot < 0 else ORANGE if (r, c) == chosen else GREEN if near else BLUE
            page.square(x + c * cell, y + r * cell, cell, fill, str(slot) if slot >= 0 else "")
    page.square(x + (column - 1) * cell, y + (row - 1) * cell, 3 * cell, "none", stroke="#c2410c", wide=2)


def draw_packed(page: Page, x: float, y: float, chosen: int, near: set[int]) -> None:
    """The packed tiles side by side."""
    cell = 31
    for slot in range(NUM_VISIBLE):
        fill = ORANGE if slot == chosen else GREEN if slot in near else BLUE
        page.square(x + slot * cell, y, cell, fill, str(slot))


def draw_morton(page: Page, x: float, y: float) -> None:
    """The sites of a tile with their positions, a line through them, and the squares that become one site."""
    cell = 34
    centres, labels = [], []
    for position, (r, c) in enumerate(morton_sites(TILE).tolist()):
        page.square(x + c * cell, y + r * cell, cell, ORANGE)
        labels.append((x + c * cell + 6, y + r * cell + 13, str(position)))
        centres.append((x + (c + 0.5) * cell, y + (r + 0.5) * cell + 3))
    page.path(centres, "#ffffff", 3)
    for label in labels:
        page.text(*label, 10)
    for r in range(0, TILE, 2):
        for c in range(0, TILE, 2):
            page.square(x + c * cell, y + r * cell, 2 * cell, "none", stroke=INK, wide=1.6)


def draw_slots(page: Page, x: float, y: float, slots: torch.Tensor) -> None:
    """The table of slots with its border."""
    cell = 17
    for r, row in enumerate(slots.tolist()):
        for c, slot in enumerate(row):
            inside = 3 <= r < SIDE + 3 and 3 <= c < SIDE + 3
            page.square(
                x + c * cell, y + r * cell, cell, BLUE if slot >= 0 else EMPTY if inside else "#ffffff", stroke="#d6dadf"
            )
            words, colour = (str(slot), INK) if slot >= 0 else ("-1" if inside else "·", LINE)
            page.text(x + (c + 0.5) * cell, y + (r + 0.5) * cell + 3, words, 8, colour, "middle")
    page.square(x + 3 * cell, y + 3 * cell, SIDE * cell, "none", stroke=INK, wide=1.4)


def figure() -> str:
    """The text of docs/kernels-layout.svg."""
    visible = draw_visible(0, 0, [4], SIDE * SIDE, NUM_VISIBLE)
    slots = tile_slots(visible, SIDE)[0]
    inner = slots[3:-3, 3:-3]
    # of the visible patches inside, the one with as many visible neighbours as the mean, 2 or 3 of 8
    counts = {
        (r, c): int((inner[r - 1 : r + 2, c - 1 : c + 2] >= 0).sum()) - 1
        for r in range(1, SIDE - 1)
        for c in range(1, SIDE - 1)
        if inner[r, c] >= 0
    }
    row, column = min(counts, key=lambda place: abs(counts[place] - 3))
    near = set(inner[row - 1 : row + 2, column - 1 : column + 2].flatten().tolist()) - {-1}
    chosen = int(inner[row, column])

    page = Page()
    page.text(20, 32, "What the encoder computes on", 15, bold=True)
    page.text(20, 58, f"{NUM_VISIBLE} of {SIDE} x {SIDE} patches are visible", 12, bold=True)
    draw_patches(page, 20, 70, slots, (row, column))
    page.text(20, 312, f"tile {chosen} needs 3 sites around it:", 11, GREY)
    page.text(20, 328, f"{counts[row, column]} of 8 neighbours are there, the others", 11, GREY)
    page.text(20, 344, "are 0 and cost nothing", 11, GREY)

    x = 300
    page.text(x, 58, "in memory: [N, V x s x s, C], tile after tile, channels last", 12, bold=True)
    draw_packed(page, x, 70, chosen, near)
    page.text(x, 120, "hidden patches have no place; every sample has as many tiles, so shapes never change", 11, GREY)

    page.text(x, 166, f"a tile at s = {TILE}: Morton order", 12, bold=True)
    draw_morton(page, x, 178)
    page.text(x, 332, "four siblings lie next to each other:", 11, GREY)
    page.text(x, 348, "the 2 x 2 downsampling is a reshape", 11, GREY)
    page.text(x, 364, "and one matrix product", 11, GREY)

    x = 610
    page.text(x, 166, "slots: where a patch lies, -1 if hidden", 12, bold=True)
    draw_slots(page, x, 178, slots)
    page.text(x, 418, "int16 [N, G + 6, G + 6]; the border of 3 spares", 11, GREY)
    page.text(x, 434, "every test for the edge of the image", 11, GREY)

    page.text(20, 470, "The four stages", 12, bold=True)
    for i, (side, words) in enumerate(
        ((8, "64 sites, C channels"), (4, "16 sites, 2C"), (2, "4 sites, 4C"), (1, "1 site, 8C"))
    ):
        left = 20 + i * 225
        step = 48 / side
        for r in range(side):
            for c in range(side):
                page.square(left + c * step, 484 + r * step, step, ORANGE, wide=0.6)
        page.text(left + 60, 504, f"s = {side}", 12, bold=True)
        page.text(left + 60, 522, words, 11, GREY)
    return page.svg()


if __name__ == "__main__":
    (Path(__file__).parent / "kernels-layout.svg").write_text(figure())
