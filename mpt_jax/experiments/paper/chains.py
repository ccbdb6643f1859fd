"""The stages that produce a table: teachers, source stages, training jobs and their evaluations."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpt_jax.evaluation.finalize import ARTIFACT, TRAINED_BACKBONE
from mpt_jax.experiments import stages
from mpt_jax.experiments.paper import image_chains, variants
from mpt_jax.experiments.paper.suites import Length, Suite
from mpt_jax.experiments.paper.table import Table
from mpt_jax.experiments.paper.variants import Source, Variant
from mpt_jax.experiments.results import Result
from mpt_jax.experiments.stages import Run, Stage, quoted, target_bindings, target_runs
from mpt_jax.tasks import mixtures

FIRST_SEED = 42  # the gin files' seed; a stage for seed s binds 42 + s
NEXT_REPEAT = 1_000  # added for each repeat, more than the seeds of a table
LONGEST_NAME = 200  # characters of a folder's list of tasks; file systems allow 255


@dataclasses.dataclass(frozen=True)
class Cell:
    """A variant of a table, trained with one number of examples.

    Attributes:
        variant: The variant.
        shots: The number of training examples of each run; None for all.
        sources: The teachers and source stages that the jobs need, in the order to run.
        jobs: The training stages.
        tests: The stages that evaluate the jobs, or the backbone of a method without training.
        scored: The stages with the scores: tests, and jobs that evaluate themselves.
    """

    variant: Variant
    shots: int | None
    sources: tuple[Stage, ...]
    jobs: tuple[Stage, ...]
    tests: tuple[Stage, ...]
    scored: tuple[Stage, ...]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of the cell, in the order to run."""
        return (*self.sources, *self.jobs, *self.tests)

    def collect(self, root: Path, suite: Suite) -> Result:
        """Returns the result of a finished cell."""
        variant = self.variant
        found = stages.collect(
            root,
            variant.name,
            self.shots,
            self.jobs,
            self.scored,
            self.sources,
            suite.start_of(variant),
        )
        # Versions of a task share its column.
        scores = {x.removesuffix(variant.version): found.scores[x] for x in found.scores}
        return dataclasses.replace(found, scores=scores)


def cells(table: Table, suite: Suite, root: Path) -> list[Cell]:
    """Returns the cells of a table that `Table.on` adapted to `suite`; stages are below `root`."""
    suite.register()
    pairs = itertools.product(table.shots, table.variants)
    return [_cell(table, suite, root, variant, shots) for shots, variant in pairs]


def _cell(table: Table, suite: Suite, root: Path, variant: Variant, shots: int | None) -> Cell:
    if not variant.files:
        test = _untrained_test(table, suite, variant)
        return Cell(variant, shots, (), (), (test,), (test,))
    sources: dict[str, Stage] = {}
    jobs, tests, held_out = [], [], []
    source, own_source = variant.source, _has_own_source(table, variant)
    own_stages = own_source and source is not None and not source.draws
    single_seeds = [[seed] for seed in range(table.seeds)]
    for seeds in single_seeds if own_stages or variant.together else [sum(single_seeds, [])]:
        start = None
        if source is not None:
            if source.draws:
                chain = list(image_chains.chain(source, suite, table, root))
            else:
                chain = list(_chain(source, suite, root, seeds[0] if own_source else None))
            sources |= {stage.name: stage for stage in chain}
            start = _artifact(root, chain[-1])
        repeated = itertools.product(
            _jobs(table, suite, variant, shots, seeds), range(table.repeats)
        )
        for (runs, length), repeat in repeated:
            bindings = [
                *_bound(table, variant, suite, shots, runs, length, repeat),
                *length.bindings(),
            ]
            if start is not None:
                bindings.append(f"INITIAL_ARTIFACT = {start}")
            elif variant.model:  # the target stages on images start from an artifact by default
                bindings.append("INITIAL_ARTIFACT = None")
            files = (*variant.files, *suite.files)
            name = _name(table, variant, shots, runs, length, repeat)
            jobs.append(Stage(name, files, tuple(bindings), runs, length.steps))
            if suite.tested_apart:
                tests.append(_test(jobs[-1], suite, variant, length, root))
            if table.held_out:
                held_out.append(_held_out_test(table, suite, jobs[-1], variant, root))
    scored = [*(tests if suite.tested_apart else jobs), *held_out]
    parts = (sources.values(), jobs, [*tests, *held_out], scored)
    return Cell(variant, shots, *(tuple(part) for part in parts))


