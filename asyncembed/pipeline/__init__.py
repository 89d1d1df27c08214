"""`ingest`: records from a source, validated, embedded and stored."""

from .ingestion import ingest

__all__ = ["ingest"]
