"""Words of others in Markdown: shown as they are, never obeyed, whatever tags, links or fences they hold."""

import html
import re

from gradmm.errors import require, short_repr

PLAIN = str.maketrans({"<": "(", ">": ")", "[": "(", "]": ")", "`": "'"})
# An underscore within a word is one; & < > stand in entities.
OBEYED = re.compile(r"[\\`*\[\]|#~$^{}]|(?<![^\W_])_|_(?![^\W_])")


def literal(text: object) -> str:
    """Text for a paragraph, a heading or a cell of a table; line breaks become spaces."""
    return OBEYED.sub(r"\\\g<0>", html.escape(" ".join(str(text).split()), quote=False))


def code(text: object) -> str:
    """A code span that ends where the text ends, also in a table; a line break shows as a backslash and n."""
    plain = str(text).replace("\r\n", "\n").replace("\n", "\\n").replace("\r", "\\n").replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    pad = " " if plain != plain.strip("` ") or not plain else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def check_name(name: str, what: str) -> str:
    """A name that may be shown anywhere, in a title or a file's name.

    Raises:
        UserError: characters that Markdown or HTML would obey, or that nobody can see.
    """
    odd = sorted({mark for mark in name if mark in "<>[]`" or not mark.isprintable()})
    require(not odd, f"{what} {short_repr(name)} holds {', '.join(map(repr, odd[:3]))}: give it a name without them")
    return name


def plain_name(name: str) -> str:
    """A name that `check_name` takes, made of any file's or folder's name: `hotels [v2]` becomes `hotels (v2)`."""
    return "".join(mark if mark.isprintable() else "_" for mark in name.translate(PLAIN))
