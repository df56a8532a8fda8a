"""The config as a JSON schema, for editors that complete and check YAML: `rushes config --schema`.

A recipe names it in its first line, `# yaml-language-server: $schema=…`. It knows types, ranges, names and options of
the parts; what depends on several keys is checked by `rushes train --dry-run`.
"""

from __future__ import annotations

from typing import Any

from pipeline.config.parts import DEFAULTS, PARTS
from pipeline.config.schema import Config


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config, with every part that can be chosen by name."""
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    for section, registry in PARTS.items():
        choices = []
        for name, part in registry.all().items():
            options = part.model_json_schema()
            definitions.update(options.pop("$defs", {}))
            options["properties"] = {"name": {"const": name}, **options.get("properties", {})}
            if name != DEFAULTS[section]:
                options["required"] = ["name", *options.get("required", [])]
            options["title"] = name
            key = f"{section}.{name}"
            definitions[key] = options
            choices.append({"$ref": f"#/$defs/{key}"})
        described = schema["properties"][section].get("description", "")
        schema["properties"][section] = {"description": described, "anyOf": choices}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Rushes config"}
