"""Report of one MODEL_DIR: scores, confusion matrices, attention of lanes, losses, settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mpt_jax.experiments.report import confusion, figures, page, run_reader, run_sections
from mpt_jax.experiments.report.figures import Line, Panel, Style
from mpt_jax.experiments.report.page import Section
from mpt_jax.experiments.results import main_metric

CONFIG = "config.gin"
# A figure of more curves shows only their mean, because there are no more styles.
MOST_CURVES = len(figures.MARKERS) * len(figures.DASHES)


def is_run(folder: Path) -> bool:
    """Whether a folder is the MODEL_DIR of a job."""
    return (folder / run_reader.RECORD).is_file() or (folder / run_reader.METRICS).is_file()


def write(model_dir: Path, out: Path, images: int = 0) -> Path:
    """Writes the report of a MODEL_DIR and returns its path.

    Args:
        model_dir: The MODEL_DIR.
        out: The output file.
        images: The number of images to show with the attention of lanes; with 0, no backbone and
            no data are read.

    Raises:
        ValueError: a file of the folder is damaged, or the images cannot be shown
            (`lane_job.seen_images`).
    """
    notes: list[str] = []
    sections = {
        "Scores": _scores(model_dir),
        "Confusion matrices": confusion.of_model_dir(model_dir, notes),
        "Attention of lanes": _pictures(model_dir, images) if images else [],
        "Loss": _losses(model_dir),
        "Settings": _settings(model_dir),
    }
    expected = [title for title in ("Scores", "Loss", "Settings") if not sections[title]]
    absent = [f"{title}: not recorded in {model_dir}." for title in expected] + notes
    shown = [Section(title, found) for title, found in sections.items() if found]
    if absent:
        shown.append(Section("What is not shown", [page.points(absent)]))
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"Run: {model_dir.resolve().name}"
    out.write_text(page.document(title, shown), encoding="utf-8")
    return out


def _pictures(model_dir: Path, images: int) -> list[str]:
    """Returns pictures of the attention of lanes; errors are ValueErrors without gin's notes."""
    # They import TensorFlow, which takes seconds and only this section needs.
    from mpt_jax.config import gin_utils
    from mpt_jax.experiments.report import lane_pictures

    try:
        return lane_pictures.sections(model_dir, images)
    except (ValueError, OSError) as error:
        raise ValueError(gin_utils.message(error)) from error


def _scores(model_dir: Path) -> list[str]:
    """Returns a figure of each run's main metric by step, and a table of all metrics of its last
    evaluation; [] if no run was evaluated."""
    found = {run: steps for run, steps in run_reader.evaluations(model_dir).items() if steps}
    if not found:
        return []
    curves, rows = {}, []
    metrics = list(
        dict.fromkeys(
            name for steps in found.values() for scores in steps.values() for name in scores
        )
    )
    for run, steps in found.items():
        main = main_metric(next(iter(steps.values())))
        curves[f"{run} ({main})"] = {step: scores[main] for step, scores in steps.items()}
        last = max(steps)
        values = [f"{steps[last][m]:.1f}" if m in steps[last] else "" for m in metrics]
        rows.append([run, f"{last:,}", *values])
    blocks = [_figure(curves, "Main metric by step", "score", "")]
    name = "Last evaluation"
    return [*blocks, page.heading(name), page.table([["", "step", *metrics], *rows], name)]


def _losses(model_dir: Path) -> list[str]:
    """Returns a figure of the runs' training losses by step (of many runs, the mean); [] if no
    losses were recorded."""
    curves = {
        name.removeprefix("loss/"): curve
        for name, curve in run_reader.curves(model_dir).items()
        if curve
    }
    unit = run_sections.loss_unit([model_dir])
    return [_figure(curves, "Training loss by step", unit, "y")] if curves else []


def _figure(curves: Mapping[str, run_reader.Curve], title: str, y: str, log: str) -> str:
    caption = f"{title}, one curve for each run."
    if len(curves) > MOST_CURVES:
        caption = f"{title}, mean over {len(curves)} runs."
        steps = sorted({step for curve in curves.values() for step in curve})
        at = {step: [c[step] for c in curves.values() if step in c] for step in steps}
        curves = {"mean": {step: sum(values) / len(values) for step, values in at.items()}}
    looks, series = {}, []
    for number, (name, curve) in enumerate(curves.items()):
        looks[name] = Style(
            figures.SERIES.format(number % figures.COLORS + 1),
            figures.MARKERS[number % len(figures.MARKERS)],
            figures.DASHES[number % len(figures.DASHES)],
        )
        series.append(Line(looks[name], list(curve), list(curve.values())))
    ends = ", ".join(f"{name} {list(curve.values())[-1]:.3g}" for name, curve in curves.items())
    panel = Panel(title, "step", y, f"{title}. At the last step: {ends}.", log=log)
    legend = {name: figures.swatch(look) for name, look in looks.items()}
    return page.figure([figures.lines(panel, series)], caption, legend)


def _settings(model_dir: Path) -> list[str]:
    """Returns the record of the job's last start and its gin configuration; [] if there is none."""
    blocks = []
    if records := run_reader.records(model_dir):
        record, pairs = records[-1], {"Folder": str(model_dir), "Starts": str(len(records))}
        shown = {"Command": "command", "Started": "started", "Steps": "total_steps"}
        shown |= {"Parameters": "parameters", "Trainable parameters": "trainable_parameters"}
        for name, key in {**shown, **run_sections.FACTS}.items():
            pairs[name] = run_sections.in_words(record.get(key))
        blocks.append(page.facts(pairs))
    if (model_dir / CONFIG).is_file():
        text = (model_dir / CONFIG).read_text(encoding="utf-8")
        blocks.append(page.listing(text, f"{CONFIG}, all settings of the job"))
    return blocks
