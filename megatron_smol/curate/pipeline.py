"""Carries a curation file out: phases of datatrove pipelines, on this machine or on Slurm.

A phase reads documents, takes them through its steps and writes one part a rank. A step that must know all documents
(duplicates) ends a phase: keys are written as the documents go by, one task groups them, and the next phase leaves out
what that task listed. The last phase writes `documents/`, then one task makes the card. A rank whose completion
marker exists is not run again, so that a kill loses at most the ranks at work; parts and samples are whole or absent.
"""

from __future__ import annotations

import glob
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor

from megatron_smol.curate.code import language_of
from megatron_smol.curate.config import Curation, Inputs
from megatron_smol.curate.duplicates import DropGrouped, Group, WriteKeys
from megatron_smol.curate.epochs import reading
from megatron_smol.curate.kept import Describe, FewDropped
from megatron_smol.curate.local import Tasks
from megatron_smol.curate.parts import ReadPart, WritePart
from megatron_smol.curate.reading import ReadInputs
from megatron_smol.curate.warc import WARC
from megatron_smol.data.files import require_folder, write_whole
from megatron_smol.data.inputs import InputFile, expand_inputs, hub_inputs, local_file
from megatron_smol.errors import UserError

DOCUMENTS, WORK, CARD = "documents", "work", "card.html"
_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet", *WARC)
# Not part of what is made: they may differ between a run and the one that continues it.
_FREE = {"workers", "slurm", "epochs", "tokenizer"}


@dataclass
class Phase:
    """Pipelines that run one after the other: `blocks` on every rank, or (alone) on one. titles: of the blocks."""

    name: str
    blocks: list[Any] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    alone: bool = False

    @property
    def what(self) -> str:
        return f"{self.name}: {', '.join(filter(None, self.titles))}".removesuffix(": ")

    def add(self, title: str, block: Any) -> None:
        self.titles.append(title)
        self.blocks.append(block)


class Layout:
    """Where a curation keeps its files."""

    def __init__(self, output: Path) -> None:
        self.output, self.work = output, output / WORK
        self.documents = output / DOCUMENTS

    def logs(self, phase: str) -> Path:
        return self.work / phase / "logs"

    def samples(self, number: int) -> Path:
        return self.work / "samples" / f"{number:02d}"


def curate(config: Curation, *, overwrite: bool = False) -> Path | None:
    """Run what is not done yet; returns the card, or None where Slurm does the work."""
    from megatron_smol.curate.card import speeds

    require_folder(config.output)
    files = input_files(config.inputs)
    layout = Layout(config.output.absolute())
    _claim(config, files, layout, overwrite)
    phases = phases_of(config, files, layout)
    reading(config)  # what is wrong with the card's recipe is told before the work
    if config.slurm is not None:
        _submit(config, phases, layout)
        return None
    # The card is made anew: its recipe or tokenizer may be others than last time.
    shutil.rmtree(layout.logs("card"), ignore_errors=True)
    with Tasks(config.workers) as tasks:
        for phase in phases:
            logs = layout.logs(phase.name)
            tasks.run(phase.what, phase.blocks, 1 if phase.alone else config.tasks, logs)
            for title, documents_per_second in speeds(phase.titles, phase.blocks, logs):
                tasks.tell(f"{title}: {documents_per_second:,.0f} documents/s a worker")
    return layout.output / CARD


def input_files(inputs: Inputs) -> list[InputFile]:
    """Files, folders, globs and URLs to files, sorted within each; a hub data set to its files."""
    if inputs.hub is not None:
        hub = inputs.hub
        return hub_inputs(hub.name, hub.config, hub.split, hub.revision)
    found: list[InputFile] = []
    for given in inputs.paths:
        if "://" in given:
            found += expand_inputs([given])
            continue
        path = Path(given)
        if path.is_dir():
            files = sorted(str(file) for file in path.rglob("*") if file.is_file())
            here = [file for file in files if (language_of(file) if inputs.code else file.endswith(_ENDINGS))]
        else:
            here = sorted(glob.glob(given))  # noqa: PTH207  a pattern may be absolute
        if not here:
            raise UserError(
                f"no input at {given}: give files, folders or globs of {', '.join(_ENDINGS[:2])}, .parquet, .warc.gz ..."
            )
        found += [local_file(Path(file)) for file in here]
    return found


