"""The commands of the command line, each a few lines over the library; they need ``pip install "lora-plus[cli]"``.

The library, and torch with it, is imported inside the commands, so that help and completion do not wait for it.
"""
