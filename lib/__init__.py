"""What several stages run, and the machinery that a reader may skip without losing the idea of a stage."""
