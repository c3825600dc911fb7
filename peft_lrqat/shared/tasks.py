"""Which class of transformers loads the base model of a task."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peft import PeftConfig, TaskType


AUTO_CLASSES = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def class_name(config: PeftConfig) -> str:
    """The class that loads the base model of an adapter.

    Without a ``task_type`` PEFT notes the model's own class in ``auto_mapping``.
    """
    if config.task_type is not None:
        return AUTO_CLASSES[TaskType(config.task_type)]
    return (config.auto_mapping or {}).get("base_model_class") or "AutoModel"


def class_of(config: PeftConfig) -> Any:
    """The class that `class_name` names; ValueError if it is not part of transformers."""
    name = class_name(config)
    found = getattr(import_module("transformers"), name, None)
    if found is None:
        raise ValueError(
            f"the adapter was trained on a {name}, which is not a class of transformers; load the"
            " model in Python and use `export_model` there, or give the adapter a `task_type`, one"
            f" of {', '.join(task.value for task in AUTO_CLASSES)}"
        )
    return found
