"""The report as files: ``report.md``, the plots, and ``index.html``, which holds everything and needs no network."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from . import tables
from .audit import Audit, read_audit
from .audit import table as audit_table
from .families import headline_rows, series_of
from .figures import Figure, figures
from .results import ReportError, Row, read_results
from .words import duration

LEGEND = (
    "Ratio: the best other's median over ours. Memory: peak of one call above its inputs, gradients included; its ratio likewise. Floor: the "
    "time that the row's products, or its bytes, take at the rates of this machine, measured during the same rounds. Error: "
    "of our worst gradient against float64, or of our value where there is no gradient. Noisy: the spread of the "
    "rounds says that a second run's ratio would be off by more than 10% more often than one time in ten."
)


def write_report(results: Sequence[Path], out: Path, audit: Path | None = None) -> Path:
    """Draw what the benchmarks measured.

    Args:
        results: JSON files of ``pytest benchmarks --benchmark-json=FILE``, of one or several runs.
        out: the folder, made where it is missing; files of an earlier report in it are replaced.
        audit: what ``python -m benchmarks.audit --json FILE`` wrote.

    Returns:
        The page, ``out/index.html``. Beside it lie ``report.md`` and, for each figure, ``NAME.png`` and ``NAME-dark.png``.

    Raises:
        ReportError: files that cannot be read, nothing to draw, or matplotlib or jinja2 missing.
    """
    rows = read_results(results)
    read = read_audit(audit) if audit is not None else None
    drawn = figures(rows, read)
    page = _page(rows, drawn, read)
    out.mkdir(parents=True, exist_ok=True)
    for each in drawn:
        (out / f"{each.name}.png").write_bytes(each.light)
        (out / f"{each.name}-dark.png").write_bytes(each.dark)
    (out / "report.md").write_text(_markdown(rows, drawn, read))
    (out / "index.html").write_text(page)
    return out / "index.html"


def _page(rows: Sequence[Row], drawn: Sequence[Figure], audit: Audit | None) -> str:
    try:
        import jinja2
        import markupsafe
    except ImportError:
        raise ReportError("the page needs jinja2, which is not installed: pip install 'pairtile[report]'") from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "inlined": lambda image: f"data:image/png;base64,{base64.b64encode(image).decode()}",
        "code": lambda text: markupsafe.Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(markupsafe.escape(text)))),
        "duration": duration,
    }
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    return template.render(
        source=tables.provenance(rows),
        legend=LEGEND,
        summary=tables.summary(_summarised(rows)),
        figures=drawn,
        audit=audit_table(audit) if audit else None,
        contenders=[(row, tables.contenders(row)) for row in rows],
        runs=tables.runs(rows),
    )


def _markdown(rows: Sequence[Row], drawn: Sequence[Figure], audit: Audit | None) -> str:
    parts = [
        "# pairtile: benchmarks",
        _lines(tables.provenance(rows)),
        tables.summary(_summarised(rows)).markdown(),
        LEGEND,
    ]
    for each in drawn:
        picture = (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{each.name}-dark.png">'
            f'<img src="{each.name}.png" alt="{each.title}"></picture>'
        )
        parts += [f"## {each.title}", picture, each.caption, _lines(each.source)]
    if audit is not None:
        parts.append(audit_table(audit).markdown())
    parts.append("## Every contender")
    for row in rows:
        parts += [f"### {row.title}", f"{row.place}. Floor {duration(row.floor_seconds)}: {row.floor}."]
        parts.append(tables.contenders(row).markdown())
        parts += [f"{name}: {reason}" for name, reason in row.missing.items()]
    parts += ["## Runs", tables.runs(rows).markdown()]
    return "\n\n".join(parts) + "\n"


def _lines(lines: Sequence[str]) -> str:
    return "\\\n".join(lines)


def _summarised(rows: Sequence[Row]) -> list[Row]:
    """Without the smaller sizes of cases that are drawn over sizes; with the rows over ranks."""
    chosen = {id(row) for row in headline_rows(rows, series_of(rows))}
    return [row for row in rows if id(row) in chosen or " ranks" in row.case]
