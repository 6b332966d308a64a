"""The pages to look at: preview, report, charts, tokens in colour."""
