"""Reprise: an OpenAI-compatible inference server whose answers repeat."""

__version__ = "0.1.0"
