"""How the library holds up under abuse: a thousand pictures, a thousand attachments, kills in the
middle of a training, many users at once, damaged files and arguments.

Not part of the library; it stands on it. ``python -m tests.stress.runs all`` writes
``results/holding_up.json``, and ``python -m tests.stress.runs page`` puts that into
``docs/holding_up.md``.
"""
