"""Tasks: LightningModules that train the heads, one each or jointly. Recipes name them by these short paths."""

from unimodal.tasks.base import Task
from unimodal.tasks.callbacks import EMA, BestWeights, LossLog, StageProof
from unimodal.tasks.captioning import ITG, SCST, Captioning
from unimodal.tasks.evaluation import Evaluation, EvaluationSettings
from unimodal.tasks.generation import Conditioning, Flow, Generation
from unimodal.tasks.joint import Joint
from unimodal.tasks.matching import ITM, LCE, Matching
from unimodal.tasks.objective import Objective
from unimodal.tasks.optimizer import OptimizerSettings
from unimodal.tasks.resume import Interrupted, LocalCheckpoints, Resume
from unimodal.tasks.retrieval import ITC, Distillation, EmbeddingObjective, MaskedITC, Retrieval, SigmoidITC
from unimodal.tasks.step import Step
from unimodal.tasks.strategy import FSDP2
from unimodal.tasks.system import SystemLosses

__all__ = [
    "EMA",
    "FSDP2",
    "ITC",
    "ITG",
    "ITM",
    "LCE",
    "SCST",
    "BestWeights",
    "Captioning",
    "Conditioning",
    "Distillation",
    "EmbeddingObjective",
    "Evaluation",
    "EvaluationSettings",
    "Flow",
    "Generation",
    "Interrupted",
    "Joint",
    "LocalCheckpoints",
    "LossLog",
    "MaskedITC",
    "Matching",
    "Objective",
    "OptimizerSettings",
    "Resume",
    "Retrieval",
    "SigmoidITC",
    "StageProof",
    "Step",
    "SystemLosses",
    "Task",
]
