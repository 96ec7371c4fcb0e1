#!/usr/bin/env python3
"""Writes the software bill of materials of the program, in CycloneDX 1.6 as JSON, to standard output.

    python3 deploy/sbom.py [--features cuda,otel] [--target x86_64-unknown-linux-gnu]

It lists every crate that is compiled into the program or runs while it is built, with the checksum that Cargo.lock
has, and which crate depends on which. Crates that only tests use are left out. The same Cargo.lock gives the same bytes.
"""

import argparse
import json
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def metadata(features: str, target: str) -> dict:
    """Returns what cargo knows of the packages."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--features", features]
    command += ["--filter-platform", target]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def used(nodes: dict[str, dict], root: str) -> dict[str, list[str]]:
    """Returns the packages that `root` needs without its tests, each with the packages that it depends on."""
    found, waiting = {}, [root]
    while waiting:
        package = waiting.pop()
        if package in found:
            continue
        needed = [
            dependency["pkg"]
            for dependency in nodes[package]["deps"]
            if any(kind["kind"] != "dev" for kind in dependency["dep_kinds"])
        ]
        found[package] = sorted(set(needed) - {package})
        waiting += needed
    return found


def component(package: dict, checksums: dict[tuple[str, str], str]) -> dict:
    """Returns the entry of a package."""
    name, version = package["name"], package["version"]
    entry = {
        "type": "library",
        "bom-ref": f"{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:cargo/{name}@{version}",
    }
    if package.get("description"):
        entry["description"] = " ".join(package["description"].split())
    if checksum := checksums.get((name, version)):
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package.get("license"):
        entry["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if package.get("repository"):
        entry["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return entry


def main() -> None:
    """Writes the bill of materials."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", default="", help="features that the program is built with")
    parser.add_argument("--target", default="x86_64-unknown-linux-gnu", help="target of the program")
    options = parser.parse_args()
    data = metadata(options.features, options.target)
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    checksums = {(one["name"], one["version"]): one["checksum"] for one in lock["package"] if "checksum" in one}
    packages = {package["id"]: package for package in data["packages"]}
    root = next(package["id"] for package in data["packages"] if package["name"] == "preceptor")
    needed = used({node["id"]: node for node in data["resolve"]["nodes"]}, root)

    def reference(package: str) -> str:
        return f"{packages[package]['name']}@{packages[package]['version']}"

    program = component(packages[root], checksums) | {"type": "application"}
    components = [component(packages[package], checksums) for package in needed if package != root]
    dependencies = [
        {"ref": reference(package), "dependsOn": sorted(map(reference, on))} for package, on in needed.items()
    ]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": program},
        "components": sorted(components, key=lambda one: one["bom-ref"]),
        "dependencies": sorted(dependencies, key=lambda one: one["ref"]),
    }
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))}"
    json.dump(document, sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
