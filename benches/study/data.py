"""Makes the data of the study from the package lists of a Debian or Ubuntu machine.

A row is one package: `prompt` is its description, and `reference` is the one-line summary that its maintainer wrote.
"""

import hashlib
import json
import re
import subprocess
from pathlib import Path

# Share of the sources in each split, by a hash of the source package's name. The rest is "train".
SHARES = {"test": 0.13, "development": 0.05, "judge": 0.09, "pairs": 0.05}
# Number of rows of a split that are kept, the first by hash; None keeps all.
LIMITS = {"test": 1000, "development": 300, "judge": 800, "pairs": None, "train": None}
# Kinds of packages whose summary names the kind of files in the package instead of what the software does.
PARTS = re.compile(
    r"-(dev|doc|docs|dbg|dbgsym|data|common|examples|tests|headers|locales|bin|utils|tools|perl|java|cil|ocaml|all|full|prof|l10n.*|i18n)$"
)
FAMILIES = re.compile(
    r"^(librust-|libghc-|task-|hunspell-|aspell-|myspell-|hyphen-|mythes-|wordlist-|language-|firefox-esr-l10n|thunderbird-l10n"
    r"|libreoffice-(l10n|help)|texlive-|manpages-|gir1\.2-|linux-(image|headers|source)|kodi-|nvidia-|gcc-|g\+\+-|tesseract-ocr-)"
)
EXCLUDED = re.compile(r"(?i)transitional|dummy|meta-?package|debug(ging)? symbols|development (files|headers|libraries)"
                      r"|documentation|shared librar|\bruntime\b|\bheaders?\b|\(lib|-- ?lib|\blibs?$|virtual package|data files|python ?[23]"
                      r"|\[|\((utilit|tool|plugin|binar|command|program)")
SHINGLE = 4
NEAR_COPY = 0.3


class DataError(Exception):
    """The data cannot be made; the message names the cause and the remedy."""


def _output(command):
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout.decode("utf-8", "replace")
    except FileNotFoundError:
        raise DataError(f"{command[0]}: no such program; the data are made on a Debian or Ubuntu machine") from None
    except subprocess.CalledProcessError as error:
        raise DataError(f"{' '.join(command)}: {error.stderr.decode('utf-8', 'replace').strip()}") from None


def _stanzas(text):
    """Yields the fields of each stanza of a control file."""
    for block in text.split("\n\n"):
        fields, name = {}, None
        for line in block.split("\n"):
            if line[:1] in (" ", "\t"):
                if name:
                    fields[name] += "\n" + line[1:]
            elif ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if fields:
            yield fields


def _paragraphs(lines):
    """Joins the lines of a long description into paragraphs, without verbatim lines and blank ones."""
    paragraphs, words = [], []
    for line in lines:
        if line.strip() == ".":
            if words:
                paragraphs.append(" ".join(words))
            words = []
        else:
            words.extend(line.split())
    if words:
        paragraphs.append(" ".join(words))
    return "\n".join(paragraphs)


def packages(lists):
    """Reads all packages from apt's lists in the folder `lists`, which it fetches if the folder is empty."""
    options = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={lists}", "-o", "Acquire::Languages=en"]
    if not any(lists.glob("*Translation-en*")):
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        _output(["apt-get", "update", *options])
    files = _output(["apt-get", "indextargets", *options, "--format", "$(CREATED_BY) $(FILENAME)"]).splitlines()
    files = sorted(line.split(" ", 1)[1] for line in files if line.startswith("Translations "))
    if not files:
        raise DataError(f"{lists}: apt has no English descriptions there; remove the folder and run the command again")
    long = {}
    for file in files:
        for fields in _stanzas(_output(["/usr/lib/apt/apt-helper", "cat-file", file])):
            if "Description-en" in fields:
                long[fields["Description-md5"]] = fields["Description-en"]
    for fields in _stanzas(_output(["apt-cache", *options, "dumpavail"])):
        text = long.get(fields.get("Description-md5"), fields.get("Description", ""))
        summary, *lines = text.split("\n")
        source = fields.get("Source", fields["Package"]).split(" ")[0]
        yield {"package": fields["Package"], "source": source, "summary": summary, "text": _paragraphs(lines)}


def _words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def _usable(row):
    """Tells whether a package's summary describes the software, and neither repeats the description nor a part of it."""
    summary, text, name = row["summary"].rstrip("."), row["text"], row["package"]
    words = summary.split()
    if FAMILIES.match(name) or EXCLUDED.search(summary) or PARTS.search(name):
        return False
    if not (140 <= len(text) <= 400 and 16 <= len(summary) <= 100 and 4 <= len(words) <= 15):
        return False
    if not text.isascii() or not summary.isascii():
        return False
    return f" {' '.join(_words(summary))} " not in f" {' '.join(_words(text))} "


def select(rows):
    """Returns one package of each source, without near-copies, in the order of the hashes of the sources' names."""
    best, summaries = {}, {}
    for row in filter(_usable, rows):
        source = row["source"]
        summaries.setdefault(source, set()).add(row["summary"].rstrip("."))
        key = (row["package"] != source, len(row["package"]), row["package"])
        if source not in best or key < best[source][0]:
            best[source] = (key, row)
    chosen = []
    for _, row in best.values():
        row["others"] = sorted(summaries[row["source"]] - {row["summary"].rstrip(".")})
        row["hash"] = hashlib.sha256(row["source"].encode()).hexdigest()
        chosen.append(row)
    chosen.sort(key=lambda row: row["hash"])
    owner, kept, copies = {}, [], 0
    for row in chosen:
        words = _words(row["summary"] + " " + row["text"])
        shingles = {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
        shared = {}
        for shingle in shingles:
            for other in owner.get(shingle, ()):
                shared[other] = shared.get(other, 0) + 1
        if shared and max(shared.values()) >= NEAR_COPY * len(shingles):
            copies += 1
            continue
        for shingle in shingles:
            # A phrase that many packages share is boilerplate; the first owners of it are enough to find copies.
            if len(owner.setdefault(shingle, [])) < 50:
                owner[shingle].append(len(kept))
        kept.append(row)
    return kept, copies, len(best)


def split_of(row):
    """Returns the split of a row, from the hash of its source's name."""
    at, low = int(row["hash"][:8], 16) / 2**32, 0.0
    for name, share in SHARES.items():
        low += share
        if at < low:
            return name
    return "train"


def make(folder):
    """Writes one file of JSON lines for each split to `folder`; returns the counts."""
    everything = list(packages(folder / "lists"))
    rows, copies, sources = select(everything)
    counts = {"packages": len(everything), "usable_sources": sources, "near_copies_left_out": copies}
    for name in [*SHARES, "train"]:
        part = [row for row in rows if split_of(row) == name][: LIMITS[name]]
        lines = ""
        for row in part:
            fields = {"id": row["package"], "prompt": row["text"], "reference": row["summary"].rstrip(".")}
            # Summaries that people wrote for other packages of the same source measure the judge that reads the reference.
            lines += json.dumps(fields | ({"others": row["others"]} if name == "judge" else {})) + "\n"
        path = Path(folder) / f"{name}.jsonl"
        path.write_text(lines)
        counts[name] = len(part)
        counts[f"{name}_sha256"] = hashlib.sha256(lines.encode()).hexdigest()[:16]
    return counts
