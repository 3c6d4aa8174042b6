"""``python -m lora_plus``: the command line."""

from .cli.app import main

main()
