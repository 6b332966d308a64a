"""Answers to held-out rows: generated, scored, compared; golden logits."""
