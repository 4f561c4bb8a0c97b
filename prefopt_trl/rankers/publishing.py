"""A ranker's model as a folder with a card, and its push to the Hub."""

from pathlib import Path

from huggingface_hub import ModelCardData, RepoCard
from peft import PeftModel
from transformers import PreTrainedModel

from prefopt_trl.rankers.base import Ranker
from prefopt_trl.rankers.inference import RankingModel
from prefopt_trl.runtime.cards import public_name, render
from prefopt_trl.runtime.hub import push_folder
from prefopt_trl.runtime.settings import Settings


class PublishedModel(Ranker):
    """The `save_pretrained` and `push_to_hub` of rankers that hold a model."""

    ranking_model: RankingModel
    temperature: float

    def arguments(self) -> dict[str, str]:
        """Return the arguments that make this ranker from its model, as Python writes them."""
        arguments = {"max_length": str(self.ranking_model.max_length)}
        if self.temperature != 1:
            arguments["temperature"] = repr(float(self.temperature))
        if self.ranking_model.trust_remote_code:
            arguments["model_init_kwargs"] = repr({"trust_remote_code": True})
        return arguments

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the model (or its adapter), its tokenizer, and a card that shows how to make the ranker from them.

        Args:
            save_directory (`str` or `Path`):
                Folder, which is created if it is missing. `PairwiseRanker(folder)` loads it again.
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
        """Save the ranker, then upload it to the Hub. Call it in one process.

        Args:
            repo_id (`str`):
                Repository, such as `"my-org/my-ranker"`. It is created if it is missing.
            save_directory (`str` or `Path`, *optional*):
                Folder to save it in, where it stays. By default one of the repository's name.
            private (`bool`, *optional*):
                Whether a repository created here is private. By default as the organization has set it.
            token (`str`, *optional*):
                Access token. By default the one you are logged in with.

        Returns:
            `str`: address of the repository.

        Raises:
            PushError: if the upload fails, with the command that retries it. The folder stays complete.

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
    settings: Settings,
    dataset_name: str | None = None,
) -> RepoCard:
    """Write the card of a ranker's model.

    The ranker is loaded from `source`, a repository or folder, with `arguments` as Python writes them. The table shows
    `settings`. Of a `dataset_name` that is a folder or file, the card shows the last part only.
    """
    base_model = model.config.name_or_path or ""
    data = ModelCardData(
        library_name="peft" if isinstance(model, PeftModel) else "transformers",
        base_model=None if Path(base_model).exists() else base_model,
        datasets=None if dataset_name is None or Path(dataset_name).exists() else dataset_name,
        tags=["trl", "prefopt-trl", "ranker", "reward-model"],
    )
    return render(
        "ranker",
        data,
        ranker_class=ranker_class.__name__,
        base_name=public_name(base_model),
        dataset_name=public_name(dataset_name or ""),
        source=source,
        arguments=arguments,
        settings=settings,
    )
