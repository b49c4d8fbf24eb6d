"""PEFT's model class of each task, with a trained head where the task calls for one."""

from __future__ import annotations

from .model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """For task_type="CAUSAL_LM"."""


class PeftModelForSeq2SeqLM(PeftModel):
    """For task_type="SEQ_2_SEQ_LM"."""


class PeftModelForFeatureExtraction(PeftModel):
    """For task_type="FEATURE_EXTRACTION"."""


class PeftModelForSequenceClassification(PeftModel):
    """For task_type="SEQ_CLS": the classification head is trained whole and stored with the adapter."""

    head_of = "SEQ_CLS"


class PeftModelForTokenClassification(PeftModel):
    """For task_type="TOKEN_CLS": the classification head is trained whole and stored with the adapter."""

    head_of = "TOKEN_CLS"


class PeftModelForQuestionAnswering(PeftModel):
    """For task_type="QUESTION_ANS": the span head is trained whole and stored with the adapter."""

    head_of = "QUESTION_ANS"


class PeftMixedModel(PeftModel):
    """PEFT's class for several adapters active at once, which every class here allows: ``set_adapter([...])``."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}
PeftModel.of_tasks.update(MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
