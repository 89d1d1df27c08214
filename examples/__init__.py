"""Example programs; see README.md. Each runs with one command, without an API key."""
