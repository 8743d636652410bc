"""The field's protocols: images of public prompts with several methods, scored by public models.

``definitions.py`` says what a protocol is, ``methods.py`` which rows it has, ``folders.py`` keeps
the images on disk, ``scores.py`` scores them from there, ``run.py`` is the whole measurement, and
``report.py`` the table.
"""
