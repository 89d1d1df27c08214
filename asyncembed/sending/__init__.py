"""Batches to replies: paced, sent, retried, and isolated where they fail."""
