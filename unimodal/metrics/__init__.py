"""What was measured, and under which protocol."""

from .captions import CaptionMetrics, bleu, caption_metrics, cider_d, rouge_l, tokenize
from .generation import FoundObject, SceneReport, check_picture, find_objects
from .protocol import Protocol, Result, require_alike, results_table
from .ranking import Candidates, candidates_from_scores, first_stage, ranks_from_scores, rerank
from .relevance import relevance_by_label
from .retrieval import DirectionMetrics, RetrievalMetrics, mean_of_folds, retrieval_metrics, summarise
from .significance import Interval, PairedTest, bootstrap_interval, paired_test

__all__ = [
    "Candidates",
    "CaptionMetrics",
    "DirectionMetrics",
    "FoundObject",
    "Interval",
    "PairedTest",
    "Protocol",
    "Result",
    "RetrievalMetrics",
    "SceneReport",
    "bleu",
    "bootstrap_interval",
    "candidates_from_scores",
    "caption_metrics",
    "check_picture",
    "cider_d",
    "find_objects",
    "first_stage",
    "mean_of_folds",
    "paired_test",
    "ranks_from_scores",
    "relevance_by_label",
    "require_alike",
    "rerank",
    "results_table",
    "retrieval_metrics",
    "rouge_l",
    "summarise",
    "tokenize",
]
