"""Objectives: functions of tensors that return named terms; never a model."""

from trimtab.objectives.distillation import Standardiser, distillation_terms

__all__ = ["Standardiser", "distillation_terms"]
