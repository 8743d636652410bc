"""The web app: what it draws (:mod:`session`), and the page (:mod:`page`)."""
