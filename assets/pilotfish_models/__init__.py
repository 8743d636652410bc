"""The models that come with Pilotfish: a small Stable Diffusion of emoji art, its fine-tunes, a
CLIP that scores them, guides, images and prompts. ``pilotfish.bundled`` loads them."""

__version__ = "0.2.0"
