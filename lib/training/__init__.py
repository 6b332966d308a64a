"""The step and what is around it: loss, optimizer, ranks, checkpoints, metrics, faults."""
