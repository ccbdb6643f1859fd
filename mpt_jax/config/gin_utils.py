"""Gin files and command lines: search paths, parsing, error messages and entry points.

    python -m mpt_jax.train --gin_file=gin/mpt_source.gin --gin_file=gin/tiny.gin --gin.BATCH_SIZE=8

The flags are T5X's. Gin files are plain T5X gin with dynamic registration: library modules carry
no gin decorators, a file binds what it imports, and only what a file refers to is configured.

Bindings on the command line see the imports of the gin files before them:

    --gin.INIT_FACTORS=@init.signs
    --gin.SAMPLER='@sampling.PerExample()'

T5X's trainer parses the command line without these imports, so it does not know a name that no file
refers to. Put such a binding in a gin file that imports the module.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging as stdlib_logging
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gin
import jax
from absl import app, flags, logging
from etils import epath

import mpt_jax
from mpt_jax.config import binding_types, command_help, gin_check, gin_errors, trainer_choice
from mpt_jax.runtime import devices, distributed, paths, preemption, storage_check

PACKAGE = Path(mpt_jax.__file__).parent
OURS = (PACKAGE, paths.SHIPPED.parent)  # this library and its task suites


class ConfigError(ValueError):
    """Error for a mistake in gin files or on the command line, with a message for the user."""


# --- Parsing -------------------------------------------------------------------------------------


def search_paths(first: Sequence[str] = (os.curdir,)) -> list[str]:
    """Returns the folders that are searched for gin files, in order: `first` (--gin_search_paths),
    MPT_JAX_ROOT, this library's gin files, and its copies of T5X's run files."""
    return [*first, paths.root(), *map(str, _shipped())]


def _shipped() -> list[Path]:
    """Returns the folder that contains `gin/`, and the folder of the copies of T5X's run files."""
    return [trainer_choice.gin_folder(), trainer_choice.FOLDER / "gin_data"]


def parse(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    gin_search_paths: Sequence[str] = (os.curdir,),
) -> None:
    """Replaces the gin configuration with the given files and then the bindings. Later values
    override earlier ones.

    Bindings may name anything in a module that one of the files imports, which T5X's parser does
    not allow (see the module docstring).

    Raises:
        ConfigError: a file is missing; a name is unknown; a macro has no value; nothing reads a
            binding of the command line or a macro of a user's file; or a value has the wrong type.
            The message has the closest known names, or the expected type.
    """
    gin.clear_config()
    folders = search_paths(gin_search_paths)
    gin_check.set_search_paths(folders)
    if not gin_files:
        raise ConfigError(
            "No gin file was given. Pass one, for example --gin_file=gin/mpt_source.gin."
        )
    for name in gin_files:
        _check_exists(name, folders)
    try:
        parsed = [gin.parse_config_file(name) for name in gin_files]
        with gin_check.command_line():
            gin_check.bind(bindings)
            gin_check.check_macros()
            gin_check.check_bindings(bindings, tuple(ENTRY_POINTS.values()))
        own, copies = _shipped()
        gin_check.check_files(parsed, [own / "gin", copies])
        binding_types.check(tuple(ENTRY_POINTS.values()))
        gin.finalize()
    except binding_types.WrongType as error:
        raise ConfigError(str(error)) from error
    except Exception as error:
        if (message := gin_errors.explain(error)) is None:
            raise
        raise ConfigError(message) from error


def _check_exists(name: str, searched: Sequence[str]) -> None:
    if any(os.path.isfile(os.path.join(prefix, name)) for prefix in searched):
        return
    shipped = [
        os.path.relpath(path, prefix)
        for prefix in searched[-2:]
        for folder in ("gin", "t5x")
        for path in sorted(Path(prefix, folder).rglob("*.gin"))
    ]
    close = difflib.get_close_matches(name, shipped, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"No gin file {name!r} was found.{hint} Correct its path, or add its folder with "
        f"--gin_search_paths. Searched: {', '.join(map(os.path.abspath, searched))}."
    )


@contextlib.contextmanager
def as_main(module: types.ModuleType) -> Iterator[None]:
    """Context manager in which `import __main__ as train_script` in a gin file imports `module`."""
    previous = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = previous


def configured(function: Callable[..., Any], **overrides: Any) -> Callable[..., Any]:
    """Returns a function without arguments that calls an entry point with the arguments that the
    parsed files bind. `overrides` replace arguments of the same name."""
    if not gin_check.is_bound(function):
        raise ConfigError(
            f"No gin file configures {function.__name__}(). Add a stage file with --gin_file, such "
            "as gin/mpt_source.gin for train(), gin/eval.gin for evaluate() or gin/infer.gin for "
            "infer()."
        )
    bound = gin.get_configurable(function)

    def call() -> Any:
        try:
            return bound(**overrides)
        except Exception as error:
            if (message := gin_errors.explain(error)) is None:
                raise
            raise ConfigError(message) from error

    return call


