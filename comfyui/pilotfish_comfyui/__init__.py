"""Pilotfish in ComfyUI: guides on its models, and the conversion of UNets between the two."""
