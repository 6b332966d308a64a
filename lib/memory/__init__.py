"""The forecast of a step's memory, on tensors without memory, and what would fit."""
