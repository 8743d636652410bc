"""Nodes of Pilotfish for ComfyUI, which reads this file in a folder of ``custom_nodes``."""

from .pilotfish_comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
