"""The sources of vectors: OpenAI and compatible servers, and a local model."""
