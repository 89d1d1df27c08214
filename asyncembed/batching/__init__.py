"""Turns texts into batches: counts tokens, cuts long texts, packs inputs. Nothing here sends a request."""
