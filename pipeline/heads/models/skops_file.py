"""A closed reader of ``head.skops``: it decodes numbers, texts, lists, arrays and names of classes, and makes no object.

Such a file is a zip archive of ``schema.json``, a tree of nodes, and one ``.npy`` member for each array (skops 0.16,
protocol 0 to 2).
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.heads.models.archive import Archive
from pipeline.heads.models.parts import NOTHING, Part

LONGEST = 10_000  # characters of a number or text
_OBJECTS = ("ObjectNode", "TreeNode")


def read_skops(archive: Archive) -> Part:
    """Return the classifier of a skops file. Its arrays are read when they are asked for.

    Raises
    ------
    HeadError
        If the file describes no object.
    """
    schema = archive.json("schema.json")

    def decode(node: Any) -> Any:
        loader = node.get("__loader__") if isinstance(node, dict) else None
        content = node.get("content") if isinstance(node, dict) else None
        if loader in _OBJECTS:
            attributes = content.get("content") if isinstance(content, dict) else None
            name = f"{node.get('__module__')}.{node.get('__class__')}"
            return Part(name[:200], attributes if isinstance(attributes, dict) else {}, decode)
        if loader == "JsonNode" and isinstance(content, str) and len(content) <= LONGEST:
            try:
                value = json.loads(content)
            except (ValueError, RecursionError) as problem:
                raise archive.damaged(f"schema.json: {content[:40]!r} is not JSON") from problem
            return value if value is None or isinstance(value, bool | int | float | str) else NOTHING
        if loader in ("ListNode", "TupleNode") or (loader == "NdArrayNode" and node.get("type") == "json"):
            return [decode(item) for item in content] if isinstance(content, list) else NOTHING
        if loader == "DictNode" and isinstance(content, dict):
            return {key: decode(item) for key, item in content.items()}
        if loader == "NdArrayNode" and isinstance(node.get("file"), str):
            return archive.array(node["file"])
        return NOTHING

    found = decode(schema)
    if not isinstance(found, Part):
        raise archive.damaged("it contains no classifier")
    return found