def _chain(source: Source, suite: Suite, root: Path, seed: int | None) -> Iterator[Stage]:
    """Yields a source stage, preceded by the stage that trains its teachers, which all seeds share.
    `seed` is None for a source stage that all seeds share."""
    bindings = list(source.bindings)
    steps, batch = source.length
    if suite.source_steps is not None:
        steps = suite.source_steps
    else:
        bindings.append(f"BATCH_SIZE = {batch}")
    bindings += _source_tasks(source, suite)
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
    table: Table, suite: Suite, variant: Variant, shots: int | None, seeds: Sequence[int]
) -> Iterator[tuple[tuple[Run, ...], Length]]:
    """Yields the runs and the training length of each job.

    By default, a job trains all runs of the same training length. If `variant.alone` is set, a job
    trains one run. If `variant.together` is set, a job trains the runs of one entry of
    `table.groups` for as many steps as separate runs would take in total. If `variant.joint` is
    set, a job trains the runs of one entry of `table.groups`, sorted by seed, for as many steps as
    the longest run.
    """
    fixed = table.full if shots is None else None
    if variant.together or variant.joint:
        for names in table.groups.values():
            tasks = [f"{suite.tasks[name]}{variant.version}" for name in names]
            lengths = [fixed or suite.length(suite.tasks[name], variant, shots) for name in names]
            steps = [length.steps for length in lengths]
            joint = lengths[0]._replace(
                steps=sum(steps) if variant.together else max(steps),
                inputs=max((x.inputs for x in lengths if x.inputs), default=None),
                period=max((x.period for x in lengths if x.period), default=None),
            )
            runs = _runs(table, tasks, seeds, shots)
            by_seed = tuple(sorted(runs, key=lambda run: run.seed))
            yield (runs if variant.together else by_seed), joint
        return
    by_length: dict[Length, list[str]] = {}
    for name in table.trained_tasks:
        task = suite.tasks[name]
        length = fixed or suite.length(task, variant, shots)
        by_length.setdefault(length, []).append(f"{task}{variant.version}")
    for length, tasks in by_length.items():
        runs = _runs(table, tasks, seeds, shots)
        for job in [(run,) for run in runs] if variant.alone else [runs]:
            yield job, length


def _runs(
    table: Table, tasks: Sequence[str], seeds: Sequence[int], shots: int | None
) -> tuple[Run, ...]:
    """Returns a run for every task and seed. Names contain the seed (`boolq_s0`) even if a job has
    only one, because a run's name determines the order of its examples."""
    runs = target_runs(tasks, seeds, shots, table.draws)
    return tuple(
        run if run.name != run.task else run._replace(name=f"{run.task}_s{run.seed}")
        for run in runs
    )


def _bound(
    table: Table,
    variant: Variant,
    suite: Suite,
    shots: int | None,
    runs: tuple[Run, ...],
    length: Length,
    repeat: int,
) -> list[str]:
    """Returns the bindings of a training job that depend on its runs and its variant."""
    rows = length.rows if not variant.together else length.rows / len(runs)
    run_groups = [run.seed for run in runs] if variant.joint else "independent"
    groups = "joint" if variant.together else run_groups
    bindings = target_bindings(runs, rows, groups)
    seed = FIRST_SEED + NEXT_REPEAT * repeat + (runs[0].seed if variant.together else 0)
    if seed != FIRST_SEED or variant.together:
        bindings.append(f"RANDOM_SEED = {seed}")
    if variant.source is not None and variant.source.draws:
        bindings += image_chains.start_from(variant, suite, table, runs)
    elif start := suite.start_of(variant):
        bindings.append(f"START_FROM = {quoted(start)}")
    return [
        *bindings,
        *suite.rate_bindings(variant, shots, length.steps),
        *_settings(variant, suite),
    ]


def _settings(variant: Variant, suite: Suite) -> list[str]:
    """Returns the bindings of a variant that training and evaluation share."""
    source = variant.source
    # Methods that start from the teachers may mix them, by the names of their tasks.
    named = _source_tasks(source, suite) if source is not None and source.is_teachers else []
    return [*named, *variant.bindings]


def _source_tasks(source: Source, suite: Suite) -> list[str]:
    """Returns the binding of the names of a stage's source tasks, if the suite has versions of
    them."""
    if not suite.suffix:
        return []
    names = mixtures.SOURCE_6 + (mixtures.EXTRA_SOURCES if source.tasks == 12 else ())
    return [f"SOURCE_TASKS = {quoted([suite.named(name) for name in names])}"]


