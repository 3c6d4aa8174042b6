"""Arithmetic on tensors, without modules: the matrix view, inits, variants, fused products."""

from . import token_rows as token_rows
