"""Objectives: functions of tensors that return named terms; never a model."""

from trimtab.objectives.distillation import Standardiser, distillation_terms, mean_pairwise_cosine

__all__ = ["Standardiser", "distillation_terms", "mean_pairwise_cosine"]
