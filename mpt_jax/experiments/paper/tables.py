"""Tables of the paper: which arms, tasks, examples and seeds; and the stages that make one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpt_jax.core.runs import unknown_name
from mpt_jax.evaluation.finalize import ARTIFACT
from mpt_jax.experiments.paper import suites, variants
from mpt_jax.experiments.paper.suites import Length, Suite
from mpt_jax.experiments.paper.variants import Arm, Source
from mpt_jax.experiments.stages import Run, Stage, quoted, target_bindings, target_runs
from mpt_jax.tasks import mixtures

Groups = Mapping[str, Sequence[str]]
FIRST_SEED = 42  # of the gin files; seed s of a table is this plus s, where a stage has its own


@dataclasses.dataclass(frozen=True)
class Table:
    """A table or figure.

    Attributes:
        name: of the command, and of its figures in published.toml.
        title: for people.
        arms: its rows.
        groups: name of an average -> the tasks that it is over, by the paper's names.
        metrics: task -> what is shown of it, each in a column of its own and without averages;
            otherwise its main metric.
        shots: numbers of training examples; None for all.
        seeds: how many draws.
        reference: the arm that others are subtracted from; None for MPT, or the first where MPT is
            none of them.
        full: how long a run trains on all examples, if not as long as the suite has it.
        source_per_seed: trains a source stage for each seed, so that what is compared between
            source stages does not rest on one of each.
        toy: what is different on the toy suite, by attribute.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    groups: Groups
    shots: tuple[int | None, ...] = (None,)
    seeds: int = 3
    reference: str | None = None
    full: Length | None = None
    source_per_seed: bool = False
    metrics: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    toy: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def on(self, suite: Suite) -> Table:
        """The table as the suite can have it: its changes made, tasks without a counterpart out.

        Raises:
            ValueError: no task is left.
        """
        table = (
            dataclasses.replace(self, **dict(self.toy)) if suite.name == suites.TOY.name else self
        )
        groups = {
            name: tuple(task for task in tasks if task in suite.tasks)
            for name, tasks in table.groups.items()
        }
        groups = {name: tasks for name, tasks in groups.items() if tasks}
        if not groups:
            raise ValueError(
                f"The {suite.name} suite has no counterpart of any task of {self.name}."
            )
        if not table.arms:
            raise ValueError(f"The {suite.name} suite has one T5 only, so it has no {self.name}.")
        return dataclasses.replace(table, groups=groups)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The paper's names of the tasks, each once."""
        return tuple(dict.fromkeys(task for tasks in self.groups.values() for task in tasks))

    @property
    def columns(self) -> tuple[str, ...]:
        """What is shown: tasks, or `'<task> <metric>'`."""
        if not self.metrics:
            return self.tasks
        return tuple(f"{task} {metric}" for task in self.tasks for metric in self.metrics[task])

    @property
    def averages(self) -> Groups:
        """The averages that are shown."""
        return {} if self.metrics else self.groups


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm at one number of examples.

    Attributes:
        arm, shots: which.
        sources: the source stages it needs, in order.
        jobs: its training stages.
        tests: the stages that score them; () where the jobs do.
    """

    arm: Arm
    shots: int | None
    sources: tuple[Stage, ...]
    jobs: tuple[Stage, ...]
    tests: tuple[Stage, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All of them, in the order to run."""
        return (*self.sources, *self.jobs, *self.tests)


def cells(table: Table, suite: Suite, root: Path) -> list[Cell]:
    """Every cell of a table that `Table.on` has fitted to a suite; `root` is where stages lie."""
    suite.register()
    return [_cell(table, suite, root, arm, shots) for shots in table.shots for arm in table.arms]


