"""Data Docs pages as files that stay: no network, no script, and the same bytes from the same data.

The library's pages load style sheets, fonts and scripts from eight hosts and hold random ids and the time. What
remains here is their content, under a policy that forbids the browser to fetch or run anything.
"""

import html
import re
from collections.abc import Mapping
from pathlib import Path

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2733;margin:2rem auto;max-width:70rem;padding:0 1rem}
table{border-collapse:collapse;margin:.5rem 0;width:100%}
td,th{border:1px solid #d5dbe1;padding:.35rem .6rem;text-align:left;vertical-align:top}
thead{background:#f2f5f7}h1,h2,h3,h4,h5{line-height:1.25;margin:1.2rem 0 .4rem}a{color:#0b5cad}
.badge{background:#e8eef3;border-radius:.3rem;padding:0 .35rem}
.text-danger,.fa-times{color:#b3261e}.text-success,.fa-check-circle{color:#1b7f3b}
.fa-times::before{content:"✗"}.fa-check-circle::before{content:"✓"}.fa-exclamation-triangle::before{content:"!"}
ul{padding-left:1.2rem}.d-none,.navbar,.cooltip{display:none}
"""
_HEAD = (
    '<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'\"><title>{title}</title><style>{style}</style></head>"
)
_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_TIME = re.compile(r"\b(?:\d{8}T\d{6}\.\d{6}Z|2000-01-01T00:00:00Z)")
_ACTIVE = re.compile(r"<(script|style|form|iframe|nav)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_LOADED = re.compile(r"<(?:link|img|meta|input|source|embed)\b[^>]*>", re.IGNORECASE)
_HANDLER = re.compile(r"""\son[a-z]+\s*=\s*(?:"[^"]*"|'[^']*')""", re.IGNORECASE)
_REMOTE = re.compile(r"""\s(?:href|src)\s*=\s*(?:"(?!#)[^"]*"|'(?!#)[^']*')""", re.IGNORECASE)
_BODY = re.compile(r"<body\b.*</body\s*>", re.DOTALL | re.IGNORECASE)


def write_data_docs(folder: Path, pages: Mapping[str, str]) -> None:
    """Write one page for each record kind and an index that links them."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, page in pages.items():
        (folder / f"{kind}.html").write_text(still(page, title=f"Data Docs: {kind}"), encoding="utf-8")
    links = "".join(f'<li><a href="{html.escape(kind)}.html">{html.escape(kind)}</a></li>' for kind in pages)
    index = f"<body><h1>Data Docs</h1><p>What was checked, and how many rows did not pass.</p><ul>{links}</ul></body>"
    (folder / "index.html").write_text(_page(index, title="Data Docs"), encoding="utf-8")


def still(page: str, title: str) -> str:
    """Reduce a page to what it says: nothing that runs, nothing that is loaded, no random ids.

    Raises:
        ValueError: the page has no body.
    """
    body = _BODY.search(page)
    if body is None:
        raise ValueError("a Data Docs page without a body")
    text = body.group()
    for pattern in (_ACTIVE, _LOADED, _HANDLER, _REMOTE, _TIME):
        text = pattern.sub("", text)
    names: dict[str, str] = {}
    text = _UUID.sub(lambda found: names.setdefault(found.group(), f"id-{len(names)}"), text)
    lines = (line.rstrip() for line in text.splitlines())
    return _page("\n".join(line for line in lines if line), title)


def _page(body: str, title: str) -> str:
    head = _HEAD.format(title=html.escape(title), style=_STYLE)
    return f'<!doctype html>\n<html lang="en">{head}\n{body}\n</html>\n'
