"""Retrieval's rule, in one place: how alike items are, which candidates are scored again as pairs, and what these scores do."""

from unimodal.config import Combine, ScoringRule
from unimodal.retrieval.rerank import Found, combined, depth, rerank
from unimodal.retrieval.rule import rule_for
from unimodal.retrieval.similarity import row_similarity, similarity

__all__ = [
    "Combine",
    "Found",
    "ScoringRule",
    "combined",
    "depth",
    "rerank",
    "row_similarity",
    "rule_for",
    "similarity",
]