def _cell(table: Table, suite: Suite, root: Path, arm: Arm, shots: int | None) -> Cell:
    sources: dict[str, Stage] = {}
    jobs, tests = [], []
    own_source = table.source_per_seed and arm.source is not None and arm.start is None
    each = [[seed] for seed in range(table.seeds)]
    for seeds in each if own_source or arm.together else [sum(each, [])]:
        start = None
        if arm.source is not None:
            chain = list(_chain(arm.source, suite, root, seeds[0] if own_source else None))
            sources |= {stage.name: stage for stage in chain}
            start = _artifact(root, chain[-1])
        for runs, length in _jobs(table, suite, arm, shots, seeds):
            bindings = [*_bound(arm, suite, shots, runs, length), *length.bindings()]
            if start is not None:
                bindings.append(f"INITIAL_ARTIFACT = {start}")
            files = (*arm.files, *suite.files)
            name = _name(arm, shots, runs, own_source)
            if shots is None and table.full:
                name += f"_{length.steps}x{length.rows}"
            jobs.append(Stage(name, files, tuple(bindings), runs, length.steps))
            if suite.tested_apart:
                tests.append(_test(jobs[-1], suite, arm, length, root))
    return Cell(arm, shots, tuple(sources.values()), tuple(jobs), tuple(tests))


def _chain(source: Source, suite: Suite, root: Path, seed: int | None) -> Iterator[Stage]:
    """A source stage after the teachers it needs; teachers serve all seeds."""
    bindings = list(source.bindings)
    steps, batch = source.length
    if suite.source_steps is not None:
        steps = suite.source_steps
    else:
        bindings.append(f"BATCH_SIZE = {batch}")
    if suite.suffix:
        names = mixtures.SOURCE_6 + (mixtures.EXTRA_SOURCES if source.tasks == 12 else ())
        bindings.append(f"SOURCE_TASKS = {quoted([suite.named(name) for name in names])}")
    if source.teachers is not None:
        *_, teachers = chain = list(_chain(source.teachers, suite, root, None))
        yield from chain
        bindings.append(f"TEACHERS = {_artifact(root, teachers)}")
    name = source.name
    if seed is not None:
        bindings.append(f"RANDOM_SEED = {FIRST_SEED + seed}")
        name += f"_s{seed}"
    yield Stage(name, (*source.files, *suite.files), tuple(bindings), steps=steps)


def _jobs(
    table: Table, suite: Suite, arm: Arm, shots: int | None, seeds: Sequence[int]
) -> Iterator[tuple[tuple[Run, ...], Length]]:
    """The runs that train together: those of one length; for `together`, those of one group, which
    sees as many examples in all as its tasks do alone; for `joint`, all, each as long as the
    longest, and those of one seed after another."""
    given = table.full if shots is None else None
    if arm.together or arm.joint:
        for names in table.groups.values():
            tasks = [f"{suite.tasks[name]}{arm.version}" for name in names]
            lengths = [given or suite.length(suite.tasks[name], arm, shots) for name in names]
            steps = [length.steps for length in lengths]
            joint = lengths[0]._replace(
                steps=sum(steps) if arm.together else max(steps),
                inputs=max((x.inputs for x in lengths if x.inputs), default=None),
                period=max((x.period for x in lengths if x.period), default=None),
            )
            runs = target_runs(tasks, seeds, shots)
            if arm.together:
                yield _repeats(runs), joint
            else:
                yield tuple(sorted(runs, key=lambda run: run.seed)), joint
        return
    by_length: dict[Length, list[str]] = {}
    for name in table.tasks:
        task = suite.tasks[name]
        length = given or suite.length(task, arm, shots)
        by_length.setdefault(length, []).append(f"{task}{arm.version}")
    for length, tasks in by_length.items():
        yield target_runs(tasks, seeds, shots), length


