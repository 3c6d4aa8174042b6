"""Programs that use lora_plus, to run and to copy from. The library does not import them; its wheel leaves them out."""
