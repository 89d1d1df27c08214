"""Texts become batches: tokens are counted, long texts cut, inputs packed. Nothing here sends a request."""
