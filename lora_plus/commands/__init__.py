"""The commands of the command line, each a few lines over the library.

``adapters.py`` has those on adapter files alone, ``checkpoints.py`` those on checkpoints, ``show.py`` what is printed.

Needs the extra: ``pip install "lora-plus[cli]"``.
"""
