"""asyncembed: an asyncio-native embedding client."""
