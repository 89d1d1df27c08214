"""Sends batches: rate limits, retries, isolation of bad texts."""
