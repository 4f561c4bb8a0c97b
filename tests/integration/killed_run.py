"""Builds one dataset, evaluates, or trains in rounds, again and again, in processes that test_killed.py kills.

It answers requests: one line of JSON on the standard input, one on the standard output. Each run is a fork of this
process, so torch is imported once; no thread has been started before. Of two processes each gets the environment that
torchrun would give it.
"""

import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import matplotlib.figure  # noqa: F401  here, so that no run spends its time on it
from accelerate import PartialState
from tqdm import tqdm
from transformers import GenerationMixin, Trainer

from prefopt_trl import Rounds, RSOConfig, RSOTrainer, train_in_rounds
from prefopt_trl.evaluation import policy as evaluation
from prefopt_trl.experiments.tiny import tiny_llama, train_tokenizer
from prefopt_trl.rankers import PairwiseRanker
from prefopt_trl.sampling import pipeline

PROMPTS = [f"{who} {number} likes" for number in range(8) for who in ("The cook", "A guest", "Nobody")]
NUM_CANDIDATES = 8
PROMPTS_PER_SHARD = 2
# What a run does, as it is logged: (where, name of the function)
CALLS: list[tuple[Any, str]] = [
    (GenerationMixin, "generate"),
    (PairwiseRanker, "score"),
    (PairwiseRanker, "compare"),
    (Trainer, "training_step"),
    *((Rounds, phase) for phase in ("_sample", "_train", "_judge")),
    *((os, name) for name in ("mkdir", "fsync", "replace", "unlink", "rmdir")),
]
LONGEST_RUN = 120.0  # seconds; one that waits for ever is ended, and its status says so


def make_build() -> Callable[[str, str], None]:
    """Return a function that builds the dataset in a folder ("pairs"), evaluates the policy, or trains in rounds."""
    tokenizer = train_tokenizer(PROMPTS, vocab_size=280)
    policy, judge = (tiny_llama(tokenizer, hidden_size=32, num_layers=2, seed=seed) for seed in (0, 1))
    pipeline.SHARD_COMPLETIONS = PROMPTS_PER_SHARD * NUM_CANDIDATES
    evaluation.COMPLETIONS_PER_SHARD = PROMPTS_PER_SHARD * 2
    model = tempfile.mkdtemp()
    policy.save_pretrained(model)
    tokenizer.save_pretrained(model)

    def build(folder: str, what: str) -> None:
        ranker = PairwiseRanker(judge, tokenizer)
        if what == "rounds":
            training = {"max_steps": 3, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4}
            quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
            sampling = {"num_candidates": NUM_CANDIDATES, "num_samples": 4, "max_new_tokens": 8, "gamma": 0.1}
            args, how = RSOConfig(folder, **training, **quiet, **sampling), {"num_rounds": 2, "data": "accumulate"}
            train_in_rounds(RSOTrainer, model, args, PROMPTS[:8], ranker, eval_prompts=PROMPTS[8:12], **how)
            return
        if what == "evaluation":
            policies = {"policy": policy, "targets": ["fish"] * 8}
            how = {"against": "targets", "reference": "policy", "num_completions": 2, "max_new_tokens": 8}
            evaluation.evaluate_policy(policies, tokenizer, PROMPTS[:8], judges=ranker, output_dir=folder, **how)
            return
        options = {"num_candidates": NUM_CANDIDATES, "num_samples": 4, "max_new_tokens": 8, "seed": 5}
        pipeline.build_preference_dataset(PROMPTS, policy, tokenizer, ranker, output_dir=folder, **options)

    return build


def watch(rank: int, log: int, killed_at: int | None) -> None:
    """Write a line to `log` before each of CALLS, and die before the call with this number."""
    num_calls = 0

    def watched(name: str, call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal num_calls
            os.write(log, f"{rank} {name}\n".encode())
            if num_calls == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            num_calls += 1
            return call(*arguments, **options)

        return wrapper

    for where, name in CALLS:
        setattr(where, name, watched(name, getattr(where, name)))


def run(
    build: Callable[[str, str], None],
    folder: str,
    what: str = "pairs",
    processes: int = 1,
    seconds: float | None = None,
    call: int | None = None,
    rank: int = 0,
) -> dict[str, Any]:
    """Build in forks of this process; kill all after `seconds`, or when `rank` is about to make call number `call`.

    Returns the exit status of each (-9 where it was killed), the duration, what each did in order, and what was last.
    Seconds count from the first call, before which nothing is there that could be lost.
    """
    read, write = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sys.stderr.flush()
    running, status = {}, [0] * processes
    for index in range(processes):
        pid = os.fork()
        if pid:
            running[pid] = index
            continue
        try:
            if processes > 1:
                ranks = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ.update({name: str(value) for name, value in ranks.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            assert PartialState(cpu=True).num_processes == processes
            watch(index, write, call if index == rank else None)
            build(folder, what)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    begun, deadline = None, time.monotonic() + LONGEST_RUN
    while running:
        if begun is None and select.select([read], [], [], 0)[0]:  # the first line of the log
            begun = time.monotonic()
            deadline = begun + (LONGEST_RUN if seconds is None else seconds)
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid:
            status[running.pop(pid)] = os.waitstatus_to_exitcode(code)
        if any(status) or time.monotonic() > deadline:  # torchrun too ends the others where one has died
            for other in running:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.001)
    duration = 0.0 if begun is None else time.monotonic() - begun
    with os.fdopen(read) as lines:
        log = [line.split() for line in lines]
    calls = [[name for index, name in log if int(index) == place] for place in range(processes)]
    return {"status": status, "seconds": duration, "calls": calls, "last": log[-1][1] if log else None}


def main() -> None:
    tqdm.set_lock(threading.RLock())  # forks share the default one, and a run that is killed may hold it
    build = make_build()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runs print is no answer
    for line in sys.stdin:
        print(json.dumps(run(build, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
