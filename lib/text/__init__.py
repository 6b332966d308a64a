"""Processor and chat template: a conversation as text, tokens and labels."""
