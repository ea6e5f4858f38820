"""Draw docs/quickstart.png: the comparison that ``make demo`` prints, from the runs that it left.

python docs/figures/terminal.py runs/quickstart/seed-5 runs/quickstart-clean/seed-5 ...
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from rich.ansi import AnsiDecoder
from rich.color import Color
from rich.console import Console
from rich.segment import Segment
from rich.terminal_theme import TerminalTheme

from fedbd.report.comparison import compare, load_run, render_comparison

OUT = Path(__file__).resolve().parents[1] / "quickstart.png"
COLUMNS = 118
SIZE, MARGIN = 22, 28
THEME = TerminalTheme(
    (255, 255, 255),
    (36, 41, 47),
    [
        (36, 41, 47),
        (207, 34, 46),
        (26, 127, 55),
        (154, 103, 0),
        (9, 105, 218),
        (191, 57, 137),
        (27, 124, 131),
        (90, 96, 102),
    ],
)
DIM = (110, 119, 129)


def lines(folders: list[str]) -> list[list[Segment]]:
    """Return the printed comparison as lines of styled text."""
    out = io.StringIO()
    console = Console(file=out, width=COLUMNS, force_terminal=True, color_system="standard")
    render_comparison(console, compare([load_run(folder) for folder in folders]))
    return [list(text.render(console)) for text in AnsiDecoder().decode(out.getvalue())]


def ink(segment: Segment) -> tuple[int, int, int]:
    """Return the color of a piece of text."""
    style = segment.style
    if style is None:
        return THEME.foreground_color
    if style.dim:
        return DIM
    return tuple((style.color or Color.default()).get_truecolor(THEME))  # type: ignore[return-value]


def main(folders: list[str]) -> None:
    """Draw the picture."""
    fonts = {
        bold: ImageFont.truetype(
            font_manager.findfont(
                font_manager.FontProperties(family="DejaVu Sans Mono", weight="bold" if bold else "normal")
            ),
            SIZE,
        )
        for bold in (False, True)
    }
    width, height = fonts[False].getlength("x"), round(SIZE * 1.3)
    text = [line for line in lines(folders) if line]
    image = Image.new(
        "RGB", (round(width * COLUMNS) + 2 * MARGIN, height * len(text) + 2 * MARGIN), THEME.background_color
    )
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(text):
        column = 0
        for segment in line:
            place = (MARGIN + column * width, MARGIN + row * height)
            draw.text(place, segment.text, fill=ink(segment), font=fonts[bool(segment.style and segment.style.bold)])
            column += len(segment.text)
    image.save(OUT, optimize=True)
    print(OUT)


if __name__ == "__main__":
    main(sys.argv[1:])
