# SPDX-License-Identifier: Apache-2.0
"""The head of a README that model hubs read: library, base model, tags, and a licence only where it is known."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

RELATIONS = ("adapter", "finetune", "merge", "quantized")
"""What hubs call the way from the base model to this one."""
REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")


def front_matter(
    *, library_name: str, tags: Sequence[str], base: str | Path | None = None, relation: str | None = None,
    pipeline_tag: str | None = None,
) -> str:  # fmt: skip
    """YAML between two lines of dashes.

    base      folder of the base model; its name on a hub where that is known, else the folder's name
    relation  one of RELATIONS
    """
    assert (base is None) == (relation is None), "a base model is there in a relation"
    assert relation is None or relation in RELATIONS, relation
    said: dict[str, Any] = {"library_name": library_name}
    if base is not None:
        said |= {"base_model": base_name(Path(base)), "base_model_relation": relation}
        if (license_name := card_value(Path(base), "license")) is not None:
            said["license"] = license_name
    if pipeline_tag is not None:
        said["pipeline_tag"] = pipeline_tag
    said["tags"] = list(dict.fromkeys(["anabranch", *tags]))
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---\n"


def base_name(folder: Path) -> str:
    """owner/name where the folder lies in a hub's cache or its configuration says so; else the folder's own name."""
    for part in folder.absolute().parts:
        if match := CACHED.fullmatch(part):
            return f"{match['owner']}/{match['name']}"
    for file in ("config.json", "model_index.json"):
        named = json_or_nothing(folder / file).get("_name_or_path")
        if isinstance(named, str) and REPO_ID.fullmatch(named) and not Path(named).exists():
            return named
    return re.sub(r"[^\w.\-]+", "-", folder.absolute().name).strip("-.") or "base"


def card_value(folder: Path, name: str) -> str | None:
    """What the head of a folder's README says of one thing."""
    file = folder / "README.md"
    if not file.is_file() or file.stat().st_size > 1_000_000:
        return None
    head = re.match(r"---\n(.*?)\n---\n", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        said = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    value = said.get(name) if isinstance(said, dict) else None
    return value if isinstance(value, str) else None


def json_or_nothing(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
