"""Pictures, sounds and clips: found, fetched, decoded, and bounded in size."""
