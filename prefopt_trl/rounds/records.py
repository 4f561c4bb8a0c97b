"""The settings that all rounds in a folder share."""

from pathlib import Path

from prefopt_trl.runtime.processes import process_state
from prefopt_trl.runtime.settings import Settings, as_json, differences, read_json, write_json


def same_as_before(folder: Path, settings: Settings) -> None:
    """Refuse settings other than those of rounds that are in the folder, naming them; write those that are new.

    Call it on all processes. Until a phase is finished, all settings may change.
    """
    state, file, now = process_state(), folder / "rounds.json", as_json(settings)
    before, has_records = read_json(file) or {}, any(folder.glob("round-*/record.json"))
    shared = before.keys() & now.keys() if has_records else set()
    if changed := differences({key: before[key] for key in shared}, {key: now[key] for key in shared}):
        lines = "\n  ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
        raise ValueError(
            f"{folder} holds rounds that were made with other settings:\n  {lines}\nSet them back, or choose another "
            "`output_dir`. `num_rounds`, `patience` and `metric` may change."
        )
    state.wait_for_everyone()  # all have read it
    if state.is_main_process and now.keys() - shared:
        write_json(file, before | now)
    state.wait_for_everyone()
