"""`prefopt-trl side-by-side make` and `score`: pages on which people compare policies, and their answers scored."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from prefopt_trl.cli.arguments import SideBySideMakeConfig, SideBySideScoreConfig
from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.evaluation.report import as_percentage, json_numbers, rounded, table
from prefopt_trl.evaluation.side_by_side import make_pages, score_answers
from prefopt_trl.runtime.settings import as_json, write_json, write_text


def run(own: SideBySideMakeConfig | SideBySideScoreConfig, save_config: Callable[[], None]) -> None:
    """Write the raters' pages, or print and write the scores."""
    if isinstance(own, SideBySideMakeConfig):
        key = make_pages(**vars(own))
        print(f"{len(key['tasks'])} tasks; {key['num_left_out']} prompts with equal or missing completions left out.")
        print(f"Give each rater a page of {Path(own.output_dir, 'pages')}, and keep key.json.")
    else:
        scores = score_answers(own.study, own.answers)
        rows = [[name, str(one) if isinstance(one, int) else _written(name, one)] for name, one in scores.items()]
        report = table(["", "mean ± standard error"], rows)
        write_json(Path(own.output_dir, "side_by_side.json"), json_numbers(as_json(scores, default=asdict)))
        write_text(Path(own.output_dir, "side_by_side.md"), f"# Side by side\n\n{report}\n")
        print(report)
    save_config()


def _written(name: str, estimate: Estimate) -> str:
    return as_percentage(estimate) if name.startswith(("chosen", "win_rate", "agreement")) else rounded(estimate)
