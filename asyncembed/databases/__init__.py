"""The database drivers, and what sources, sinks and caches share of each."""
