"""Which samples make a step: their order, packing, and the loader of batches."""
