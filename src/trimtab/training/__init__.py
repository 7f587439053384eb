"""Training: the one loop, its checkpoints, its processes. It sees callables, never a vision-language model."""

from trimtab.training.loop import Selection, TrainingResult, train

__all__ = ["Selection", "TrainingResult", "train"]
