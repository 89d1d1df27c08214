"""Texts to batches: counted, cut and packed. Pure; nothing here waits or sends."""
