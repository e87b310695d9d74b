"""The directive `source`: the code of a function of the package, so that a formula has its code beside it."""

import importlib
import inspect

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class Source(SphinxDirective):
    """The source of `gradmm.room.function`; the page is built anew when the room changes."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The code, highlighted; ModuleNotFoundError or AttributeError where there is no such function."""
        room, _, name = self.arguments[0].rpartition(".")
        function = getattr(importlib.import_module(room), name)
        self.env.note_dependency(inspect.getsourcefile(function))
        code = inspect.getsource(function)
        return [nodes.literal_block(code, code, language="python")]


def setup(app):
    """Make the directive known."""
    app.add_directive("source", Source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
