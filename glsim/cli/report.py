"""`glsim report`: tables of finished runs, and tests between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glsim.cli.options import Settings, positional, setting

if TYPE_CHECKING:
    from glsim.training.report import RunReport

PURPOSE = "Measure"
CALL = "glsim.training.report:report_runs"


class Options(Settings):
    """Tables of finished runs: mean and std over seeds, one table a data set, McNemar between pairs of runs."""

    runs: list[str] = positional("run folders, folders of glsim reproduce, or globs of them", path="reads")
    against: str | None = setting(
        None, "method or run folder: pair every other row with this one (exact McNemar)", path="reads"
    )
    out: str | None = setting(None, "folder for report.md, report.csv and report.png", path="folder")


def show(r: RunReport, options: Options) -> str:
    """The tables as Markdown."""
    from glsim.training.report import as_markdown

    written = f"\n\nwritten: {options.out}" if options.out else ""
    return as_markdown(r).rstrip("\n") + written
