"""Recipes: whole experiments, from episodes to tables, figures and a folder that can be resumed."""

from dhlens.dissection import Asked
from dhlens.observation import Observation
from dhlens.recipes.ablation import Ablation, PerEpisode, ablate
from dhlens.recipes.circuit import Circuit, circuit
from dhlens.recipes.detect import Scan, scan
from dhlens.recipes.prediction import Prediction, predict
from dhlens.recipes.reasoning import Reasoning, reason
from dhlens.recipes.reranking import Reranking, rerank
from dhlens.recipes.retrieval import Rag, rag
from dhlens.recipes.standard import standard_edits

__all__ = [
    "Ablation",
    "Asked",
    "Circuit",
    "Observation",
    "PerEpisode",
    "Prediction",
    "Rag",
    "Reasoning",
    "Reranking",
    "Scan",
    "ablate",
    "circuit",
    "predict",
    "rag",
    "reason",
    "rerank",
    "scan",
    "standard_edits",
]
