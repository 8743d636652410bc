"""The field's protocols: images of public prompts with several methods, scored by public models.

``definitions.py`` says what a protocol is, ``inputs.py`` what it needs, ``methods.py`` which rows
it has. ``folders.py`` keeps the images on disk, and ``scores.py`` scores them from there.
``shares.py`` makes the rows, ``run.py`` is the whole measurement, and ``report.py`` the table.
"""
