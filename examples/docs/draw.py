"""Draw the pictures of "How it works": ``python examples/docs/draw.py`` writes ``pictures/*.svg``.

Colours are variables, which the pages set for their light and their dark scheme; a picture that is
opened by itself has those that stand behind them.
"""

from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
INK = "var(--picture-ink, #263238)"
PALE = "var(--picture-pale, #78909c)"
BASE = "var(--picture-base, #cfd8dc)"
LORA = "var(--picture-lora, #ffb74d)"
GOOD = "var(--picture-good, #4caf50)"
BAD = "var(--picture-bad, #e53935)"
TIMES = "\N{MULTIPLICATION SIGN}"
LINE = "var(--picture-line, #546e7a)"


def box(x: float, y: float, w: float, h: float, fill: str, words: str = "", size: int = 15) -> str:
    """Return a rounded box with words in the middle; a line of them each."""
    shape = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}"/>'
    lines = words.split("\n") if words else []
    first = y + h / 2 + size * 0.35 - (len(lines) - 1) * size * 0.65
    texts = [
        text(x + w / 2, first + number * size * 1.3, line, size, on=fill)
        for number, line in enumerate(lines)
    ]
    return shape + "".join(texts)


def text(x: float, y: float, words: str, size: int = 15, at: str = "middle", on: str = "") -> str:
    """Return a line of text; on a filled box it has the colour that can be read there."""
    fill = INK if not on or on == "none" else "var(--picture-on-box, #1c2529)"
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}"'
    return f'<text {place} fill="{fill}">{words}</text>'


def arrow(
    x1: float, y1: float, x2: float, y2: float, colour: str = LINE, dashed: bool = False
) -> str:
    """Return a line with a head."""
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    dx, dy = x2 - x1, y2 - y1
    length = (dx * dx + dy * dy) ** 0.5
    ux, uy = dx / length, dy / length
    wings = [(x2 - 9 * ux + side * 5 * uy, y2 - 9 * uy - side * 5 * ux) for side in (1, -1)]
    head = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x2, y2), *wings))
    return (
        f'<path d="M{x1:g} {y1:g}L{x2 - 7 * ux:.1f} {y2 - 7 * uy:.1f}" stroke="{colour}" '
        f'stroke-width="2" fill="none"{dash}/><polygon points="{head}" fill="{colour}"/>'
    )


def frame(x: float, y: float, w: float, h: float, colour: str = PALE, dashed: bool = False) -> str:
    """Return an empty box."""
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="none" stroke="{colour}" '
        f'stroke-width="2"{dash}/>'
    )


def picture(height: int, *parts: str) -> str:
    """Return a whole file of 640 in width."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" '
        'font-family="system-ui, sans-serif">\n'
        f'<rect width="640" height="{height}" rx="10" fill="var(--picture-paper, #fff)"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def update() -> str:
    """W, and A and B beside it."""
    return picture(
        250,
        text(40, 130, "x", 20),
        arrow(55, 125, 120, 75),
        arrow(55, 125, 120, 180),
        box(125, 25, 230, 100, BASE, f"W\nfrozen, 4096 {TIMES} 4096"),
        box(125, 150, 85, 60, LORA, f"A\n8 {TIMES} 4096", 14),
        arrow(215, 180, 265, 180),
        box(270, 150, 85, 60, LORA, f"B\n4096 {TIMES} 8", 14),
        arrow(360, 180, 415, 180),
        text(462, 186, f"{TIMES} alpha / r", 15),
        arrow(360, 75, 535, 115),
        arrow(510, 180, 540, 143),
        f'<circle cx="553" cy="126" r="17" fill="none" stroke="{LINE}" stroke-width="2"/>',
        text(553, 133, "+", 20),
        arrow(571, 126, 605, 126),
        text(620, 132, "y", 20),
        text(240, 236, "65,536 numbers train, of 16.8 million: 0.4 %", 14),
    )


def in_place() -> str:
    """A wrapper, and a class that was swapped."""
    return picture(
        255,
        text(160, 32, "a wrapper", 17),
        frame(20, 48, 280, 185, PALE),
        text(160, 74, "PeftModel", 14),
        frame(45, 90, 230, 125, PALE),
        text(160, 116, "base_model.model...", 14),
        box(65, 132, 115, 60, BASE, "base_layer\nweight", 13),
        box(190, 132, 70, 60, LORA, "lora_A\nlora_B", 13),
        text(480, 32, "in place", 17),
        frame(340, 48, 280, 185, GOOD),
        text(480, 74, "your model, its own class", 14),
        box(365, 90, 230, 60, BASE, "q_proj.weight\nthe same Parameter", 13),
        box(365, 160, 230, 52, LORA, "q_proj.lora_A, q_proj.lora_B", 13),
    )


def memory() -> str:
    """Bars of what an 8B model's training keeps, in GB."""
    rows = [
        ("full", [(16.1, BASE, "weights"), (16.1, PALE, "gradients"), (64.2, BAD, "Adam")]),
        ("LoRA", [(16.2, BASE, ""), (0.17, PALE, ""), (0.34, BAD, "")]),
        ("QLoRA", [(5.6, BASE, ""), (0.17, PALE, ""), (0.34, BAD, "")]),
    ]
    parts = [text(20, 30, "an 8B model, rank 16, beside activations", 15, "start")]
    for number, (name, bars) in enumerate(rows):
        x, y = 90.0, 55 + 55 * number
        parts.append(text(78, y + 24, name, 15, "end"))
        for amount, fill, words in bars:
            width = max(amount * 4.6, 2)
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="36" fill="{fill}"/>'
            )
            if words:
                parts.append(text(x + width / 2, y + 23, words, 13, on=fill))
            x += width
        whole = sum(amount for amount, _, _ in bars)
        parts.append(text(x + 10, y + 24, f"{whole:.0f} GB", 15, "start"))
    return picture(225, *parts)


