"""The web app: what it draws (:mod:`drawing`), how that is shown, and the page itself."""
