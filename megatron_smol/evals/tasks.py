"""lm-eval's tasks, loaded from the hub or from local files, and every gold answer checked before anything runs.

lm-eval counts a question without a usable gold answer as wrong and goes on; here it is an error that names the
question. Importing this module imports lm-eval and datasets, which read the offline variables at that moment.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from jinja2 import meta
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as jinja_environment

from megatron_smol.data.files import sha256_file
from megatron_smol.errors import DataError, UserError
from megatron_smol.evals.local import local_files
from megatron_smol.evals.suites import OURS, Item, suite_names

# The parts of lm-eval that the suites use; indexing all of its 14,000 tasks takes some seconds.
_SUITES_OWN = ("arc", "piqa", "openbookqa", "ifeval")
_NO_DATA = (OSError, datasets.exceptions.DatasetsError)


@dataclass(frozen=True)
class Question:
    """A loaded task. definition and data: hashes or names that fix what is asked; limit: in questions."""

    label: str
    task: Any  # lm-eval's Task
    definition: str
    data: str
    metric: str | None
    limit: int | None

    @property
    def count(self) -> int:
        return min(len(self.task.eval_docs), self.limit or len(self.task.eval_docs))


def load_tasks(items: list[Item], data_dir: Path | None) -> list[Question]:
    """Read the data of every task and check its golds; a group of lm-eval's is all of its tasks.

    All names are looked up before any data is read.
    """
    manager = _manager([item.name for item in items])
    leaves = [
        (item, name, overrides)
        for item in items
        for name, overrides in _leaves(manager, _indexed_name(manager, item.name), {})
    ]
    return [_load(manager, item, name, overrides, data_dir) for item, name, overrides in leaves]


def _load(
    manager: TaskManager, item: Item, name: str, overrides: dict[str, Any], data_dir: Path | None
) -> Question:
    label = name
    if item.subset:
        label, overrides = item.label, overrides | {"dataset_name": item.subset}
    config = dict(manager.task_index[name].cfg or {}) | overrides
    if data_dir is None:
        data = "/".join(filter(None, [config.get("dataset_path"), config.get("dataset_name")]))
    else:
        local = local_files(data_dir, label, config)
        overrides = overrides | local.overrides
        data = "sha256:" + ",".join(sha256_file(path)[:16] for path in local.files)
    config |= overrides
    task = _build(manager, name, label, overrides, config)
    task.config.task = label
    _require_golds(task, label, item.limit)
    return Question(label, task, _definition(task), data, item.metric, item.limit)


def _build(
    manager: TaskManager, name: str, label: str, overrides: dict[str, Any], config: dict[str, Any]
) -> Any:
    """lm-eval's Task. It reads the data and tries the first question at once, so both can fail here."""
    # A group of one is lm-eval's public way to load a task with other settings than its YAML's.
    group = {"group": "megatron_smol", "task": [{"task": name, **overrides}]}
    try:
        (task,) = manager.load([group])["tasks"].values()
    except _NO_DATA as error:
        raise DataError(_no_data(label, config, error)) from error
    except ImportError as error:
        raise UserError(
            f"task {label} needs a package that is not installed: {error}; pip install 'lm-eval[{name}]'"
        ) from error
    except Exception as error:  # templates fail in every way that Python knows
        raise DataError(f"task {label}, question 1: {_why(config, _first_row(config), error)}") from error
    return task


