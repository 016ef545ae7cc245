"""First in a rank's PYTHONPATH, it makes every training step wait before it begins, as many seconds as the file
TEST_PACE says.

So a run of hours costs minutes of processor time, and a test machine has time to notice what it is doing to the run.
The package knows nothing of it.
"""

import importlib.abc
import importlib.util
import os
import pathlib
import sys
import time

PACED = "megatron_smol.train.trainer"


class Pace(importlib.abc.MetaPathFinder):
    """Wraps the trainer's step when that module is imported."""

    def find_spec(self, name, path, target=None):
        if name != PACED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_pace(module):
            load(module)
            step = module.Trainer._step

            def paced(self, stage, batch):
                time.sleep(float(pathlib.Path(os.environ["TEST_PACE"]).read_text()))
                step(self, stage, batch)

            module.Trainer._step = paced

        spec.loader.exec_module = load_and_pace
        return spec


sys.meta_path.insert(0, Pace())
