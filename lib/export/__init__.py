"""What 06 hands on: merged weights, the model card, and the proof in a fresh process."""
