"""Where requests go: each module owns one driver and speaks to one kind of place."""
