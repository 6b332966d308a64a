"""The bench: this kit's training step against TRL's, and against the machine. See bench/README.md."""
