"""An LLM inference engine whose hardware is a plugin."""