def _name(
    table: Table,
    variant: Variant,
    shots: int | None,
    runs: Sequence[Run],
    length: Length,
    repeat: int,
) -> str:
    """Returns a job's folder. Only equal jobs have equal names, so that tables can share jobs."""
    tasks = "-".join(dict.fromkeys(run.task for run in runs))
    if len(tasks) > LONGEST_NAME:
        tasks = f"tasks_{hashlib.sha256(tasks.encode()).hexdigest()[:12]}"
    seeds = sorted({run.seed for run in runs})
    span = f"s{seeds[0]}" if len(seeds) == 1 else f"s{seeds[0]}-{seeds[-1]}"
    parts = [
        f"{variant.folder}/{'all' if shots is None else f'k{shots}'}/{tasks}_{span}",
        "_own_source" if _has_own_source(table, variant) else "",
        condition(table) if shots is not None else "",
        f"_repeat{repeat}" if repeat else "",
        f"_{length.steps}x{length.rows}" if shots is None and table.full else "",
    ]
    return "".join(parts)


def _has_own_source(table: Table, variant: Variant) -> bool:
    """Whether each seed of a variant has a separate source stage. Teachers are the same for all
    seeds, also where targets start from them."""
    source = variant.source
    return table.source_per_seed and source is not None and not source.is_teachers


def condition(table: Table) -> str:
    """Returns what folders of few-shot jobs, and of the table, add for the draws of examples."""
    return "_balanced" * table.draws.balanced + "_few_dev" * table.draws.few_dev


def _test(job: Stage, suite: Suite, variant: Variant, length: Length, root: Path) -> Stage:
    """Returns a stage that evaluates a job's artifact (each run's best step) or trained backbone on
    the test split."""
    kept = [b for b in job.bindings if b.startswith(("TARGET_TASKS", "RUN_NAMES", "GROUPS"))]
    bindings = (
        *kept,
        *_settings(variant, suite),
        *length.reading(),
        f"INITIAL_CHECKPOINT_PATH = {quoted(str(root / job.name / TRAINED_BACKBONE))}"
        if variant.alone
        else f"INITIAL_ARTIFACT = {_artifact(root, job)}",
    )
    return _evaluation(f"{job.name}/test", suite, variant, bindings, job.runs)


def _untrained_test(table: Table, suite: Suite, variant: Variant) -> Stage:
    """Returns a stage that evaluates a method without training on the test split. Its scores count
    for every seed."""
    tasks = quoted([suite.tasks[name] for name in table.tasks])
    bindings = (f"TARGET_TASKS = {tasks}", f"RUN_NAMES = {tasks}", *_settings(variant, suite))
    pairs = itertools.product((suite.tasks[name] for name in table.tasks), range(table.seeds))
    runs = tuple(Run(task, seed, task) for task, seed in pairs)
    return _evaluation(f"{variant.folder}/{table.name}", suite, variant, bindings, runs)


def _held_out_test(table: Table, suite: Suite, job: Stage, variant: Variant, root: Path) -> Stage:
    """Returns a stage that evaluates the prompts of a job's runs on the held-out tasks, that is, on
    other classes of the same data."""
    held_out = {suite.tasks[base]: suite.tasks[new] for new, base in table.held_out.items()}
    pairs = [(Run(held_out[x.task], x.seed, f"{held_out[x.task]}_s{x.seed}"), x) for x in job.runs]
    runs = tuple(run for run, _ in pairs)
    bindings = (
        f"TARGET_TASKS = {quoted([run.task for run in runs])}",
        f"RUN_NAMES = {quoted([run.name for run in runs])}",
        'GROUPS = "independent"',
        *_settings(variant, suite),
        f"INITIAL_ARTIFACT = {_artifact(root, job)}",
        f"START_FROM = {quoted({run.name: trained.name for run, trained in pairs})}",
    )
    return _evaluation(f"{job.name}/held_out", suite, variant, bindings, runs)


def _evaluation(
    name: str,
    suite: Suite,
    variant: Variant,
    bindings: Sequence[str],
    runs: tuple[Run, ...],
) -> Stage:
    """Returns a stage that evaluates runs on the test split."""
    sized = (variants.ablation(f"size_{variant.size}"),) if variant.size != "base" else ()
    model = (variant.model,) if variant.model else ()
    files = ("gin/eval.gin", *model, variant.method, *sized, *suite.test_files)
    split = 'utils.DatasetConfig.split = "test"'
    return Stage(name, files, (*bindings, split), runs, entry="eval")


def _artifact(root: Path, stage: Stage) -> str:
    """Returns the path of a stage's artifact as a gin string."""
    return quoted(str(root / stage.name / ARTIFACT))