def phases_of(config: Curation, files: list[InputFile], layout: Layout) -> list[Phase]:
    """The steps as phases; every block's files have names of their own."""
    phases = [Phase("phase-0")]
    given = config.inputs
    domains = None if given.domains is None else given.domains.chosen()
    phases[0].add("read", ReadInputs(files, given.text_key, given.extract, domains))
    for number, step in enumerate(config.steps):
        few = FewDropped(layout.samples(number))
        if not step.splits:
            phases[-1].add(step.title, step.build(few))
            continue
        here, name = layout.work / f"step-{number:02d}", f"phase-{sum(not phase.alone for phase in phases)}"
        keys, drop, parts = here / "keys", here / "drop", here / "parts"
        phases[-1].add("", WriteKeys(keys, *step.keys()))
        phases[-1].add("", WritePart(parts))
        grouping = Phase(f"group-{number:02d}", alone=True)
        grouping.add(f"groups of {step.title}", Group(keys, drop, config.tasks))
        phases += [grouping, Phase(name)]
        phases[-1].add("", ReadPart(parts))
        phases[-1].add(step.title, DropGrouped(drop, step.title.replace(" ", "_"), few))
    phases[-1].add("", Describe(layout.work / "shares", layout.work / "samples" / "kept"))
    phases[-1].add("", WritePart(layout.documents))
    last = Phase("card", alone=True)
    last.add("", _Card(config, layout.output))
    return [*phases, last]


class _Card:
    """A pipeline of one block: the card, from the files of all ranks."""

    def __init__(self, config: Curation, output: Path) -> None:
        self.config, self.output = config, output

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from megatron_smol.curate.card import write_card

        write_card(self.config, self.output)
        yield from ()


def _claim(config: Curation, files: list[InputFile], layout: Layout, overwrite: bool) -> None:
    """Another configuration's output is neither continued nor mixed with this one's."""
    plan = layout.work / "curation.json"
    inputs = [{"path": file.name, "bytes": file.size} for file in files]
    wanted = json.dumps(
        {"config": config.model_dump(mode="json", exclude=_FREE)
         | {"steps": [{type(step).__name__: step.model_dump(mode="json")} for step in config.steps]}, "inputs": inputs},
        indent=1,
    )  # fmt: skip
    begun = plan.read_text() if plan.is_file() else "" if layout.documents.exists() else wanted
    if begun != wanted:
        if not overwrite:
            raise UserError(
                f"{layout.output} holds the output of another configuration or of other inputs; use --overwrite to "
                f"replace it, or choose another output"
            )
        shutil.rmtree(layout.work, ignore_errors=True)
        shutil.rmtree(layout.documents, ignore_errors=True)
    layout.work.mkdir(parents=True, exist_ok=True)
    write_whole(plan, wanted)


# --- on a cluster ------------------------------------------------------------------------------------------


def _submit(config: Curation, phases: list[Phase], layout: Layout) -> None:
    assert config.slurm is not None
    before: SlurmPipelineExecutor | None = None
    site = config.slurm
    for phase in phases:
        before = SlurmPipelineExecutor(
            pipeline=phase.blocks,
            tasks=1 if phase.alone else config.tasks,
            time=site.time,
            partition=site.partition,
            cpus_per_task=site.cpus_per_task,
            mem_per_cpu_gb=site.mem_per_cpu_gb,
            workers=config.workers or -1,
            job_name=f"{config.name}-{phase.name}",
            qos="",
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
            sbatch_args=dict(site.sbatch),
            depends=before,
            logging_dir=str(layout.logs(phase.name)),
        )
    assert before is not None
    before.run()
