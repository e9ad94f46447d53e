"""Functions of the task gazeguard_lab, in lmms-eval's form."""

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Share of the objects of the reference that the answer names with their colour."""
    return {"objects_named": sum(name in results[0] for name in doc["objects"]) / len(doc["objects"])}
