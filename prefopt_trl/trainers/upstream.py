"""TRL's private names that the trainers need; the contract test says what each must do."""

from importlib.metadata import version
from typing import Any

TESTED = "trl 1.15 to 1.16 with transformers 5.17 to 5.24"
FUNCTIONS = "create_model_from_path get_config_model_id use_adapter"  # of `trl.trainer.utils`
# Of `DPOTrainer`, whose methods the trainers override or call
METHODS = (
    "_finish_current_push _get_output_dir _get_train_sampler _precompute_ref_logps _prepare_dataset "
    "_prepare_inputs _push_from_checkpoint _remove_unused_columns _save_checkpoint _set_signature_columns_if_needed"
)
# Of a trainer once it is constructed
ATTRIBUTES = "_metrics _signature_columns _total_train_tokens _tp_size aux_loss_enabled ref_model router_aux_loss_coef"


def require(owner: object, names: str) -> list[Any]:
    """Return the attributes of `owner` with these names, separated by spaces.

    Raises:
        ImportError: with the versions that work, if there is one it does not have.
    """
    if missing := [name for name in names.split() if not hasattr(owner, name)]:
        raise ImportError(
            f"trl {version('trl')} with transformers {version('transformers')} has no {', '.join(missing)}, which "
            f"the trainers need. These work: {TESTED}. Install them, or a newer prefopt-trl."
        )
    return [getattr(owner, name) for name in names.split()]
