"""The tables and figures of the papers, and our own, as data: what is trained, and what the paper found.

The papers' numbers are of other models, data and judges: only their order can be compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt_trl.experiments.cells import HINDSIGHT, NOTHING, SFT, Cell
from prefopt_trl.experiments.worlds import LEARNED, TRUTH, WEAK

ROWS, FRONTIER, MAP = "rows", "frontier", "map"  # kinds of plots

SFT_SAMPLES: dict[str, Any] = {"strategy": "sft", "num_samples": 8, "pairing": "first-round"}
RSO_SAMPLES: dict[str, Any] = {**SFT_SAMPLES, "strategy": "rso", "rejection_beta": 0.5}
BETA_2: dict[str, Any] = {**RSO_SAMPLES, "rejection_beta": 2.0}
AUTO: dict[str, Any] = {**RSO_SAMPLES, "rejection_beta": "auto"}
ALL: dict[str, Any] = {"strategy": "sft", "num_samples": 64}
ROUNDS: dict[str, Any] = {"num_rounds": 3}
HINGE_NORM: dict[str, Any] = {"loss_type": ["hinge-norm"]}

Rows = Mapping[str, Cell | tuple[Cell, str]]  # with the paper's number, if it has one
Claims = list[tuple[str, str]]  # pairs of rows, of which the first should be the better one


@dataclass(frozen=True)
class Table:
    """A table or figure."""

    title: str
    source: str  # where the paper has it
    fixed: str  # what all rows share
    rows: Rows
    claims: Claims
    unit: str = ""  # of the paper's numbers
    columns: tuple[str, ...] = ("rows", "ranker's win_rate", "kl")  # beside the reward
    kind: str = ROWS
    is_real: bool = True  # whether another world than the kitchen can have it
    shows_samples: bool = False

    @property
    def cells(self) -> dict[str, Cell]:
        return {name: row if isinstance(row, Cell) else row[0] for name, row in self.rows.items()}

    @property
    def paper(self) -> dict[str, str]:
        return {name: row[1] for name, row in self.rows.items() if not isinstance(row, Cell)}


def _others(*given: str, **how: Any) -> dict[str, Any]:
    """Return how to rank the answers of others."""
    return {"strategy": "sft", "given": list(given), "num_samples": len(given), "pairing": "ranking", **how}


def _pro(*given: str, **training: Any) -> Cell:
    return Cell(_others(*given), "pro", training, is_last=True)


RAW, FAIR, GOOD = ("first", "second"), ("first", "second", "fair"), ("first", "second", "good")
ASCENDING, DESCENDING = ("first", "second", "poor", "fair", "good"), ("first", "second", "good", "fair", "poor")
HOW_OTHERS = "two answers of a prompt (raw), or one more, of a fair or a good cook (the paper's Alpaca and ChatGPT)"
SIGMOID = "mean sigmoid of the reward model, %, total of HH-RLHF"


TABLES = {
    "quickstart": Table(
        "Where pairs come from",
        "RSO, section 5",
        "loss (RSO eq. 10) and steps; 8 of the candidates, 4 pairs of each prompt, labeled by the ranker",
        {
            "given pairs (DPO)": Cell(),
            "samples of the SFT policy": Cell(SFT_SAMPLES),
            "rejection sampling, beta 0.5": Cell(RSO_SAMPLES),
            "rejection sampling, beta 2": Cell(BETA_2),
            "rejection sampling, beta auto": Cell(AUTO),
        },
        [
            ("samples of the SFT policy", "given pairs (DPO)"),
            ("rejection sampling, beta 0.5", "samples of the SFT policy"),
            ("rejection sampling, beta 2", "samples of the SFT policy"),
            ("rejection sampling, beta auto", "samples of the SFT policy"),
        ],
        columns=("ranker's win_rate", "kl", "label probability"),
    ),
    "rso-table-1": Table(
        "Three losses on three sources of pairs",
        "RSO, Table 1",
        "equal steps; 8 of the candidates, 4 pairs of each prompt, beta 0.5; direct: the pairs of others",
        {
            "sigmoid-norm, direct": (Cell(), "84.4 / 51.6"),
            "sigmoid-norm, sft-sample-rank": (Cell(SFT_SAMPLES), "88.6 / 85.1"),
            "sigmoid-norm, rso-sample-rank": (Cell(RSO_SAMPLES), "92.4 / 86.9"),
            "hinge, direct": (Cell(method="slic"), "86.9 / 36.0"),
            "hinge, sft-sample-rank": (Cell(SFT_SAMPLES, "slic"), "89.8 / 80.8"),
            "hinge, rso-sample-rank": (Cell(RSO_SAMPLES, "slic"), "93.4 / 82.2"),
            "hinge-norm, direct": (Cell(training=HINGE_NORM), "83.9 / 49.6"),
            "hinge-norm, sft-sample-rank": (Cell(SFT_SAMPLES, training=HINGE_NORM), "88.0 / 82.4"),
            "hinge-norm, rso-sample-rank": (Cell(RSO_SAMPLES, training=HINGE_NORM), "92.8 / 84.4"),
        },
        [
            (f"{loss}, {better}", f"{loss}, {worse}")
            for loss in ("sigmoid-norm", "hinge", "hinge-norm")
            for better, worse in (("sft-sample-rank", "direct"), ("rso-sample-rank", "sft-sample-rank"))
        ],
        "wins by the reward model against the SFT target, %, on Reddit TL;DR / AnthropicHH",
    ),
    "rso-table-2": Table(
        "How many samples, and how they meet",
        "RSO, Table 2",
        "loss sigmoid-norm and steps, beta 0.5; all: the candidates, 64 in the paper and in the kitchen",
        {
            "sft-8, first-round": (Cell(SFT_SAMPLES), "88.6 / 68.5"),
            "sft-8, tournament": (Cell({**SFT_SAMPLES, "pairing": "tournament"}), "90.7 / 68.6"),
            "rso-8, first-round": (Cell(RSO_SAMPLES), "92.4 / 71.9"),
            "rso-8, tournament": (Cell({**RSO_SAMPLES, "pairing": "tournament"}), "93.4 / 71.7"),
            "sft-all, first-round": (Cell({**ALL, "pairing": "first-round"}), "88.9 / 68.8"),
            "sft-all, tournament": (Cell({**ALL, "pairing": "tournament"}), "91.1 / 71.1"),
        },
        [
            ("sft-8, tournament", "sft-8, first-round"),
            ("rso-8, tournament", "rso-8, first-round"),
            ("sft-all, tournament", "sft-all, first-round"),
            ("rso-8, first-round", "sft-8, first-round"),
            ("rso-8, first-round", "sft-all, tournament"),
        ],
        "wins by the reward model / by AutoSxS, %, on Reddit TL;DR",
    ),
    "rso-table-4": Table(
        "SLiC with regularization",
        "RSO, Table 4",
        "hinge loss on 8 samples of the SFT policy; the target is the SFT target",
        {
            f"weight {weight:g}": (
                Cell(SFT_SAMPLES, "slic", {"regularization_weight": weight, "target_column": "target"}),
                number,
            )
            for weight, number in {0.5: "90.5", 5.0: "90.3", 50.0: "90.8", 500.0: "90.1"}.items()
        }
        | {"weight 0": (Cell(SFT_SAMPLES, "slic"), "90.2")},
        [],
        "wins by the reward model, %, on Reddit TL;DR",
    ),
    "rso-figure-5-gamma": Table(
        "Temperature of the loss",
        "RSO, Figure 5a",
        "rso-sample-rank, beta 0.5",
        {f"gamma {gamma:g}": Cell(RSO_SAMPLES, training={"gamma": gamma}) for gamma in (0.005, 0.05, 0.5, 5.0)},
        [("gamma 0.05", "gamma 0.005"), ("gamma 0.05", "gamma 0.5")],
    ),
    "rso-figure-5-beta": Table(
        "Beta of rejection sampling",
        "RSO, Figure 5b",
        "loss sigmoid-norm, 8 of the candidates",
        {
            f"beta {beta}": Cell({**RSO_SAMPLES, "rejection_beta": beta})
            for beta in (0.0, 0.05, 0.5, 1.0, 2.0, 5.0, "auto")
        },
        [
            *(("beta 0.5", f"beta {other}") for other in (0.0, 0.05, 5.0)),
            *(("beta auto", f"beta {other}") for other in (0.5, 2.0, 5.0)),
        ],
        columns=("ranker's win_rate", "kl", "label probability", "acceptance", "beta"),
    ),
    "pro-table-2": Table(
        "Methods on rankings of answers that others wrote",
        "PRO, Table 2",
        f"{HOW_OTHERS}; equal steps; CoH has two texts of each pair, so it sees each half as often",
        {
            f"{method}, {name}": (cell, number)
            for name, given, numbers in (
                ("raw", RAW, ("48.83", "45.00", "52.25", "55.35")),
                ("fair", FAIR, ("57.66", "47.15", "55.39", "58.72")),
                ("good", GOOD, ("63.83", "55.58", "63.12", "67.97")),
            )
            for method, cell, number in zip(
                ("BoN", "CoH", "RRHF", "PRO"),
                (
                    Cell(_others(*given, pairing="best"), SFT, is_last=True),
                    Cell(_others(*given, pairing="best-worst"), HINDSIGHT, is_last=True),
                    Cell(_others(*given), "rrhf", is_last=True),
                    _pro(*given),
                ),
                numbers,
                strict=True,
            )
        },
        [(f"PRO, {of}", f"{other}, {of}") for of in ("raw", "fair", "good") for other in ("BoN", "CoH", "RRHF")],
        f"{SIGMOID} raw, with Alpaca, with ChatGPT",
        ("rows", "bleu", "kl"),
        is_real=False,
    ),
    "pro-table-5": Table(
        "Parts of PRO's loss",
        "PRO, Table 5",
        "two answers of a prompt, and one of a fair cook",
        {
            "PRO": (_pro(*FAIR), "58.72 / 22.11"),
            "first term only": (_pro(*FAIR, first_term_only=True), "58.11 / 21.10"),
            "no SFT term": (_pro(*FAIR, sft_weight=0.0), "59.71 / 18.29"),
            "no temperature": (_pro(*FAIR, reward_temperature="none"), "58.40 / 21.34"),
            "neither": (_pro(*FAIR, sft_weight=0.0, reward_temperature="none"), "32.33 / 2.05"),
        },
        [("PRO", "first term only"), ("PRO", "no temperature"), ("PRO", "neither")],
        f"{SIGMOID} with Alpaca / BLEU",
        ("bleu", "kl"),
        is_real=False,
    ),
    "pro-figure-3": Table(
        "Longer rankings",
        "PRO, Figure 3",
        "two answers, and those of a poor, a fair and a good cook in this order (ascending), or in the reverse one",
        {
            "2 answers": _pro(*RAW),
            **{f"{n} answers, ascending": _pro(*ASCENDING[:n]) for n in (3, 4, 5)},
            **{f"{n} answers, descending": _pro(*DESCENDING[:n]) for n in (3, 4)},
        },
        [
            ("3 answers, ascending", "2 answers"),
            ("4 answers, ascending", "3 answers, ascending"),
            ("5 answers, ascending", "4 answers, ascending"),
            ("3 answers, descending", "3 answers, ascending"),
        ],
        columns=("bleu", "kl"),
        is_real=False,
    ),
    "pro-table-6": Table(
        "Self-bootstrapping",
        "PRO, Table 6",
        f"{HOW_OTHERS}; bootstrapped: and a sample of the policy, added before each half of the data",
        {
            "raw": (_pro(*RAW), "55.35"),
            "raw, bootstrapped": (_pro(*RAW, bootstrap_parts=2), "54.20"),
            "fair": (_pro(*FAIR), "58.72"),
            "fair, bootstrapped": (_pro(*FAIR, bootstrap_parts=2), "57.44"),
            "good": (_pro(*GOOD), "67.97"),
            "good, bootstrapped": (_pro(*GOOD, bootstrap_parts=2), "68.36"),
        },
        [("raw", "raw, bootstrapped"), ("fair", "fair, bootstrapped"), ("good, bootstrapped", "good")],
        SIGMOID,
        ("bleu", "kl"),
        is_real=False,
    ),
    "dpo-frontier": Table(
        "Reward against KL, and best-of-n",
        "DPO, Figures 2 and 4",
        "one policy for each temperature of the loss; best-of-n of the SFT policy, by the ranker; its KL is the upper "
        "bound log n - (n - 1) / n",
        {
            f"{name}, gamma {gamma:g}": Cell(data, training={"gamma": gamma})
            for name, data in {"direct": "comparisons", "rso (beta 2)": BETA_2}.items()
            for gamma in (0.05, 0.1, 1.0, 5.0)
        }
        | {f"best of {n}": Cell(method=NOTHING, best_of=n) for n in (4, 16, 64, 128)},
        [
            ("best of 16", "best of 4"),
            ("best of 64", "best of 16"),
            ("rso (beta 2), gamma 0.1", "direct, gamma 0.1"),
        ],
        kind=FRONTIER,
    ),
    "dpo-table-3": Table(
        "What unlikelihood degenerates to",
        "DPO, Table 3",
        "the pairs of others, and steps; the last checkpoint of each",
        {
            "DPO": Cell(is_last=True),
            "unlikelihood": Cell(method="slic", training={"loss_type": ["unlikelihood"]}, is_last=True),
        },
        [("DPO", "unlikelihood")],
        columns=("ranker's win_rate", "kl", "tokens"),
        shows_samples=True,
    ),
    "rounds": Table(
        "Offline against rounds",
        "ours; arXiv 2506.21495",
        "numbers of samples and of steps in all; beta 2; the last policy of each",
        {
            "offline": Cell(BETA_2, rounds={"num_rounds": 1}),
            "3 rounds": Cell(BETA_2, rounds=ROUNDS),
            "3 rounds, corrected": Cell(BETA_2, rounds={**ROUNDS, "importance_correction": True}),
            "3 rounds, reference previous": Cell(BETA_2, rounds={**ROUNDS, "reference": "previous"}),
        },
        [("3 rounds", "offline"), ("3 rounds, corrected", "3 rounds"), ("3 rounds", "3 rounds, reference previous")],
    ),
    "labels": Table(
        "What the ranker knows, in the loss",
        "ours; ODPO, arXiv 2402.10571",
        "rso-sample-rank, beta 2, loss sigmoid-norm",
        {
            "hard labels": Cell(BETA_2),
            "soft labels": Cell(BETA_2, training={"soft_labels": True}),
            "reward gaps as margins": Cell(BETA_2, training={"margin_weight": 1.0}),
        },
        [("soft labels", "hard labels"), ("reward gaps as margins", "hard labels")],
    ),
    "pairs": Table(
        "Ten ways of building pairs",
        "ours",
        "candidates and steps; RSO's loss on pairs, PRO's on rankings, SFT on the best",
        {
            "8 at random, first-round": Cell(SFT_SAMPLES),
            "8 at random, tournament": Cell({**SFT_SAMPLES, "pairing": "tournament"}),
            "8 by rejection, beta 0.5": Cell(RSO_SAMPLES),
            "8 by rejection, beta 2": Cell(BETA_2),
            "8 at random, min_margin 1": Cell({**SFT_SAMPLES, "min_margin": 1.0}),
            "all, best-worst": Cell({**ALL, "pairing": "best-worst"}),
            "all, best-quantile": Cell({**ALL, "pairing": "best-quantile"}),
            "all, correct-wrong (reward above the median)": Cell({**ALL, "pairing": "correct-wrong"}),
            "4 at random, ranking (PRO)": Cell({**SFT_SAMPLES, "num_samples": 4, "pairing": "ranking"}, "pro"),
            "all, best (SFT)": Cell({**ALL, "pairing": "best"}, SFT),
        },
        [],
    ),
    "map": Table(
        "When rejection sampling helps",
        "ours",
        "loss sigmoid-norm, 8 of the candidates; the last checkpoint of each",
        {
            f"{ranker} ranker, {source}, {length:g}x steps": Cell(data, ranker=ranker, length=length, is_last=True)
            for ranker in (WEAK, LEARNED, TRUTH)
            for length in (0.25, 1.0)
            for source, data in {
                "plain samples": SFT_SAMPLES,
                **{f"beta {beta}": {**RSO_SAMPLES, "rejection_beta": beta} for beta in (0.5, 2.0, 4.0, "auto")},
            }.items()
        },
        [
            (f"{ranker} ranker, beta 0.5, {length:g}x steps", f"{ranker} ranker, plain samples, {length:g}x steps")
            for ranker in (WEAK, LEARNED, TRUTH)
            for length in (0.25, 1.0)
        ],
        columns=("ranker accuracy", "temperature", "kl", "label probability", "acceptance", "beta"),
        kind=MAP,
        is_real=False,
    ),
}
