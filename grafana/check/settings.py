#!/usr/bin/env python3
"""Checks that every setting named in the texts of dashboards and alerts exists.

    settings.py

A setting is written with its section, such as `learner.eta`. Sections and keys are read from
configs/preceptor.schema.json. Exit status 0 if all are known, 1 otherwise. Needs only Python 3.8.
"""

import json
import re
import sys
from pathlib import Path

GRAFANA = Path(__file__).resolve().parent.parent
FILES = {"json", "jsonl", "md", "mjs", "prom", "py", "sh", "toml", "ts", "yml"}
SCHEMA = GRAFANA.parent / "configs/preceptor.schema.json"


def main():
    sections = read_sections()
    # Words joined by dots, except file names and template variables, which have a $.
    mentioned = re.compile(r"(?<![\w$./-])[a-z_]+(?:\.[a-z_]+)+(?![\w/:-])")
    faults = total = 0
    for place, text in texts():
        for name in sorted(set(mentioned.findall(text))):
            if name.rpartition(".")[2] in FILES:
                continue
            total += 1
            if not is_setting(name, sections):
                faults += 1
                print(f"{place}: {name} is not a setting")
    print(f"{total - faults} of {total} mentioned settings exist")
    return 1 if faults or not total else 0


def read_sections():
    """Returns the keys by section, including nested tables (`labeler.remote`), from the configuration's JSON Schema."""
    sections = {}

    def add(name, schema):
        properties = schema.get("properties", {})
        if properties:
            sections[name] = set(properties)
        for key, inner in properties.items():
            add(f"{name}.{key}", inner)

    for name, schema in json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"].items():
        add(name, schema)
    return sections


def is_setting(name, sections):
    """Returns whether the part of the name before its last dot is a section that has the key after it."""
    section, _, key = name.rpartition(".")
    return key in sections.get(section, ())


def texts():
    """Yields (place, text) of all texts of dashboards, alerts and README."""
    for file in sorted((GRAFANA / "dashboards").glob("*.json")):
        for row_or_panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
            # A collapsed row contains its panels.
            for panel in [row_or_panel, *row_or_panel.get("panels", [])]:
                yield f"{file.name}: {panel['title']}", panel.get("description", "")
    for file in (GRAFANA / "alerts.yml", GRAFANA / "README.md"):
        yield file.name, file.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
