"""How the bundled models were made: emoji art in, a small Stable Diffusion out.

Each stage uses the library's public interface only. ``python -m recipe --help`` lists them in
the order in which they run.
"""
