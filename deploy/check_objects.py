#!/usr/bin/env python3
"""Compares the objects of Kubernetes in a YAML file with their schemas. Called by check.sh.

    python3 deploy/check_objects.py FILE [CRD...]

Needs kubernetes-validate (pip install kubernetes-validate). Objects of KEDA and of the Prometheus operator are compared
with the definitions CRD (YAML files of those projects), and only listed without them. In addition, each container must
run without root, without privileges and with a limit of memory, and a volume that a container mounts must exist.
"""

import sys

import jsonschema
import kubernetes_validate
import yaml

OTHER_GROUPS = ("keda.sh/", "monitoring.coreos.com/")


def forbid_unknown(schema: object) -> None:
    """Makes a schema refuse keys that it does not name, as `kubectl apply` does with strict validation."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for value in list(schema.values()):
            forbid_unknown(value)
    elif isinstance(schema, list):
        for value in schema:
            forbid_unknown(value)


def definitions(files: list[str]) -> dict[str, dict]:
    """Returns the schemas of the kinds that the files define."""
    schemas = {}
    for file in files:
        spec = yaml.safe_load(open(file, encoding="utf-8"))["spec"]
        version = next(version for version in spec["versions"] if version["storage"])
        schema = version["schema"]["openAPIV3Schema"]
        forbid_unknown(schema["properties"]["spec"])
        schemas[spec["names"]["kind"]] = schema
    return schemas


def faults_of_pod(spec: dict) -> list[str]:
    """Returns what is wrong with a pod beyond its schema."""
    faults = []
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    if not spec.get("securityContext", {}).get("runAsNonRoot"):
        faults.append("the pod may run as root")
    for container in spec.get("initContainers", []) + spec["containers"]:
        name, context = container["name"], container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            faults.append(f"{name} has privileges")
        if "memory" not in container.get("resources", {}).get("limits", {}):
            faults.append(f"{name} has no limit of memory")
        faults += [
            f"{name} mounts {mount['name']}, which is no volume"
            for mount in container.get("volumeMounts", [])
            if mount["name"] not in volumes
        ]
    return faults


def main() -> int:
    """Prints the faults. Returns the exit status."""
    faults, others = 0, definitions(sys.argv[2:])
    for value in yaml.safe_load_all(open(sys.argv[1], encoding="utf-8")):
        name = f"{value['kind']} {value['metadata']['name']}"
        found = []
        if value["kind"] in others:
            errors = jsonschema.Draft202012Validator(others[value["kind"]]).iter_errors(value)
            found += [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]
        elif value["apiVersion"].startswith(OTHER_GROUPS):
            print(f"{name}: not checked, {value['apiVersion']}")
            continue
        else:
            try:
                kubernetes_validate.validate(value, kubernetes_validate.latest_version(), strict=True)
            except kubernetes_validate.ValidationError as error:
                found.append(f"{'.'.join(map(str, error.path))}: {error.message}")
        template = value.get("spec", {}).get("template", {}).get("spec")
        if template:
            claims = value["spec"].get("volumeClaimTemplates", [])
            template = template | {
                "volumes": template.get("volumes", []) + [{"name": claim["metadata"]["name"]} for claim in claims]
            }
            found += faults_of_pod(template)
        for fault in found:
            print(f"{name}: {fault}")
        faults += len(found)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
