"""The directive `rooms`: a picture of which room of the package builds on which, drawn from the imports at every build.

Rooms that many others use stand in a line of their own, without arrows. An arrow that follows from others is left out.
"""

import ast
import importlib.util
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

PACKAGE, BOOK = Path(importlib.util.find_spec("gradmm").origin).parent, Path(__file__).resolve().parents[1]
AUTOMODULE = re.compile(r"^\.\. automodule:: gradmm\.(\w+)$", re.MULTILINE)
EVERYWHERE = 7  # a room that so many others import has no arrows: they would hide the rest
WIDTH, ROW, BOX, TALL, GAP, THIN = 800, 76, 106, 30, 14, 8
SWEEPS = 24  # in which each row is put in the order of its neighbours' places

Edges = dict[str, set[str]]
Point = tuple[str, str] | str  # a room, or the place at which an arrow passes a row: its two ends


def rooms() -> list[Path]:
    """The files of the method's rooms; the front door and the experiments are none."""
    return sorted(path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def imports() -> Edges:
    """For each room those that it imports, wherever the import stands."""
    names, found = {path.stem for path in rooms()}, {}
    for path in rooms():
        said = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "gradmm":
                said |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradmm."):
                said.add(node.module.split(".")[1])
            elif isinstance(node, ast.Import):
                said |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gradmm.")}
        found[path.stem] = (said & names) - {path.stem}
    return found


def everywhere(found: Edges) -> list[str]:
    """The rooms that nearly all use, the most used first."""
    uses = Counter(name for names in found.values() for name in names)
    return [name for name, count in sorted(uses.items(), key=lambda item: (-item[1], item[0])) if count >= EVERYWHERE]


def arrows(found: Edges) -> Edges:
    """For each room that is drawn with arrows the rooms that it builds on directly."""
    ground = set(everywhere(found))
    kept = {room: names - ground for room, names in found.items() if room not in ground}

    @cache
    def below(room: str) -> set[str]:
        return kept[room].union(*map(below, kept[room]))

    behind = {room: set().union(*map(below, names)) for room, names in kept.items()}
    return {room: names - behind[room] for room, names in kept.items()}


def levels(edges: Edges) -> dict[str, int]:
    """Each room's row, 0 at the top: as far down as the rooms that build on it let it be."""

    @cache
    def depth(room: str) -> int:
        return 1 + max(map(depth, edges[room]), default=-1)

    last = max(map(depth, edges))

    @cache
    def level(room: str) -> int:
        return min((level(user) for user, names in edges.items() if room in names), default=last + 1) - 1

    return {room: level(room) for room in edges}


@dataclass(frozen=True)
class Drawing:
    """Where everything stands: the middles of rooms and of the places where arrows pass, and each arrow's way."""

    places: dict[tuple[int, Point], tuple[float, float]]
    ways: list[list[tuple[int, Point]]]


def drawing(edges: Edges) -> Drawing:
    """Rows in an order in which few arrows cross."""
    level = levels(edges)
    ways = []
    for room, names in edges.items():
        for name in sorted(names):
            between = [(row, (name, room)) for row in range(level[name] + 1, level[room])]
            ways.append([(level[name], name), *between, (level[room], room)])
    points = {(row, room) for room, row in level.items()} | {point for way in ways for point in way}
    order = [sorted((p for p in points if p[0] == row), key=str) for row in range(max(level.values()) + 1)]
    near: dict = {point: [] for point in points}
    for way in ways:
        for one, other in pairwise(way):
            near[one].append(other)
            near[other].append(one)
    places = _placed(order)
    for _ in range(SWEEPS):
        for row in order:
            middles = {p: sum(places[q][0] for q in near[p]) / len(near[p]) if near[p] else WIDTH for p in row}
            row.sort(key=middles.__getitem__)
            places = _placed(order)
    return Drawing(places, ways)


def _placed(order: list[list[tuple[int, Point]]]) -> dict[tuple[int, Point], tuple[float, float]]:
    places = {}
    for number, row in enumerate(order):
        wide = [BOX if isinstance(point, str) else THIN for _, point in row]
        left = (WIDTH - sum(wide) - GAP * (len(row) - 1)) / 2
        for point, width in zip(row, wide, strict=True):
            places[point] = (left + width / 2, number * ROW + TALL)
            left += width + GAP
    return places


def pages() -> dict[str, str]:
    """The page of the API reference that each room is on."""
    held = {path: path.read_text(encoding="utf-8") for path in sorted((BOOK / "api").glob("*.md"))}
    return {name: path.stem for path, text in held.items() for name in AUTOMODULE.findall(text)}


def _box(name: str, page: str, x: float, y: float, says: str) -> str:
    return (
        f'<a href="api/{page}.html#module-gradmm.{name}"><title>{escape(says)}</title>'
        f'<rect x="{x - BOX / 2:.0f}" y="{y - TALL / 2:.0f}" width="{BOX}" height="{TALL}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}">{name}</text></a>'
    )


def _way(points: list[tuple[float, float]]) -> str:
    """A smooth line from the foot of a box to the head of another."""
    (x, y), *rest = [(points[0][0], points[0][1] + TALL / 2), *points[1:-1], (points[-1][0], points[-1][1] - TALL / 2)]
    line = f"M{x:.0f} {y:.0f}"
    for a, b in rest:
        half = (y + b) / 2
        line += f" C{x:.0f} {half:.0f} {a:.0f} {half:.0f} {a:.0f} {b:.0f}"
        x, y = a, b
    return f'<path d="{line}" marker-end="url(#room-tip)"/>'


def svg() -> str:
    """The picture, in the page's own colours; each box leads to the room in the API reference."""
    found = imports()
    says = {path.stem: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in rooms()}
    drawn, ground = drawing(arrows(found)), everywhere(found)
    foot = max(y for _, y in drawn.places.values()) + 1.6 * ROW
    step, page = WIDTH / len(ground), pages()
    boxes = {point: place for (_, point), place in drawn.places.items() if isinstance(point, str)}
    boxes |= {name: (step * (number + 0.5), foot) for number, name in enumerate(ground)}
    lines = "".join(_way([drawn.places[point] for point in way]) for way in drawn.ways)
    drawn_boxes = "".join(
        _box(name, page[name], x, y, says[name].split("\n\n")[0]) for name, (x, y) in sorted(boxes.items())
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {foot + TALL:.0f}" role="img" aria-label="Which room builds on which" '
        'xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" font-size="15" fill="currentColor">'
        '<defs><marker id="room-tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="currentColor" stroke="none"/></marker></defs>'
        f'<g fill="none" stroke="currentColor" opacity="0.7">{lines}</g>'
        f'<g text-anchor="middle"><text x="{WIDTH / 2}" y="{foot - 26:.0f}" opacity="0.8">used nearly everywhere</text>'
        f"{drawn_boxes}</g></svg>"
    )


class Rooms(SphinxDirective):
    """The picture; the page is built anew when a room changes."""

    def run(self) -> list[nodes.Node]:
        """The figure as HTML."""
        for path in rooms():
            self.env.note_dependency(str(path))
        return [nodes.raw("", f'<figure class="rooms">{svg()}</figure>', format="html")]


def setup(app):
    """Make the directive known."""
    app.add_directive("rooms", Rooms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
