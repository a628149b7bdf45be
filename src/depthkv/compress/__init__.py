"""KV caches that hold less than every key and value as it was computed."""
