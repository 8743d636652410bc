"""How the embedded model was made: emoji art in, a small Stable Diffusion out.

Apart from the library and above it: these stages use only pilotfish's public face.
``python -m recipe --help`` lists them in the order in which they run.
"""
