#!/usr/bin/env python3
"""Checks that every setting which dashboards and alerts name in their texts is one of the program's.

    settings.py

A setting is written with its section, `learner.eta`; the sections and their keys are read from configs/preceptor.schema.json.
Exit status 0 when all are known, 1 when not. Needs Python 3.8 and nothing else.
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
    # Two words with a point between that are no file's name; a template's variables have a $.
    mentioned = re.compile(r"(?<![\w$./-])[a-z_]+(?:\.[a-z_]+)+(?![\w/:-])")
    faults = total = 0
    for place, text in texts():
        for name in sorted(set(mentioned.findall(text))):
            if name.rpartition(".")[2] in FILES:
                continue
            total += 1
            if not is_setting(name, sections):
                faults += 1
                print(f"{place}: {name} is no setting")
    print(f"{total - faults} of {total} mentions of settings are well")
    return 1 if faults or not total else 0


def read_sections():
    """Keys by section, tables inside sections included (`labeler.remote`), from the JSON Schema of the configuration."""
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
    """Whether a section, the longest that the name begins with, has the key that follows."""
    section, _, key = name.rpartition(".")
    return key in sections.get(section, ())


def texts():
    """(place, text) of everything that is shown to people."""
    for file in sorted((GRAFANA / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]:
            yield f"{file.name}: {panel['title']}", panel.get("description", "")
    for file in (GRAFANA / "alerts.yml", GRAFANA / "README.md"):
        yield file.name, file.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
