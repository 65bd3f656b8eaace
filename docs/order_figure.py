"""Draws docs/order.svg from the orders themselves: what a step reads, how ranks share it, where a run resumes.

python docs/order_figure.py
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from xml.sax.saxutils import escape

from mpmae.loader import EpochOrder, ExactOrder, TrainOrder, WindowOrder, plan_batches

SHARD_SIZES = (4, 5, 4, 5, 4, 4)
GLOBAL_BATCH, WINDOW, SEED = 8, 2, 0
TINTS = ("#a6cbe8", "#fbd1a2", "#b5dcae", "#d9c8ec", "#f6b8b5", "#f3e79b")
INK, GREY, LINE, ACCENT = "#1f2328", "#6a737d", "#8a8f98", "#c2410c"
CELL, LEFT, WIDTH = 29, 150, 940
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"


class Page:
    """SVG elements, top to bottom."""

    def __init__(self):
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, size: int = 12, colour: str = INK, anchor: str = "start", bold: bool = False
    ):
        """A line of text with its baseline at y."""
        weight = " font-weight='bold'" if bold else ""
        style = f"font-size='{size}' fill='{colour}' text-anchor='{anchor}'{weight}"
        self.parts.append(f"<text x='{x:g}' y='{y:g}' {style}>{escape(words)}</text>")

    def cells(self, x: float, y: float, ids: Sequence[int], faded: int = 0):
        """Samples side by side in the tints of their shards; the last `faded` are not used."""
        for i, sample in enumerate(ids):
            shard = next(s for s, end in enumerate(accumulate(SHARD_SIZES)) if sample < end)
            dim = " opacity='0.35'" if i >= len(ids) - faded else ""
            place = f"x='{x + i * CELL:g}' y='{y:g}' width='{CELL - 2}' height='{CELL - 2}' rx='3'"
            self.parts.append(f"<rect {place} fill='{TINTS[shard]}'{dim}/>")
            self.text(x + i * CELL + CELL / 2 - 1, y + CELL / 2 + 3, str(sample), 11, anchor="middle")

    def bracket(self, x: float, y: float, num: int, words: str, above: bool = False, colour: str = LINE):
        """A line with ends along `num` cells, and its name."""
        tick, end = (4, -6) if above else (-4, 15)
        right = x + num * CELL - 2
        path = f"M{x + 1:g},{y + tick:g} V{y:g} H{right - 1:g} V{y + tick:g}"
        self.parts.append(f"<path d='{path}' fill='none' stroke='{colour}' stroke-width='1.3'/>")
        self.text((x + right) / 2, y + end, words, 11, GREY if colour == LINE else colour, "middle")

    def svg(self, height: float) -> str:
        """The whole file."""
        size = f"viewBox='0 0 {WIDTH} {height:g}' width='{WIDTH}' height='{height:g}'"
        back = f"<rect width='{WIDTH}' height='{height:g}' fill='#ffffff' rx='8'/>"
        return "\n".join([f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT}>", back, *self.parts, "</svg>", ""])


def label(page: Page, y: float, *lines: str) -> None:
    """The name of a row, left of it."""
    for i, words in enumerate(lines):
        page.text(20, y + 13 + 15 * i, words, 12 if i == 0 else 11, INK if i == 0 else GREY, bold=i == 0)


def draw_epoch(page: Page, y: float, order: EpochOrder) -> None:
    """An epoch's samples with its windows above and its steps below."""
    ids = order.epoch(SEED, 0).tolist()
    dropped = len(ids) % GLOBAL_BATCH
    start = LEFT
    for i, window in enumerate(order.windows(SEED, 0)):
        name = " and ".join(str(shard) for shard in window.shards)
        page.bracket(start, y - 6, window.num_samples, f"window {i}: shards {name}", above=True)
        start += window.num_samples * CELL
    page.cells(LEFT, y, ids, faded=dropped)
    for step in range(len(ids) // GLOBAL_BATCH):
        page.bracket(LEFT + step * GLOBAL_BATCH * CELL, y + CELL + 5, GLOBAL_BATCH, f"step {step}")
    page.text(LEFT + (len(ids) - dropped / 2) * CELL - 1, y + CELL + 20, "dropped", 11, GREY, "middle")


def figure() -> str:
    """The text of docs/order.svg."""
    page = Page()
    page.text(20, 30, "The order of an epoch, and what a step reads", 15, bold=True)
    y = 62
    label(page, y, "on disk", "samples in shards")
    page.cells(LEFT, y, range(sum(SHARD_SIZES)))
    for shard, (end, size) in enumerate(zip(accumulate(SHARD_SIZES), SHARD_SIZES, strict=True)):
        page.bracket(LEFT + (end - size) * CELL, y + CELL + 5, size, f"shard {shard}")
    label(page, y + 82, "exact, epoch 0", "order(seed, epoch):", "a permutation")
    draw_epoch(page, y + 82, ExactOrder(sum(SHARD_SIZES)))
    window = WindowOrder(SHARD_SIZES, WINDOW)
    label(page, y + 182, "window, epoch 0", f"{WINDOW} shards at a time,", "permuted together")
    draw_epoch(page, y + 182, window)

    y += 274
    page.text(20, y, "Step 1 of the window order at any number of ranks, and resuming after it", 15, bold=True)
    order = TrainOrder(window, GLOBAL_BATCH, SEED)
    _, batch = order.global_batch(1)
    y += 24
    for world_size in (1, 2, 4):
        label(page, y, f"{world_size} rank{'s' * (world_size > 1)}")
        page.cells(LEFT, y, batch.tolist())
        plan = plan_batches(GLOBAL_BATCH, None, world_size)
        for rank in range(world_size):
            share = plan.share(batch, rank, 0)
            page.bracket(LEFT + rank * len(share) * CELL, y + CELL + 5, len(share), f"rank {rank}")
        y += 66
    x, top = LEFT + GLOBAL_BATCH * CELL + 60, y - 3 * 66
    page.text(x, top + 16, "checkpoint after step 1 stores", 12, bold=True)
    page.text(x, top + 36, "step 2 = epoch 0, batch 2; seed, mode, window, set", 12)
    page.text(x, top + 52, "(no loader state, no list of samples)", 11, GREY)
    page.text(x, top + 82, "resumed on any number of ranks: step 2 reads", 12, bold=True)
    page.cells(x, top + 92, order.global_batch(2)[1].tolist())
    page.bracket(x, top + 92 + CELL + 5, GLOBAL_BATCH, "step 2, as without the interruption", colour=ACCENT)
    page.text(x, top + 164, "the interruption repeats no sample and skips none", 11, GREY)
    return page.svg(y + 4)


if __name__ == "__main__":
    (Path(__file__).parent / "order.svg").write_text(figure())