def _no_data(label: str, config: dict[str, Any], error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    cause = error.__cause__ or error.__context__
    if config.get("dataset_path") in ("json", "parquet"):
        reason = f": {(str(cause).splitlines() or [''])[0]}" if cause and str(cause) else ""
        return f"task {label}: its local data cannot be read: {text}{reason}"
    return (
        f"task {label}: its data {config.get('dataset_path')} could not be fetched from the hub ({text}); go "
        "online, or put the data into a folder and name it with --data-dir"
    )


# --- names -------------------------------------------------------------------------------------------------


def _manager(names: list[str]) -> TaskManager:
    installed = Path(lm_eval.tasks.__file__).parent
    files = [str(Path(name).expanduser().resolve().parent) for name in names if _is_file(name)]
    few = [str(OURS), *(str(installed / part) for part in _SUITES_OWN), *files]
    manager = TaskManager(include_path=few, include_defaults=False)
    if all(_is_file(name) or name in manager.task_index for name in names):
        return manager
    print("looking through all of lm-eval's tasks (some seconds)", file=sys.stderr, flush=True)
    return TaskManager(include_path=[str(OURS), *files])


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _indexed_name(manager: TaskManager, name: str) -> str:
    """The name under which lm-eval knows a task, which may be given by its YAML file."""
    if not _is_file(name):
        if name in manager.task_index:
            return name
        close = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
        suite = " (it is a suite: --suite)" if name in suite_names() else ""
        hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists lm-eval's"
        raise UserError(f"there is no task '{name}'{suite}; {hint}")
    path = Path(name).expanduser().resolve()
    found = [key for key, entry in manager.task_index.items() if entry.yaml_path == path]
    if not found:
        raise UserError(f"{name} is not the YAML file of an lm-eval task (it needs 'task:')")
    return found[0]


def _leaves(manager: TaskManager, name: str, overrides: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A task as it is; a group or tag as its tasks, each with what the group changes in it."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        return [leaf for member in sorted(entry.tags) for leaf in _leaves(manager, member, overrides)]
    if entry.kind.name != "GROUP":
        return [(name, overrides)]
    return _members(manager, name, (entry.cfg or {}).get("task", []), overrides)


def _members(
    manager: TaskManager, group: str, members: list[Any], overrides: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    leaves = []
    for member in members:
        own = dict(member) if isinstance(member, dict) else {"task": member}
        inner = own.pop("group", None) or own.pop("task")
        if isinstance(own.get("task"), list):  # a group written inside a group
            leaves += _members(manager, group, own["task"], overrides)
        elif inner in manager.task_index:
            leaves += _leaves(manager, inner, overrides | own)
        else:
            raise UserError(
                f"group '{group}' defines task '{inner}' in place; give that task a YAML file of its own"
            )
    return leaves


# --- golds -------------------------------------------------------------------------------------------------


def _require_golds(task: Any, label: str, limit: int | None) -> None:
    if callable(task.config.process_results):
        return  # the task judges answers by a program of its own
    docs = task.eval_docs
    for index in range(min(len(docs), limit or len(docs))):
        doc = docs[index]
        try:
            problem = _gold_problem(task, doc)
        except Exception as error:  # see _build
            problem = _why(task.config, doc, error)
        if problem:
            raise DataError(
                f"task {label}, question {index + 1} of {len(docs)}: {problem}; give every question its gold "
                "answer, or leave that row out"
            )


def _gold_problem(task: Any, doc: dict[str, Any]) -> str | None:
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    golds = gold if isinstance(gold, list) else [gold]
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        good = [g in choices if isinstance(g, str) else 0 <= g < len(choices) for g in golds]
        return (
            None
            if good and all(good)
            else _why(task.config, doc, f"{gold!r} is none of its {len(choices)} choices")
        )
    empty = not golds or any(g is None or str(g).strip() in ("", "None") for g in golds)
    return _why(task.config, doc, "it is empty") if empty else None


def _why(config: Any, doc: dict[str, Any], reason: object) -> str:
    """What is wrong with a row: its empty or missing fields among those that the gold is made of, else `reason`."""
    used = _fields(config["doc_to_target"], doc)
    empty = [name for name in used if name not in doc or doc[name] is None or doc[name] in ("", [])]
    if empty:
        return f"no gold answer ({', '.join(empty)} is empty or missing)"
    return f"no gold answer ({reason})"


def _fields(template: object, doc: dict[str, Any]) -> list[str]:
    if not isinstance(template, str):
        return sorted(doc)
    if template in doc or template.isidentifier():
        return [template]
    return sorted(meta.find_undeclared_variables(jinja_environment.parse(template)))


def _first_row(config: dict[str, Any]) -> dict[str, Any]:
    split = config.get("test_split") or config.get("validation_split")
    rows = datasets.load_dataset(
        config["dataset_path"], config.get("dataset_name"), **(config.get("dataset_kwargs") or {})
    )
    row: dict[str, Any] = rows[split][0]
    return row


def _definition(task: Any) -> str:
    """A hash of everything in the task's YAML that decides prompts and scores; the data has its own."""
    config = task.config.to_dict()
    for key in ("dataset_path", "dataset_name", "dataset_kwargs", "metadata", "training_split", "task"):
        config.pop(key, None)
    named = json.dumps(
        config, sort_keys=True, default=lambda value: getattr(value, "__qualname__", str(type(value)))
    )
    return hashlib.sha256(named.encode()).hexdigest()[:16]
