"""The chat page: which files it is made of, and the headers that keep it to them.

The page asks for nothing but its own files and the API beside it, and the browser holds it to that: the policy below
lets no script, style, picture or connection come from elsewhere, none be written into the page, and no text become
HTML (`require-trusted-types-for`). Its addresses are relative, so it works behind a proxy that adds a prefix.
"""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PageFile(NamedTuple):
    """A file of the page, and the headers of the response that brings it."""

    body: bytes
    headers: dict[str, str]


def page_files() -> dict[str, PageFile]:
    """Return the files of the page by the path under which the server offers them: "/", "/page.js", ..."""
    return {
        "/" if path.name == "page.html" else f"/{path.name}": PageFile(
            path.read_bytes(), {"Content-Type": f"{TYPES[path.suffix]}; charset=utf-8"} | HEADERS
        )
        for path in sorted(FOLDER.iterdir())
        if path.suffix in TYPES
    }
