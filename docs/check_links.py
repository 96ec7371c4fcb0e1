#!/usr/bin/env python3
"""Checks the links of all Markdown files of the repository, and the table of contents of the book.

    python3 docs/check_links.py [ROOT]
    python3 docs/check_links.py --book DIR

Every relative link and its anchor must resolve, every page in docs/ must be in docs/SUMMARY.md once, and every page in
docs/SUMMARY.md must exist. Prints FILE:LINE and the reason for each fault; exit status 1 if there is any. Links with a
scheme, such as https:, are not followed.

With --book the HTML pages of a book that `mdbook build` wrote to DIR are checked instead: their links must resolve, and
no element may be there that HTML does not have, such as <NAME>, which a browser does not show.
"""

import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

SKIPPED = {".git", "target", "runs", "node_modules"}
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
# [text](target "title"), ![text](target), and the definition [name]: target
LINK = re.compile(r"\]\(\s*<?([^()\s<>]+(?:\([^()\s]*\)[^()\s<>]*)*)>?(?:\s+[\"'][^\"']*[\"'])?\s*\)")
DEFINITION = re.compile(r"^ {0,3}\[[^\]^]+\]:\s+<?([^\s>]+)>?")
HTML_LINK = re.compile(r"<(?:a|img)\s[^>]*?(?:href|src)=\"([^\"]+)\"")
HTML_ANCHOR = re.compile(r"<[a-z0-9]+\s[^>]*?(?:id|name)=\"([^\"]+)\"")
INCLUDE = re.compile(r"\{\{#include\s+([^\s:}]+)[^}]*\}\}")
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)(?:\s+#+)?\s*$")
SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def markdown_files(root: Path) -> list[Path]:
    """Returns the Markdown files below `root`, without build outputs."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        found += [Path(folder) / name for name in sorted(names) if name.endswith(".md")]
    return found


def prose(path: Path) -> list[tuple[int, str]]:
    """Returns the numbered lines of a file outside of fenced code."""
    lines, fence = [], None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark = FENCE.match(line)
        if fence is None and mark:
            fence = mark[1]
        elif fence is None:
            lines.append((number, line))
        elif mark and mark[1].startswith(fence) and not line[mark.end():].strip():
            fence = None
    return lines


def slug(heading: str) -> str:
    """Returns the anchor of a heading, by the rule of GitHub, which mdBook shares."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[*`]|<[^>]+>", "", text).strip().lower()
    return "".join("-" if c == " " else c for c in text if c.isalnum() or c in " -_")


class Anchors:
    """The anchors of Markdown files, each file read once."""

    def __init__(self) -> None:
        self.known: dict[Path, set[str]] = {}

    def of(self, path: Path) -> set[str]:
        """Returns the anchors of the headings and HTML elements of the file at `path`."""
        if path not in self.known:
            anchors, seen = set(), {}
            for _, line in prose(path):
                anchors.update(HTML_ANCHOR.findall(line))
                if heading := HEADING.match(line):
                    name = slug(heading[1])
                    count = seen[name] = seen.get(name, -1) + 1
                    anchors.add(name if count == 0 else f"{name}-{count}")
            self.known[path] = anchors
        return self.known[path]


def links(line: str) -> list[str]:
    """Returns the targets of the links in a line of prose."""
    bare = CODE.sub(lambda code: " " * len(code[0]), line)
    found = [*LINK.findall(bare), *HTML_LINK.findall(bare), *INCLUDE.findall(bare)]
    return found + ([definition[1]] if (definition := DEFINITION.match(bare)) else [])


