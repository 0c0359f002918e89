"""Draws the way of a token, way-light.svg and way-dark.svg beside this file: `python docs/way.py`.

The three documents, their lengths and their places are those of way-of-a-token.md.
"""

from html import escape
from pathlib import Path

WIDTH = 800
HEIGHT = 450
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
SLOTS = 16  # of a row
DOCUMENTS = [
    ("A", 19, "Call me Ishmael. Some years ago, never …"),
    ("B", 7, "It was a clear day."),
    ("C", 5, "So be it."),
]
# name, tokens, how many of them predict the next one, and what stands above them
ROWS = [
    [("A", 16, 16, "A, its first 16 tokens")],
    [("B", 7, 6, "B"), ("C", 5, 4, "C"), ("A", 3, 2, "rest of A"), ("fill", 1, 0, "")],
]
THEMES = {
    "light": {
        "text": "#1f2328",
        "quiet": "#59636e",
        "line": "#818b98",
        "box": "#f6f8fa",
        "dot": "#ffffff",
        "A": "#0969da",
        "B": "#bc4c00",
        "C": "#1a7f37",
        "fill": "#d1d9e0",
    },
    "dark": {
        "text": "#f0f6fc",
        "quiet": "#9198a1",
        "line": "#656c76",
        "box": "#151b23",
        "dot": "#0d1117",
        "A": "#4493f8",
        "B": "#f0883e",
        "C": "#3fb950",
        "fill": "#3d444d",
    },
}


class Drawing:
    """Shapes in the colours of a theme, as lines of SVG."""

    def __init__(self, theme: dict[str, str]):
        self.theme = theme
        self.lines = []

    def cell(self, x: float, y: float, size: float, colour: str):
        where = f'x="{x:g}" y="{y:g}" width="{size - 1:g}" height="{size - 1:g}"'
        self.lines.append(f'<rect {where} fill="{self.theme[colour]}"/>')

    def box(self, x: float, y: float, width: float, height: float):
        where = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
        self.lines.append(f'<rect {where} fill="{self.theme["box"]}" stroke="{self.theme["line"]}"/>')

    def dot(self, x: float, y: float, colour: str = "dot"):
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="3" fill="{self.theme[colour]}"/>')

    def text(self, x: float, y: float, words: str, colour: str = "text", size: int = 13, anchor: str = "start"):
        style = f'fill="{self.theme[colour]}" font-size="{size}" text-anchor="{anchor}"'
        self.lines.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>')

    def title(self, x: float, y: float, number: int, words: str):
        style = f'fill="{self.theme["text"]}" font-size="15" font-weight="600"'
        self.lines.append(f'<text x="{x:g}" y="{y:g}" {style}>{number}. {escape(words)}</text>')

    def arrow(self, *points: tuple[float, float]):
        path = " L ".join(f"{x:g} {y:g}" for x, y in points)
        style = f'fill="none" stroke="{self.theme["line"]}" stroke-width="1.5" marker-end="url(#tip)"'
        self.lines.append(f'<path d="M {path}" {style}/>')

    def svg(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONT}">'
        name = "<title>The way of a token: documents, rows, attention, loss</title>"
        size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto"'
        tip = (
            f'<defs><marker id="tip" {size}><path d="M 0 0 L 8 4 L 0 8 z" fill="{self.theme["line"]}"/></marker></defs>'
        )
        return "\n".join([head, name, tip, *self.lines, "</svg>"]) + "\n"


def draw(theme: dict[str, str]) -> str:
    drawing = Drawing(theme)
    documents(drawing, x=16, y=24)
    drawing.arrow((318, 98), (344, 98))
    rows(drawing, x=356, y=24)
    drawing.arrow((568, 180), (568, 194), (96, 194), (96, 208))
    attention(drawing, x=16, y=230)
    drawing.arrow((204, 326), (234, 326))
    model(drawing, x=252, y=230)
    drawing.arrow((472, 326), (500, 326))
    loss(drawing, x=512, y=230)
    return drawing.svg()


def documents(drawing: Drawing, x: float, y: float):
    drawing.title(x, y, 1, "Texts become tokens")
    for number, (name, tokens, words) in enumerate(DOCUMENTS):
        top = y + 34 + number * 44
        drawing.text(x, top - 6, f"{name}  {words}")
        for slot in range(tokens):
            drawing.cell(x + slot * 12, top, 12, name)
        drawing.text(x + tokens * 12 + 6, top + 10, str(tokens), "quiet", 12)


def rows(drawing: Drawing, x: float, y: float):
    size = 27
    drawing.title(x, y, 2, "Tokens are packed into rows of 16 slots")
    for number, row in enumerate(ROWS):
        top = y + 34 + number * 54
        slot = 0
        for name, tokens, predict, words in row:
            drawing.text(x + slot * size, top - 6, words, "quiet", 12)
            for at in range(tokens):
                drawing.cell(x + (slot + at) * size, top, size, name)
                if at < predict:
                    drawing.dot(x + (slot + at + 0.5) * size - 0.5, top + size / 2 - 0.5)
            slot += tokens
    drawing.cell(x, y + 122, 14, "A")
    drawing.dot(x + 6.5, y + 128.5)
    drawing.text(x + 20, y + 133, "learns to predict the next token: 28 of 32 do. No document predicts", "quiet", 12)
    drawing.text(x + 20, y + 148, "the next one's first token, and the slot that is left trains nothing.", "quiet", 12)


def attention(drawing: Drawing, x: float, y: float):
    """The second row: which tokens (across) each of its tokens (down) can see."""
    size = 10
    drawing.title(x, y, 3, "Documents stay apart")
    owners = []
    for number, (name, tokens, _, _) in enumerate(ROWS[1]):
        owners += [(number, name)] * tokens
    for query in range(SLOTS):
        for key in range(query + 1):
            if owners[query] == owners[key]:
                drawing.cell(x + key * size, y + 16 + query * size, size, owners[query][1])
    drawing.text(x, y + 194, "Attention of the second row:", "quiet", 12)
    drawing.text(x, y + 208, "back, inside a document only.", "quiet", 12)


def model(drawing: Drawing, x: float, y: float):
    drawing.title(x, y, 4, "A Hugging Face model")
    for number, words in enumerate(["embedding", "layer", "layer …", "head"]):
        top = y + 16 + number * 42
        drawing.box(x, top, 208, 32)
        drawing.text(x + 104, top + 21, words, anchor="middle")
        if number:
            drawing.arrow((x + 104, top - 10), (x + 104, top))
    drawing.text(x, y + 194, "Layers are compiled, and sharded", "quiet", 12)
    drawing.text(x, y + 208, "over GPUs; the head goes in chunks.", "quiet", 12)


def loss(drawing: Drawing, x: float, y: float):
    drawing.title(x, y, 5, "One loss, one step")
    steps = [
        "sum of the losses of 28 tokens",
        "÷ 28: of all rows, on all GPUs",
        "gradients, their norm clipped",
        "AdamW, in float32",
    ]
    for number, words in enumerate(steps):
        top = y + 16 + number * 42
        drawing.box(x, top, 272, 32)
        drawing.text(x + 136, top + 21, words, anchor="middle")
        if number:
            drawing.arrow((x + 136, top - 10), (x + 136, top))
    drawing.text(x, y + 194, "So no split into micro-batches or GPUs", "quiet", 12)
    drawing.text(x, y + 208, "changes what is learned.", "quiet", 12)


if __name__ == "__main__":
    for name, theme in THEMES.items():
        (Path(__file__).parent / f"way-{name}.svg").write_text(draw(theme))
