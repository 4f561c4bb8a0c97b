"""OpenAssistant's GPT-NeoX reward models (`oasst-rm-2.1-pythia-1.4b-epoch-2.5`), with which PRO section 4.3 labels.

Their `model_type` is not part of transformers and their repositories hold no code. Importing this file registers it.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class GPTNeoXRewardModelConfig(GPTNeoXConfig):
    """The config of a GPT-NeoX reward model, which has one output.

    Attributes:
        pooling (`str`):
            `"last"` to reward the hidden state of a text's last token, `"mean"` for the mean over its tokens.
    """

    model_type = "gpt_neox_reward_model"
    pooling: str = "last"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_labels = 1
        if self.pooling not in ("last", "mean"):
            raise ValueError(f"`pooling` is {self.pooling!r}. Give 'last' or 'mean'.")


class GPTNeoXRewardModel(GPTNeoXPreTrainedModel):
    """A GPT-NeoX model whose pooled hidden state has a linear head with one output."""

    config_class = GPTNeoXRewardModelConfig

    def __init__(self, config: GPTNeoXRewardModelConfig) -> None:
        super().__init__(config)
        self.gpt_neox = GPTNeoXModel(config)
        self.out_proj = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Return the rewards of texts as `logits`, shape `(batch_size, 1)`. The mask is 0 at padding."""
        hidden = self.gpt_neox(input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.config.pooling == "mean":
            weights = (mask / mask.sum(dim=1, keepdim=True)).to(hidden)
            pooled = (hidden * weights[..., None]).sum(dim=1)
        else:
            # A padding token other than EOS ends no text, as in transformers' models, which allows to share prompts
            if self.config.pad_token_id not in (None, self.config.eos_token_id):
                mask = mask * (input_ids != self.config.pad_token_id)
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
            pooled = hidden[torch.arange(len(hidden)), last.to(hidden.device)]
        return SequenceClassifierOutput(logits=self.out_proj(pooled))


AutoConfig.register(GPTNeoXRewardModelConfig.model_type, GPTNeoXRewardModelConfig, exist_ok=True)
AutoModelForSequenceClassification.register(GPTNeoXRewardModelConfig, GPTNeoXRewardModel, exist_ok=True)
