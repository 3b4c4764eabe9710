"""Fills the template of a report."""

from pathlib import Path
from typing import Any

import jinja2

from losswatch.report.tables import markdown_table


def fill(template: Path, **values: Any) -> str:
    """The text of a Markdown template; `| table` shows a frame. A missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["table"] = markdown_table
    return environment.get_template(template.name).render(**values)
