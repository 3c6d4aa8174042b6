"""PEFT's folders."""
