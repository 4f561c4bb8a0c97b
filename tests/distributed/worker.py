"""One process of an engine: trains every cell, and writes down what happened.

    python worker.py alone FOLDER                                     # one process: the numbers to compare with
    python -m torch.distributed.run --nproc_per_node 2 worker.py zero3 FOLDER

A process that takes too long over a cell writes its stack to the log, and ends.
"""

import faulthandler
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from cells import cells

SECONDS_PER_CELL = 240
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def main(engine: str, folder: Path) -> None:
    arguments = set_up(engine, folder)
    rank = int(os.environ.get("RANK", "0"))
    from trainings import train  # after the engine is set up: it imports accelerate

    records = {}
    for cell in cells(engine):
        if os.environ.get("CELLS", "") not in str(cell):  # to try some of them, with pytest's -k
            continue
        gc.collect()  # of the trainers before it: parts of engines are held by each other
        started = time.perf_counter()
        faulthandler.dump_traceback_later(SECONDS_PER_CELL, exit=True)
        record = train(cell, engine, folder, arguments)
        faulthandler.cancel_dump_traceback_later()
        records[str(cell)] = {**record, "seconds": time.perf_counter() - started}
        Path(folder, f"{engine}-{rank}.records").write_text(json.dumps(records, indent=2))


def set_up(engine: str, folder: Path) -> dict[str, Any]:
    """Set what `accelerate launch` sets for the engine's file in `ds_configs/`; return arguments of every config."""
    arguments: dict[str, Any] = {"bf16": False}  # in float32 losses can be compared to 1e-3
    if engine in ("zero2", "zero3"):
        config = json.loads((DS_CONFIGS / f"{engine}.json").read_text())
        if engine == "zero3":  # weights as small as these would be left whole
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        file = folder / f"{engine}.json"
        file.write_text(json.dumps(config))
        os.environ |= {
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
            "ACCELERATE_MIXED_PRECISION": "no",
        }
        return {**arguments, "ddp_backend": "gloo"}
    if engine == "fsdp2":
        settings = yaml.safe_load((DS_CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
        os.environ |= {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in settings.items()}}
        allow_fsdp_on_cpu()
    return {**arguments, "use_cpu": True}


def allow_fsdp_on_cpu() -> None:
    """accelerate 1.15 leaves the settings of FSDP out on CPU, where torch's `fully_shard` works, under gloo."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def init_with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in self.__dict__:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
