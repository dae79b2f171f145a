"""Key-value caches that keep or quantise part of what they saw, for ``generate(past_key_values=...)``."""
