"""Stage 6, ``guides``: the guides that the project carries, distilled from the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pilotfish.distill.config import DistillConfig
from pilotfish.distill.stages import distill
from recipe.finetunes import practice_folders

GUIDES: dict[str, dict[str, Any]] = {
    "tiny": {"max_train_steps": 2000},
    "full": {"guide": "full", "max_train_steps": 2000},
}


def make_guide(name: str, work: Path, target: Path) -> None:
    """Distil one on the base and the practice fine-tunes; save it in half precision."""
    guide = distill(
        DistillConfig(
            output_dir=str(work / f"guide-{name}"), checkpointing_steps=100, validation_steps=200,
            report_to="none", resume="latest", mixed_precision="bf16", pool=512,
            practice=practice_folders(work), practice_share=0.6, negative_share=0.25,
            **GUIDES[name],
        )
    )  # fmt: skip
    guide.half().save_pretrained(target / "guides" / name)
