"""OpenAssistant's GPT-NeoX reward models (`oasst-rm-2.1-pythia-1.4b-epoch-2.5`), with which PRO section 4.3 labels.

Their `model_type` is not part of transformers and their repositories hold no code. Importing this file registers it.
"""

from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
)


class GPTNeoXRewardModelConfig(GPTNeoXConfig):
    """The config of a GPT-NeoX reward model, which rewards the hidden state of a text's last token."""

    model_type = "gpt_neox_reward_model"
    pooling: str = "last"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_labels = 1
        if self.pooling != "last":
            raise ValueError(f"The reward model's `pooling` is {self.pooling!r}. Only 'last' is supported.")


class GPTNeoXRewardModel(GPTNeoXForSequenceClassification):
    """A GPT-NeoX sequence classification model whose head has another name and a bias."""

    config_class = GPTNeoXRewardModelConfig

    def __init__(self, config: GPTNeoXRewardModelConfig) -> None:
        super().__init__(config)
        del self.score
        self.out_proj = nn.Linear(config.hidden_size, 1)

    @property
    def score(self) -> nn.Linear:  # type: ignore[override]  # which the base class reads
        return self.out_proj


AutoConfig.register(GPTNeoXRewardModelConfig.model_type, GPTNeoXRewardModelConfig, exist_ok=True)
AutoModelForSequenceClassification.register(GPTNeoXRewardModelConfig, GPTNeoXRewardModel, exist_ok=True)