def _repeats(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Runs under the names of repeats, also where one seed would go by the task's own name."""
    named = [run.name if run.name != run.task else f"{run.task}_s{run.seed}" for run in runs]
    return tuple(run._replace(name=name) for run, name in zip(runs, named, strict=True))


def _bound(
    arm: Arm, suite: Suite, shots: int | None, runs: tuple[Run, ...], length: Length
) -> list[str]:
    """What a training job binds for its runs and its arm."""
    rows = length.rows if not arm.together else length.rows / len(runs)
    groups = "joint" if arm.together else [run.seed for run in runs] if arm.joint else "independent"
    bindings = target_bindings(runs, rows, groups)
    if arm.together:
        bindings.append(f"RANDOM_SEED = {FIRST_SEED + runs[0].seed}")
    if arm.start is not None:
        bindings.append(f"START_FROM = {quoted(suite.sources[arm.start])}")
    return [*bindings, *suite.rate_bindings(arm, shots, length.steps), *_settings(arm, suite)]


def _settings(arm: Arm, suite: Suite) -> list[str]:
    """What sets an arm apart, of a stage that trains and of one that evaluates."""
    if arm.sources is None:
        return list(arm.bindings)
    return [*arm.bindings, f"SOURCES = {quoted(list(suite.sources.values())[: arm.sources])}"]


def _name(arm: Arm, shots: int | None, runs: Sequence[Run], own_source: bool) -> str:
    """A job's folder. It says all that tells jobs of an arm apart, so that tables share them."""
    tasks = "-".join(dict.fromkeys(run.task for run in runs))
    seeds = sorted({run.seed for run in runs})
    span = f"s{seeds[0]}" if len(seeds) == 1 else f"s{seeds[0]}-{seeds[-1]}"
    own = "_own_source" if own_source else ""
    return f"{arm.folder}/{'all' if shots is None else f'k{shots}'}/{tasks}_{span}{own}"


def _test(job: Stage, suite: Suite, arm: Arm, length: Length, root: Path) -> Stage:
    """Scores a job's artifact, which holds the best step of each run, on the test split."""
    kept = [b for b in job.bindings if b.startswith(("TARGET_TASKS", "RUN_NAMES", "GROUPS"))]
    bindings = (
        *kept,
        *_settings(arm, suite),
        *length.reading(),
        f"INITIAL_ARTIFACT = {_artifact(root, job)}",
        'utils.DatasetConfig.split = "test"',
    )
    sized = (variants.ablation(f"size_{arm.size}"),) if arm.size != "base" else ()
    files = ("gin/eval.gin", arm.method, *sized, *suite.test_files)
    return Stage(f"{job.name}/test", files, bindings, job.runs, entry="eval")


def _artifact(root: Path, stage: Stage) -> str:
    """What a stage hands on, as gin reads it."""
    return quoted(str(root / stage.name / ARTIFACT))


# --- The tables ----------------------------------------------------------------------------------

_BOTH = {"GLUE": suites.GLUE, "SuperGLUE": suites.SUPER_GLUE}
_FEW = (4, 16, 32)
# On the toy suite every target task but the two that chose learning rates.
_TOY_TARGETS = {"toy targets": ("BoolQ", "CB", "RTE", "MRPC", "SciTail")}
_TOY_ABLATION = {"groups": _TOY_TARGETS, "shots": (32,), "seeds": 10, "source_per_seed": True}
_METHODS = (variants.PT, variants.SPOT, variants.MPT_ARM)
_ONE_PASS = {"shots": (*_FEW, None), "full": Length(steps=500, rows=4)}  # over 2,000 examples
_FOUR = {"toy targets": ("BoolQ", "CB", "RTE", "MRPC")}


def _crosspt(name: str, title: str, rows: tuple[Arm, ...], **rest: Any) -> Table:
    """A table of tasks that learn together: GLUE's, or the four of the demo."""
    rest = {"shots": (32,)} | rest
    toy = {"groups": _FOUR} | dict(rest.pop("toy", {}))
    return Table(name, title, rows, {"GLUE": suites.GLUE}, seeds=10, toy=toy, **rest)


TABLES = {
    table.name: table
    for table in (
        Table(
            "table1",
            "GLUE and SuperGLUE, all training examples",
            (
                variants.PT,
                variants.PT_STRONG,
                variants.SPOT,
                variants.MPT_ARM,
                variants.MPT_TOGETHER,
            ),
            _BOTH,
            toy={"arms": (*_METHODS, variants.MPT_TOGETHER)},
        ),
        Table(
            "table2",
            "MRQA and others, all training examples",
            (variants.PT, variants.PT_STRONG, variants.SPOT, variants.MPT_ARM, variants.MPT_12),
            {"MRQA": suites.MRQA, "Others": suites.OTHERS},
            toy={"arms": _METHODS},
        ),
        Table(
            "table3",
            "BoolQ, CB and SciTail, few training examples",
            _METHODS,
            {"mean": ("BoolQ", "CB", "SciTail")},
            shots=_FEW,
            seeds=10,
        ),
        Table(
            "table4",
            "GLUE and SuperGLUE, few training examples",
            (variants.PT, variants.MPT_ARM),
            _BOTH,
            shots=_FEW,
            seeds=10,
        ),
        Table(
            "table5",
            "Text generation, T5-large",
            variants.SIZES["large"],
            {"NLG": ("E2E", "WebNLG")},
            metrics={
                "E2E": ("bleu", "nist", "meteor_exact_stem", "rouge_l", "cider_d"),
                "WebNLG": ("bleu", "meteor_exact_stem", "ter"),
            },
            toy={
                "arms": (variants.PT, variants.MPT_ARM),
                "metrics": {"E2E": ("f1", "exact_match")},
            },
        ),
        Table(
            "ablations",
            "What the parts do",
            (
                *(*variants.COMPONENTS, variants.MPT_ARM),
                *(*variants.LOSSES, *variants.SAMPLING, *variants.TARGETS, *variants.RANKS),
            ),
            {"SuperGLUE": suites.SUPER_GLUE},
            toy=_TOY_ABLATION,
        ),
        Table(
            "scaling",
            "Sizes of T5",
            (
                variants.PT,
                variants.MPT_ARM,
                *(arm for pair in variants.SIZES.values() for arm in pair),
            ),
            {"mean": ("WiC", "MultiRC", "BoolQ")},
            toy={"arms": ()},
        ),
        Table(
            "transfer",
            "Which source helps which target (ours, not the paper's)",
            (variants.PT, *variants.FROM_SOURCES),
            _BOTH,
            shots=(32,),
            toy={"groups": _TOY_TARGETS},
        ),
        _crosspt(
            "crosspt",
            "Mixed prompts beside others, few training examples",
            (
                variants.PT,
                variants.SPOT,
                variants.ATTEMPT_ARM,
                variants.MPT_ARM,
                variants.CROSSPT_ARM,
            ),
            shots=_FEW,
            reference="CrossPT",
            toy=_ONE_PASS,
        ),
        _crosspt(
            "crosspt_factors",
            "What the parts of CrossPT do",
            (variants.CROSSPT_ARM, *variants.CROSSPT_FACTORS),
        ),
        _crosspt(
            "crosspt_starts",
            "Where CrossPT's sources start, by the number of examples",
            (variants.CROSSPT_ARM, *variants.CROSSPT_STARTS),
            shots=_FEW,
            toy=_ONE_PASS,
        ),
        _crosspt(
            "crosspt_labels",
            "CrossPT with and without a prefix, and with other labels",
            (variants.CROSSPT_ARM, *variants.CROSSPT_LABELS),
            toy={"arms": (variants.CROSSPT_ARM, *variants.CROSSPT_TOY_LABELS)},
        ),
        Table(
            "length",
            "Prompt length",
            (
                variants.PT,
                *(a for p in (200, 300, 400) for a in variants.LENGTHS[p]),
                variants.MPT_ARM,
            ),
            {"SuperGLUE": suites.SUPER_GLUE},
            toy={
                **_TOY_ABLATION,
                "arms": (variants.PT, variants.MPT_ARM)
                + tuple(arm for length in (5, 10, 40) for arm in variants.LENGTHS[length]),
            },
        ),
    )
}


def find(name: str) -> Table:
    """The table of a name.

    Raises:
        ValueError: there is none; lists the known ones.
    """
    if name not in TABLES:
        raise ValueError(unknown_name("table", name, list(TABLES)))
    return TABLES[name]
