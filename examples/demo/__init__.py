"""The demo: a real language model learns to read dates in six languages with LoRA+, on a CPU, in a few minutes.

``make demo`` runs it, or ``python -m examples.demo`` in the root of the repository, after ``pip install --editable
".[examples]"``. ``finetune.py`` is the part to read and to copy: a plain PyTorch model, a plain training loop, and
the few calls of ``lora_plus`` that adapt, train, save, reload and merge it. The other files are what any project
brings along itself: ``llama.py`` the model, ``smollm2.py`` how it is loaded, ``dates.py`` the data, ``answers.py``
batches, losses and right answers, ``assets.py`` where the model comes from, ``dtype.py`` the choice of a number format,
``settings.py`` what can be chosen, ``show.py`` what is printed, ``__main__.py`` the command line.
"""
