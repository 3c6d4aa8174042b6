"""The commands of the command line, each a few lines over the library.

``adapters.py`` has those on adapter files alone, ``checkpoints.py`` those on checkpoints, ``show.py`` what is printed,
``arguments.py`` and ``usage.py`` what a command line may be. The library, and torch with it, is imported inside the
commands, so that help and completion do not wait for it.

Needs the extra: ``pip install "lora-plus[cli]"``.
"""
