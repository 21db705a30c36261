"""Makes the schemas beside it from checkouts of their sources. Needs PyYAML, writes next to itself.

    python cluster/schemas/refresh.py KUBERAY COMPOSE_SPEC

KUBERAY is a checkout of github.com/ray-project/kuberay at the tag that NOTICE names, COMPOSE_SPEC one of
github.com/compose-spec/compose-spec. Of a custom resource definition the schema of version v1 is kept without its
descriptions and its status, and closed: what it does not know is refused, where Kubernetes would drop it in silence.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI v3 schema of Kubernetes as a JSON schema that knows no further keys."""
    made = {}
    for name, value in schema.items():
        if name == "description" or name.startswith("x-kubernetes"):
            continue
        if name == "properties":
            made[name] = {key: closed(child) for key, child in value.items()}
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            made[name] = closed(value)
        elif name in ("anyOf", "allOf", "oneOf"):
            made[name] = [closed(child) for child in value]
        else:
            made[name] = value
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


def resource(text: str) -> dict[str, Any]:
    """The closed schema of version v1 of a custom resource definition."""
    definition = yaml.safe_load(text)
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    schema["properties"]["metadata"] = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
            "namespace": {"type": "string"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    return schema


def write(name: str, schema: dict[str, Any]) -> None:
    """Equal schemas give equal files."""
    data = json.dumps(schema, sort_keys=True, separators=(",", ":")).encode()
    (HERE / f"{name}.json.gz").write_bytes(gzip.compress(data, mtime=0))


def main() -> None:
    """Write all schemas."""
    kuberay, compose = map(Path, sys.argv[1:3])
    for kind, plural in KINDS.items():
        write(kind, resource((kuberay / f"ray-operator/config/crd/bases/ray.io_{plural}.yaml").read_text()))
    write("compose", json.loads((compose / "schema/compose-spec.json").read_text()))


if __name__ == "__main__":
    main()
