"""The recipe: read, converted, checked against its schema (in 01_config.py), Axolotl's vocabulary."""