def run_stage(gin_files: Sequence[str], bindings: Sequence[str] = (), entry: str = "train") -> Any:
    """Runs one stage in this process exactly as its command line would; may be called repeatedly.

    Args:
        gin_files: the gin files, in order, as with `--gin_file`.
        bindings: the bindings, `NAME = value` or `scope/name.parameter = value`, as with
            `--gin.NAME=value`.
        entry: `'train'`, `'eval'` or `'infer'`.

    Returns:
        The return value of the entry function.
    """
    trainer_choice.install_fallback()
    module = importlib.import_module(f"mpt_jax.{entry}")
    function = getattr(module, ENTRY_POINTS[entry])
    with as_main(module):
        parse(gin_files, bindings)
        run = configured(function)
    return run()


# --- Command lines -------------------------------------------------------------------------------

ENTRY_POINTS = {"train": "train", "eval": "evaluate", "infer": "infer"}


def run_main(function: Callable[..., Any], overriding: Sequence[str] = ()) -> None:
    """Runs `python -m mpt_jax.<entry>`: parses flags, connects processes, parses gin files, and
    calls the function.

    Args:
        function: the entry point.
        overriding: names of flags that, if set, override the arguments of `function` of the same
            name.
    """
    trainer_choice.install_fallback()
    define_flags()
    jax.config.config_with_absl()
    app.run(lambda argv: _main(argv, function, overriding), flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line of an entry point or of `plan`. Prints the help and exits if the
    command line asks for it."""
    if command_help.is_asked(argv):
        script = Path(argv[0])
        entry = script.parent.name if script.stem == "__main__" else script.stem
        print(command_help.usage(entry, [__name__, argv[0]]))
        sys.exit(0)
    try:
        rewritten = rewrite_gin_args(argv)
    except ConfigError as error:
        log_progress()
        _exit_with(error)
    return app.parse_flags_with_usage(rewritten)


def define_flags() -> None:
    """Defines T5X's flags and --heartbeat_timeout."""
    flags.DEFINE_multi_string("gin_file", [], "A gin file; may be repeated, later files win.")
    flags.DEFINE_multi_string("gin_bindings", [], "One binding; --gin.NAME=VALUE is the same.")
    flags.DEFINE_list("gin_search_paths", [os.curdir], "Folders to search first for gin files.")
    flags.DEFINE_string("tfds_data_dir", None, "Where TensorFlow Datasets keeps its data.")
    flags.DEFINE_list("seqio_additional_cache_dirs", [], "Folders with cached SeqIO tasks.")
    flags.DEFINE_boolean("multiprocess_gpu", False, "Start JAX's multi-process runtime.")
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
    flags.DEFINE_integer("process_count", None, "Number of processes of the job.")
    flags.DEFINE_integer("process_index", None, "Index of this process.")
    flags.DEFINE_integer("initialization_timeout", None, "Seconds to wait for other processes.")
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds until a silent process counts as dead.")


def rewrite_gin_args(argv: Sequence[str]) -> list[str]:
    """Rewrites `--gin.NAME=VALUE` to `--gin_bindings=NAME = VALUE`, as T5X does.

    Raises:
        ConfigError: a flag has no `=`.
    """
    rewritten = []
    for argument in argv:
        if argument.startswith("--gin."):
            name, equals, value = argument.removeprefix("--gin.").partition("=")
            if not equals:
                raise ConfigError(f"{argument} has no value. Write --gin.{name}=<value>.")
            argument = f"--gin_bindings={name} = {value}"
        rewritten.append(argument)
    return rewritten


def _main(argv: Sequence[str], function: Callable[..., Any], overriding: Sequence[str]) -> None:
    log_progress()
    trainer_choice.announce_own()
    if len(argv) > 1:
        raise app.UsageError(
            f"Unexpected arguments: {' '.join(argv[1:])}. Pass gin files as --gin_file=FILE and "
            "bindings as --gin.NAME=VALUE."
        )
    try:
        _start_processes()
        devices.check()
        _data_flags()
        values = flags.FLAGS
        parse(values.gin_file, values.gin_bindings, values.gin_search_paths)
        storage_check.check(storage_check.named(f"{gin.config_str()} {paths.root()}"))
        overrides = {name: values[name].value for name in overriding}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        run = configured(function, **overrides)
        run()
    except KeyboardInterrupt:  # training loops save and return instead
        logging.info("Stopped by Ctrl-C. The same command continues from the last save, if any.")
        sys.exit(preemption.INTERRUPT_EXIT_CODE)
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        logging.debug("Traceback of the error:", exc_info=True)  # shown with --verbosity=1
        _exit_with(error)
    jax.effects_barrier()


def _exit_with(error: Exception) -> NoReturn:
    """Logs the message of an error for the user, and exits."""
    logging.error("%s", message(error))
    sys.exit(2)


def message(error: Exception) -> str:
    """Returns the message of an error, without the note that gin appends on the call."""
    return str(error).partition("\n  In call to configurable")[0]


def _is_for_the_user(error: Exception) -> bool:
    """Whether this library raised the error itself, so that the message suffices. An error raised
    by other code is probably a bug, so it is shown with its traceback."""
    if not isinstance(error, (ValueError, OSError, RuntimeError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(ours in Path(frames[-1].filename).parents for ours in OURS)


def log_progress() -> None:
    """Logs this library's messages and other libraries' warnings to standard error."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.addFilter(_is_ours)
    handler.setFormatter(_LineFormatter())
    if not flags.FLAGS.is_parsed():  # absl warns of logging before flags are parsed
        flags.FLAGS.mark_as_parsed()


class _LineFormatter(stdlib_logging.Formatter):
    """Formatter of log lines: the time, the level if it is above INFO, and the message."""

    def __init__(self):
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: stdlib_logging.LogRecord) -> str:
        """Returns the log line of a record."""
        line = super().format(record)
        if record.levelno < stdlib_logging.WARNING:
            return line
        time, _, message = line.partition(" ")
        return f"{time} {record.levelname.capitalize()}: {message}"


# Warnings of other libraries about intended behavior: lengths come from the configuration, so that
# no split compiles again or is truncated differently, and tables in memory are shuffled as a whole.
_EXPECTED = (
    "Given sequence lengths are longer than necessary",
    "Using an uncached FunctionDataset",
)


def _is_ours(record: stdlib_logging.LogRecord) -> bool:
    """Whether to log a record: it is from this library, or an unexpected warning of another.

    Drops the errors that gin logs for every searched folder that does not have a file.
    """
    expected = str(record.msg).startswith(_EXPECTED)
    if Path(record.pathname).name == "resource_reader.py" or expected:
        return False
    return record.levelno >= stdlib_logging.WARNING or PACKAGE in Path(record.pathname).parents


def _start_processes() -> None:
    """Connects to the job's other processes, before anything uses a device."""
    values = flags.FLAGS
    arguments = {
        "coordinator_address": values.coordinator_address,
        "num_processes": values.process_count,
        "process_id": values.process_index,
        "initialization_timeout": values.initialization_timeout,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    from_environment = distributed.distributed_args(os.environ)
    if not (arguments or values.multiprocess_gpu or from_environment is not None):
        return
    arguments = {**(from_environment or {}), **arguments}
    if "num_processes" in arguments and "coordinator_address" not in arguments:
        raise ConfigError(
            "--process_count is set, but --coordinator_address is not. Pass "
            "--coordinator_address=HOST:PORT, the address of process 0."
        )
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=values.heartbeat_timeout)
    logging.info(
        "Process %d of %d. If another process dies, this process ends within %d s "
        "(--heartbeat_timeout). The same command on all hosts then resumes from the last "
        "checkpoint.",
        jax.process_index(),
        jax.process_count(),
        values.heartbeat_timeout,
    )


def _data_flags() -> None:
    import seqio
    import tensorflow as tf

    # JAX owns the accelerators; TensorFlow only reads data.
    if jax.default_backend() == "gpu":
        tf.config.set_visible_devices([], "GPU")
    values = flags.FLAGS
    if values.tfds_data_dir:
        seqio.set_tfds_data_dir_override(values.tfds_data_dir)
    seqio.add_global_cache_dirs(values.seqio_additional_cache_dirs)


# --- Names that gin files use --------------------------------------------------------------------


def config_str() -> str:
    """Returns the parsed configuration as a gin file."""
    return gin.config_str()


def summarize_gin_config(model_dir: str, summary_writer: Any, step: int) -> None:
    """Writes `config.gin` to a MODEL_DIR, and the same text to TensorBoard; process 0 only.

    Args:
        model_dir: MODEL_DIR.
        summary_writer: a metric writer of clu, which T5X passes, or None.
        step: the step of the text in TensorBoard.
    """
    if jax.process_index() != 0:
        return
    text = config_str()
    folder = epath.Path(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.gin").write_text(text)
    if summary_writer is not None:
        summary_writer.write_texts(step, {"config": gin.markdown(text)})
        summary_writer.flush()


def sum_fn(var1: Any, var2: Any) -> Any:
    """Returns `var1 + var2`, for gin files."""
    return var1 + var2


def bool_fn(var1: Any) -> bool:
    """Returns `bool(var1)`, for gin files."""
    return bool(var1)


def string_split_fn(
    text: str, separator: str, maxsplit: int = -1, index: int | None = None
) -> list[str] | str:
    """Returns the parts of a text, or only the part at `index`, for gin files."""
    parts = text.split(separator, maxsplit)
    return parts if index is None else parts[index]
