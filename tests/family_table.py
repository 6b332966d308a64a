"""The README's table of families, made from the registry.

    python -m tests.family_table
"""
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as CLASSES

from lib.registry import FAMILIES


def table() -> str:
    """A Markdown table with a line for each record."""
    lines = ["| family | model type | class | also needs | note |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        types = ", ".join(f"`{kind}`" for kind in family.model_types)
        classes = ", ".join(f"`{CLASSES[kind]}`" for kind in family.model_types)
        lines.append(f"| {family.name} | {types} | {classes} | {', '.join(family.packages.values())} | {family.note} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
