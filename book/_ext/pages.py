"""What this book's pages have besides the theme's: no scripts for services elsewhere, and on each notebook how to run
it.

Launch buttons appear when `_config.yml` names `repository: {url: ...}` and `launch_buttons`. They open the notebook as
it is stored, in `notebooks/`: the executed copies that the pages are made of are not in the repository.
"""

import re
import struct
from html import escape
from pathlib import Path

from sphinx.errors import ExtensionError

EXECUTED, STORED = "book/executed/", "notebooks/"
ONE_PANEL = 850  # pixels; `plots` draws one panel narrower than this, and two wider
LAUNCHERS = ("binderhub_url", "jupyterhub_url", "colab_url", "deepnote_url")
DEFAULT_URL = "https://github.com/executablebooks/jupyter-book"  # what jupyter-book fills in where no url is given
BLOCK = """
<section id="run-it-yourself" class="run-it-yourself">
<h2>Run it yourself<a class="headerlink" href="#run-it-yourself" title="Link to this heading">#</a></h2>
<p><code>make lab</code> in a checkout of the repository opens JupyterLab; this page is <code>{name}.ipynb</code> there,
stored without outputs. From the command line:</p>
<div class="highlight"><pre>papermill notebooks/{name}.ipynb mine.ipynb -p seed 1</pre></div>
<p>The copy that this page shows, with its parameters and outputs, can be
<a download href="{source}">downloaded</a>; <a href="{reproduce}">how to reproduce</a> says more.</p>
</section>
"""


def check(app) -> None:
    """Refuse launch buttons that would lead to somebody else's repository."""
    options = app.config.html_theme_options
    wanted = [name for name in LAUNCHERS if options.get("launch_buttons", {}).get(name)]
    if wanted and options.get("repository_url", DEFAULT_URL) == DEFAULT_URL:
        raise ExtensionError(
            f"launch_buttons has {', '.join(wanted)}, but no repository is known: add `repository: {{url: ..., "
            "branch: ...}` to _config.yml"
        )


def keep_local(context: dict) -> None:
    """Leave out the loader of live cells, which fetches its code from elsewhere, and scripts that stand twice."""
    kept = {}
    for script in context.get("script_files", []):
        body = script.attributes.get("body") or ""
        if "thebe" not in f"{script.filename} {body}":
            kept.setdefault((str(script.filename), body), script)
    context["script_files"] = list(kept.values())
    context["css_files"] = [sheet for sheet in context.get("css_files", []) if "thebe" not in str(sheet.filename)]


def stored(button: dict) -> dict:
    """A launch button that opens the stored notebook."""
    return {**button, "url": button["url"].replace(EXECUTED, STORED)} if "url" in button else button


def mark_wide(app, body: str) -> str:
    """The page with `data-wide` at every figure of more than one panel: a narrow screen shows those in a box that
    scrolls.
    """
    places = {name: Path(app.srcdir, source) for source, name in app.builder.images.items()}

    def mark(found: re.Match) -> str:
        width = struct.unpack(">I", places[found[2]].read_bytes()[16:20])[0] if found[2] in places else 0
        return f"<img data-wide {found[1]}" if width > ONE_PANEL else found[0]

    return re.sub(r'<img ([^>]*src="[^"]*/([^"/]+\.png)")', mark, body)


def finish(app, pagename, templatename, context, doctree) -> None:
    """Sphinx's hook, after the theme has put its buttons together."""
    keep_local(context)
    if not pagename.startswith(EXECUTED):
        return
    for group in context.get("header_buttons", []):
        if group.get("label") == "launch-buttons":
            group["buttons"] = [stored(button) for button in group["buttons"]]
    place = {
        "source": f"{context['pathto']('_sources', 1)}/{context['sourcename']}",
        "reproduce": context["pathto"]("book/reproduce"),
    }
    name = pagename.removeprefix(EXECUTED)
    context["body"] = mark_wide(app, context["body"]) + BLOCK.format(
        name=escape(name), **{key: escape(value) for key, value in place.items()}
    )


def setup(app):
    """Work on each page after the theme does."""
    app.connect("builder-inited", check, priority=100)
    app.connect("html-page-context", finish, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