def fault(root: Path, file: Path, target: str, anchors: Anchors) -> str | None:
    """Returns why the link to `target` in `file` does not resolve, or None."""
    if SCHEME.match(target):
        return None
    place, _, anchor = target.partition("#")
    place = unquote(place.partition("?")[0])
    to = file if not place else root / place[1:] if place.startswith("/") else file.parent / place
    to = Path(os.path.normpath(to))
    if not to.is_relative_to(root):
        return f"{target} is outside of the repository"
    if not to.exists():
        return f"{target} does not exist"
    if anchor and to.suffix == ".md" and unquote(anchor) not in anchors.of(to):
        return f"{target}: {to.relative_to(root)} has no heading with the anchor #{anchor}"
    return None


def contents(root: Path) -> list[str]:
    """Returns the faults of the book's table of contents."""
    docs = root / "docs"
    summary = docs / "SUMMARY.md"
    place = summary.relative_to(root)
    if not summary.exists():
        return [f"{place}:1: does not exist"]
    faults, listed = [], {}
    for number, line in prose(summary):
        for target in links(line):
            page = Path(os.path.normpath(docs / target.partition("#")[0]))
            if not page.is_relative_to(docs):
                faults.append(f"{place}:{number}: {target} is outside of docs/, and cannot be a page of the book")
            elif page in listed:
                faults.append(f"{place}:{number}: {target} is in line {listed[page]} already")
            listed.setdefault(page, number)
    pages = [page for page in markdown_files(docs) if page != summary]
    return faults + [f"{page.relative_to(root)}:1: is not in {place}" for page in pages if page not in listed]


class Page(HTMLParser):
    """The links, anchors and unknown elements of an HTML page."""

    # Elements that mdBook writes.
    ELEMENTS = set(
        "a aside b blockquote body br button code dd details div dl dt em fa-icon footer form h1 h2 h3 h4 h5 h6 head"
        " header hr html i iframe img input kbd label li link main mdbook-sidebar-scrollbox meta nav noscript ol p path"
        " pre script section span strong style sub summary sup svg table tbody td template th thead title tr ul".split()
    )

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[int, str]] = []
        self.anchors: set[str] = set()
        self.unknown: list[tuple[int, str]] = []
        self.base = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        line, values = self.getpos()[0], dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := values.get(name)))
        self.links += [(line, value) for name in ("href", "src") if (value := values.get(name))]
        if tag == "base":
            self.base = True
        elif tag not in self.ELEMENTS:
            self.unknown.append((line, tag))


def check_book(book: Path) -> int:
    """Prints the faults of a rendered book. Returns the exit status."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(book.rglob("*.html"))}
    faults, count = [], 0
    for path, page in pages.items():
        # The page of unknown addresses has links relative to the address of the site.
        for line, target in page.links if not page.base else []:
            if SCHEME.match(target):
                continue
            count += 1
            place, _, anchor = target.partition("#")
            to = Path(os.path.normpath(path.parent / unquote(place))) if place else path
            if not to.is_relative_to(book) or not to.is_file():
                faults.append(f"{path.relative_to(book)}:{line}: {target} does not exist")
            elif anchor and to in pages and unquote(anchor) not in pages[to].anchors:
                faults.append(f"{path.relative_to(book)}:{line}: {target}: there is no such anchor")
        faults += [f"{path.relative_to(book)}:{line}: <{tag}> is no element of HTML" for line, tag in page.unknown]
    if not pages:
        faults.append(f"{book} has no pages")
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{len(pages)} pages, {count} links, {len(faults)} faults", file=sys.stderr)
    return 1 if faults else 0


def main() -> int:
    """Prints the faults. Returns the exit status."""
    if sys.argv[1:2] == ["--book"]:
        return check_book(Path(sys.argv[2]).resolve())
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    anchors, faults, count = Anchors(), [], 0
    files = markdown_files(root)
    for file in files:
        for number, line in prose(file):
            for target in links(line):
                count += 1
                if why := fault(root, file, target, anchors):
                    faults.append(f"{file.relative_to(root)}:{number}: {why}")
    faults += contents(root)
    print(*faults, sep="\n", end="\n" if faults else "")
    print(f"{len(files)} files, {count} links, {len(faults)} faults", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
