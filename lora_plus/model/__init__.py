"""A tree of modules: places, patterns, injecting, merging, several adapters."""
