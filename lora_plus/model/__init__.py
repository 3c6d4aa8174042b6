"""A tree of modules: places, patterns, injecting, merging, several adapters."""

from . import parameter_places as parameter_places
