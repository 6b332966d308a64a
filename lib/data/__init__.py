"""Rows as they come, in any usual shape, as messages; rows to samples, with their lengths."""
