"""Measuring what an adapted model can do, and telling it to people."""

from __future__ import annotations

from trimtab.evaluation.classification import (
    ClassificationResult,
    classify,
    classify_embeddings,
    classify_with,
    embed_classes,
)
from trimtab.evaluation.embedding import EmbeddedImages, Encoder, Skipped, embed_images
from trimtab.evaluation.matching import MatchResult, mean_pairwise_cosine, translation_match
from trimtab.evaluation.ranking import Hubness, nearest
from trimtab.evaluation.report import Report, render_html, render_markdown, write_report
from trimtab.evaluation.retrieval import Recall, RetrievalResult, recall_at_k, retrieve

__all__ = [
    "ClassificationResult",
    "EmbeddedImages",
    "Encoder",
    "Hubness",
    "MatchResult",
    "Recall",
    "Report",
    "RetrievalResult",
    "Skipped",
    "classify",
    "classify_embeddings",
    "classify_with",
    "embed_classes",
    "embed_images",
    "mean_pairwise_cosine",
    "nearest",
    "recall_at_k",
    "render_html",
    "render_markdown",
    "retrieve",
    "translation_match",
    "write_report",
]
