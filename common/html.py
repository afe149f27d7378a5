"""Self-contained HTML pages: headings, text, tables and plots in one file that needs no network."""

import html
from collections.abc import Sequence
from pathlib import Path

from common.files import whole_file

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; }
h1, h2 { line-height: 1.2; }  h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #d8dee4; text-align: left; }
td.number { text-align: right; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: #57606a; font-size: .9rem; }
details { margin: .5rem 0 1.5rem; } summary { cursor: pointer; color: #0550ae; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: .85rem; }
"""


class Page:
    """One page, filled from top to bottom; every text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def preformatted(self, text: str) -> None:
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[object]], folded: str | None = None
    ) -> None:
        """A table; integers get thousands separators, floats four decimals, None a dash.

        folded: show this line alone until the reader opens it.
        """
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
        if folded is not None:
            summary = f"<summary>{html.escape(folded)}</summary>"
            table = f"<details>{summary}\n{table}</details>"
        self._parts.append(table)

    def figure(self, svg: str, caption: str, alt: str | None = None) -> None:
        """A plot given as SVG markup (trusted: it is inserted as it is).

        alt: what a reader hears who does not see it; by default the caption.
        """
        label = html.escape(alt or caption)
        shape = svg[svg.index("<svg") + len("<svg") :]
        self._parts.append(
            f'<figure><svg role="img" aria-label="{label}"{shape}'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        text = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )
        with whole_file(path) as file:
            file.write(text.encode())


def _cell(value: object) -> str:
    if value is None:
        return '<td class="number">–</td>'
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{html.escape(str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return f'<td class="number">{text}</td>'