def together() -> str:
    """Three layers that read one tensor."""
    parts = [box(30, 95, 70, 50, BASE, "x"), frame(190, 20, 190, 200, GOOD)]
    for number, name in enumerate(("q", "k", "v")):
        y = 38 + 62 * number
        parts += [
            box(210, y, 80, 44, BASE, f"{name}_proj", 14),
            box(298, y, 62, 44, LORA, "A, B", 14),
            arrow(382, y + 22, 440, y + 22),
            text(455, y + 28, name, 17),
        ]
    parts += [
        arrow(102, 120, 186, 120),
        text(285, 240, "one function, one look at x", 14),
        text(555, 105, "x is kept once,", 14),
        text(555, 125, "or made again", 14),
        text(555, 145, "in the backward pass", 14),
    ]
    return picture(255, *parts)


def proven() -> str:
    """Tensors of a file, places of a model."""
    names = ("q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B")
    parts = [text(130, 30, "the file", 16), text(510, 30, "the model", 16)]
    for number, name in enumerate(names):
        y = 45 + 46 * number
        there = number < 3
        here = box(30, y, 200, 36, LORA, name, 14) if there else frame(30, y, 200, 36, BAD, True)
        parts += [here, box(410, y, 200, 36, BASE, name, 14)]
        colour = GOOD if there else BAD
        parts.append(arrow(235, y + 18, 405, y + 18, colour, not there))
        if not there:
            parts += [text(130, y + 23, "missing", 14)]
    parts.append(text(320, 252, "one missing: an error that names it, and nothing has changed", 14))
    return picture(270, *parts)


def switch() -> str:
    """One object decides for all layers."""
    parts = [
        box(30, 90, 150, 60, GOOD, "in use:\nfrench", 15),
        text(105, 180, "one assignment", 14),
    ]
    for number in range(3):
        y = 30 + 68 * number
        parts += [
            arrow(184, 120, 246, y + 25),
            box(250, y, 110, 50, BASE, f"layer {number}", 14),
            frame(375, y, 75, 50, PALE, True),
            text(412, y + 30, "default", 13),
            box(460, y, 75, 50, LORA, "french", 13),
            frame(545, y, 75, 50, PALE, True),
            text(582, y + 30, "legal", 13),
        ]
    return picture(240, *parts)


def merge() -> str:
    """Added, rounded once, and back."""
    return picture(
        215,
        box(25, 40, 120, 55, BASE, "W\nbfloat16", 14),
        text(165, 74, "+", 22),
        box(185, 40, 130, 55, LORA, "alpha / r · B A\nfloat32", 14),
        arrow(320, 67, 385, 67),
        text(352, 55, "merge", 13),
        box(390, 40, 110, 55, BASE, "the sum\nfloat32", 14),
        arrow(504, 67, 535, 67),
        box(540, 40, 80, 55, GOOD, "rounded\nonce", 14),
        box(25, 145, 120, 45, BASE, "old bytes", 14),
        arrow(85, 98, 85, 141, LINE, True),
        text(95, 124, "kept", 13, "start"),
        f'<path d="M580 98V167H160" stroke="{LINE}" stroke-width="2" fill="none"/>',
        arrow(170, 167, 149, 167),
        text(370, 159, "unmerge: the exact bytes", 14),
    )


def atomic() -> str:
    """Write beside, rename."""
    return picture(
        190,
        box(25, 50, 150, 60, BASE, "adapter_model\n.safetensors, old", 13),
        arrow(180, 80, 240, 80),
        frame(245, 30, 160, 100, PALE, True),
        box(255, 40, 140, 35, BASE, "old", 13),
        box(255, 84, 140, 35, LORA, "new, hidden name", 13),
        arrow(410, 80, 470, 80),
        text(440, 68, "rename", 13),
        box(475, 50, 140, 60, GOOD, "new", 14),
        text(110, 160, "killed here: old", 14),
        text(325, 160, "killed here: old", 14),
        text(545, 160, "killed here: new", 14),
    )


def pictures() -> Iterator[tuple[str, str]]:
    """Yield each picture's name and its SVG."""
    for draw in (update, in_place, memory, together, proven, switch, merge, atomic):
        yield draw.__name__, draw()


if __name__ == "__main__":
    for name, drawn in pictures():
        (FOLDER / f"{name}.svg").write_text(drawn)
