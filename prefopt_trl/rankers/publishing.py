"""A ranker's model as a folder, and its way to the Hub."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel

from prefopt_trl.rankers.inference import RankingModel
from prefopt_trl.runtime.cards import name, public_name, settings_table
from prefopt_trl.runtime.hub import push_folder


class PublishedModel(ABC):
    """What rankers that hold a model have: `save_pretrained` and `push_to_hub`."""

    ranking_model: RankingModel

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Those of the ranker."""

    @abstractmethod
    def arguments(self) -> dict[str, str]:
        """The arguments that make this ranker out of its model, as Python writes them."""

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the model (or its adapter), its tokenizer, and a card that says how to make the ranker of them.

        Args:
            save_directory (`str` or `Path`):
                Folder, which is made where there is none. `PairwiseRanker(folder)` loads it again.
        """
        self.ranking_model.model.save_pretrained(str(save_directory))
        self.ranking_model.tokenizer.save_pretrained(str(save_directory))
        self._write_card(Path(save_directory), str(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        save_directory: str | Path | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Save the ranker, and upload it to the Hub. Call it in one process.

        Args:
            repo_id (`str`):
                Repository, such as `"my-org/my-ranker"`. It is made where there is none.
            save_directory (`str` or `Path`, *optional*):
                Folder to save it in, where it stays. By default one of the repository's name.
            private (`bool`, *optional*):
                Whether a repository made here is private. By default as the organisation has it.
            token (`str`, *optional*):
                Access token. By default the one you are logged in with.

        Returns:
            `str`: address of the repository.

        Raises:
            PushError: if the upload fails, with the command that repeats it. The folder stays whole.

        Example:

        ```python
        ranker.push_to_hub("my-org/my-ranker", private=True)
        ```
        """
        folder = Path(repo_id.split("/")[-1] if save_directory is None else save_directory)
        self.save_pretrained(folder)

        def write_card(repo_id: str) -> None:
            self._write_card(folder, repo_id)

        return push_folder(folder, repo_id, write_card, commit_message="Upload ranker", private=private, token=token)

    def _write_card(self, folder: Path, source: str) -> None:
        card = ranker_card(type(self), self.ranking_model.model, source, self.arguments(), self.settings())
        card.save(folder / "README.md")


def ranker_card(
    ranker_class: type[PublishedModel],
    model: PreTrainedModel | PeftModel,
    source: str,
    arguments: dict[str, str],
    settings: dict[str, Any],
    dataset_name: str | None = None,
) -> ModelCard:
    """Write the card of a ranker's model.

    Args:
        ranker_class (`type`):
            [`PairwiseRanker`] or [`RewardModelRanker`].
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Its model, or adapter.
        source (`str`):
            What the model is loaded from: its repository, or its folder.
        arguments (`dict[str, str]`):
            Further arguments that make the ranker, as Python writes them.
        settings (`dict`):
            What the card has in its table.
        dataset_name (`str`, *optional*):
            What the model was trained on: dataset on the Hub, or a folder or file, whose name alone is told.

    Returns:
        [`~huggingface_hub.ModelCard`]: with its metadata in YAML first.
    """
    kind, is_adapter = ranker_class.__name__, isinstance(model, PeftModel)
    base_model = model.config.name_or_path or ""
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        base_model=None if Path(base_model).exists() else base_model,
        datasets=None if dataset_name is None or Path(dataset_name).exists() else dataset_name,
        tags=["trl", "prefopt-trl", "ranker", "reward-model"],
    )
    written = "".join(f", {argument}={value}" for argument, value in arguments.items())
    trained_from = f" Its model was loaded from {name(public_name(base_model))}." if base_model else ""
    trained_on = f" It was trained on {name(public_name(dataset_name))}." if dataset_name else ""
    text = f"""# Ranker

A `{kind}` of prefopt-trl: it says which of two completions of a prompt is
preferred, and gives each a reward.{trained_from}{trained_on}

## Use

```python
from prefopt_trl import {kind}

ranker = {kind}({source!r}{written})
ranker.compare(["What is 2 + 2?"], ["It is 4."], ["It is 5."])
```

## Settings

{settings_table(settings)}
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
