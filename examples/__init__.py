"""Programs to start from; see README.md here. Each runs with one command, without a key."""
