"""HTML pages from jinja2 templates: every value is escaped and printable, one style sheet for all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.filters import do_forceescape, do_mark_safe

from glsim.files import printable, read_text

STYLE = Path(__file__).parent / "page.css"


def render(template: Path, **values: Any) -> str:
    """A template filled with values; in it `style` is the shared style sheet.

    Filters of its own: `breakable`, a path or a class that may go over two lines at its own joints; `thousands`, a
    number with commas; `percent`, a share with one digit behind the point, or as many as asked for.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["thousands"] = lambda number: f"{number:,}"
    environment.filters["percent"] = lambda share, digits=1: f"{share:.{digits}%}"
    return environment.get_template(template.name).render(style=do_mark_safe(read_text(STYLE)), **values)


def _breakable(name: Any) -> str:
    return do_mark_safe(re.sub("([_/])", r"\1<wbr>", str(do_forceescape(printable(name)))))
