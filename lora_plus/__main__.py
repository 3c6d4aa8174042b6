"""``python -m lora_plus``: the command line."""

from lora_plus.cli import main

main()
