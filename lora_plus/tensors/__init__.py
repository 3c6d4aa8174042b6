"""Arithmetic on tensors, without modules: the matrix view, inits, variants, fused products."""
