"""First in a rank's PYTHONPATH, it changes the trainer of a job under Slurm when that is imported; the package knows nothing of it.

TEST_PACE   a file that says how many seconds every training step waits before it begins. So a run of hours costs minutes
            of processor time, and a test machine has time to notice what it is doing to the run
TEST_FAULTS a JSON list of tests.train.faulty.Fault, each by its fields: numbers that go wrong in a step
"""

import importlib.abc
import importlib.util
import json
import os
import pathlib
import sys
import time

CHANGED = "megatron_smol.train.trainer"


class Changes(importlib.abc.MetaPathFinder):
    """Wraps the trainer's module when it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != CHANGED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            if "TEST_PACE" in os.environ:
                pace(module.Trainer, pathlib.Path(os.environ["TEST_PACE"]))
            if "TEST_FAULTS" in os.environ:
                plant(json.loads(os.environ["TEST_FAULTS"]))

        spec.loader.exec_module = load_and_change
        return spec


def pace(trainer, told):
    step = trainer._step

    def paced(self, stage, batch):
        time.sleep(float(told.read_text()))
        step(self, stage, batch)

    trainer._step = paced


def plant(faults):
    from tests.train.faulty import Fault, install

    mine = [fault for fault in faults if fault["rank"] == int(os.environ["SLURM_PROCID"])]
    install([Fault(**fault) for fault in mine], pathlib.Path.cwd())


sys.meta_path.insert(0, Changes())
