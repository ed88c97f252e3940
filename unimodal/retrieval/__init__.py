"""Retrieval's rule, in one place: how alike items are."""

from unimodal.retrieval.similarity import row_similarity, similarity

__all__ = ["row_similarity", "similarity"]
