"""HTML pages that ask for nothing outside themselves."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_BASE = Path(__file__).parent / "templates"


def html_page(folder: Path, what: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A page from `page.html`, `page.css` and, where there is one, `page.js` of a folder.

    Text is escaped where it is inserted, and only the page's own script may run.

    Args:
        folder: with the templates; what all pages share stands beside this file.
        what: kind of page, for its title.
        filters: of the templates, beside Jinja's own.
        values: of the template, `title` among them.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader([folder, _BASE]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(filters or {})
    style = "\n".join(file.read_text("utf-8") for file in (_BASE / "base.css", folder / "page.css"))
    script = (folder / "page.js").read_text("utf-8") if (folder / "page.js").is_file() else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() if script else ""
    # Files of ours; everything else is escaped.
    inline = {"style": Markup(style), "script": Markup(script), "script_digest": digest}
    return environment.get_template("page.html").render(what=what, **inline, **values)
