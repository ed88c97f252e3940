"""What was measured, and under which protocol."""

from .captions import CaptionMetrics, CiderD, bleu, caption_metrics, cider_d, rouge_l, tokenize
from .generation import FoundObject, SceneReport, check_picture, find_objects
from .judged import JudgedMetrics, judged_metrics, require_judged
from .protocol import Protocol, Result, require_alike, results_table
from .ranking import Candidates, candidates_from_scores, first_stage, ranks_from_scores, second_stage, text_to_text
from .relevance import RelevanceMetrics, relevance_by_label, relevance_metrics
from .retrieval import (
    DirectionMetrics,
    RetrievalMetrics,
    TextToTextMetrics,
    mean_of_folds,
    retrieval_metrics,
    summarise,
)
from .runs import Ranks, compare, load_ranks, save_ranks
from .significance import Interval, PairedTest, bootstrap_interval, paired_test

__all__ = [
    "Candidates",
    "CaptionMetrics",
    "CiderD",
    "DirectionMetrics",
    "FoundObject",
    "Interval",
    "JudgedMetrics",
    "PairedTest",
    "Protocol",
    "Ranks",
    "RelevanceMetrics",
    "Result",
    "RetrievalMetrics",
    "TextToTextMetrics",
    "SceneReport",
    "bleu",
    "bootstrap_interval",
    "candidates_from_scores",
    "caption_metrics",
    "check_picture",
    "cider_d",
    "compare",
    "find_objects",
    "first_stage",
    "judged_metrics",
    "load_ranks",
    "mean_of_folds",
    "paired_test",
    "ranks_from_scores",
    "relevance_by_label",
    "relevance_metrics",
    "require_alike",
    "require_judged",
    "results_table",
    "retrieval_metrics",
    "rouge_l",
    "save_ranks",
    "second_stage",
    "summarise",
    "text_to_text",
    "tokenize",
]
