#!/usr/bin/env python3
"""Adds the Markdown files outside of docs/ to which the book links. A preprocessor of mdBook, see book.toml.

Pages of the book link to files of the repository, such as ../SECURITY.md. mdBook knows the files in docs/ only, so that
these links would lead nowhere. This program adds each such file as a page, with the files that it links to itself, and
points the links at the pages. A link to a file that is not Markdown, such as LICENSE, becomes text.
"""

import json
import os
import re
import sys
from pathlib import Path

# Keeps __pycache__ out of docs/, which mdBook would copy into the book.
sys.dont_write_bytecode = True
from check_links import CODE, FENCE, SCHEME  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# The folder of the book that holds the added pages.
ADDED = Path("repository")
# Files that a page of the book includes. They get no page of their own.
INCLUDED = {ROOT / "grafana/METRICS.md": DOCS / "metrics.md"}
LINK = re.compile(r"\[([^\]]*)\]\(([^()\s]+)\)")


def page_of(file: Path) -> Path:
    """Returns the path in the book of the page of a Markdown file."""
    page = file.relative_to(DOCS) if file.is_relative_to(DOCS) else ADDED / file.relative_to(ROOT)
    return page.with_name("index.md") if page.name == "README.md" else page


def rewritten(text: str, file: Path, found: list[Path]) -> str:
    """Returns the text of `file` with links between pages. Appends the files outside of docs/ to `found`."""

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        if SCHEME.match(target) or target.startswith("#"):
            return match[0]
        place, _, anchor = target.partition("#")
        to = Path(os.path.normpath(file.parent / place))
        to = INCLUDED.get(to, to)
        if to.suffix != ".md":
            return match[0] if to.is_relative_to(DOCS) else label
        if not to.is_relative_to(DOCS):
            found.append(to)
        page = Path(os.path.relpath(page_of(to), page_of(file).parent)).as_posix()
        return f"[{label}]({page}{'#' + anchor if anchor else ''})"

    lines, fence = [], None
    for line in text.splitlines():
        mark = FENCE.match(line)
        if fence is None and mark:
            fence = mark[1]
        elif fence is not None:
            fence = None if mark and mark[1].startswith(fence) and not line[mark.end():].strip() else fence
        else:
            # Code may hold brackets. It is replaced by characters that no link has while links are sought.
            spans = [span[0] for span in CODE.finditer(line)]
            line = LINK.sub(link, CODE.sub("\0", line))
            line = re.sub("\0", lambda _: spans.pop(0), line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def chapters(items: list) -> list[dict]:
    """Returns all chapters of the book, nested ones too."""
    own = [item["Chapter"] for item in items if isinstance(item, dict) and "Chapter" in item]
    return [one for chapter in own for one in [chapter, *chapters(chapter["sub_items"])]]


def main() -> None:
    """Reads the book from standard input and writes it, with the added pages, to standard output."""
    _, book = json.load(sys.stdin)
    waiting: list[Path] = []
    for chapter in chapters(book["items"]):
        chapter["content"] = rewritten(chapter["content"], DOCS / chapter["source_path"], waiting)
    texts: dict[Path, str] = {}
    while waiting:
        file = waiting.pop()
        if file not in texts:
            texts[file] = ""
            texts[file] = rewritten(file.read_text(encoding="utf-8"), file, waiting)
    if texts:
        book["items"].append({"PartTitle": "Files of the repository"})
    # Files of the root first.
    for file in sorted(texts, key=lambda file: (len(file.parts), file)):
        book["items"].append({"Chapter": {
            "name": file.relative_to(ROOT).as_posix(),
            "content": texts[file],
            "number": None,
            "sub_items": [],
            "path": page_of(file).as_posix(),
            "source_path": None,
            "parent_names": [],
        }})
    json.dump(book, sys.stdout)


if __name__ == "__main__":
    # mdBook asks with the argument "supports" whether a renderer is supported: all are.
    if sys.argv[1:2] != ["supports"]:
        main()
