"""`mpt-jax predict`: answers requests that each name a task, one line of JSON per request.

    mpt-jax predict --prompts runs/*/artifact --backbone runs/backbones/t5-base \
        --input requests.jsonl --output answers.jsonl
    echo '{"task": "toy_sst2", "inputs": "sst2 : a fine film"}' | mpt-jax predict --prompts DIR

docs/serving.md describes requests and answers. If a line cannot be answered, its answer is an
error, and the next line is read. The exit code is 0, or 1 if every line failed (with --strict, if
any line failed), 2 if the command cannot start or continue, and 130 after Ctrl-C. With --output,
the same command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from absl import logging

from mpt_jax.artifacts.backbone_digest import CONFIG_FIELD, FIELD, backbone_config
from mpt_jax.runtime import compilation_cache
from mpt_jax.runtime.resumable_output import Refused
from mpt_jax.serving.predict.image_artifacts import is_of_images
from mpt_jax.serving.predict.image_server import ImageServer
from mpt_jax.serving.predict.progress import Progress, say
from mpt_jax.serving.predict.requests import MODES, Failure
from mpt_jax.serving.predict.resumable_output import File, Output, Stream
from mpt_jax.serving.predict.server import Limits, Server
from mpt_jax.serving.predict.windows import windows
from mpt_jax.serving.prompt_bank import Named

WINDOW = 8  # batches that are read ahead and sorted by length
CANNOT, INTERRUPTED = 2, 130  # exit codes
# Arguments without effect on images, with the values of those that are not given.
OF_TEXTS: dict[str, Any] = {
    **dict.fromkeys(("folded", "truncate"), False),
    **dict.fromkeys(("vocabulary", "extra_ids", "config")),
    **{name: getattr(Limits(), name) for name in ("input_length", "target_length")},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Answers all requests, and exits with a code for the result."""
    parser = make_parser()
    args = parser.parse_args(argv)
    compilation_cache.enable()
    try:
        try:
            server = load(args)
        except ValueError as error:
            _stop(CANNOT, str(error))
        with _opened(args.input) as stream:
            output = answer(server, stream, args)
    except KeyboardInterrupt:
        _stop(INTERRUPTED, "stopped" + "; the same command resumes" * bool(args.output))
    except (Refused, OSError) as error:
        if isinstance(error, BrokenPipeError) and not args.output:
            sys.exit(0)  # the reader of the answers closed the pipe
        _stop(CANNOT, str(error))
    lost = output.failed if args.strict else output.failed == output.lines > 0
    sys.exit(1 if lost else 0)


def _stop(code: int, why: str) -> NoReturn:
    say(why)
    sys.exit(code)


def load(args: argparse.Namespace) -> Server | ImageServer:
    """Loads the server that the arguments describe: of images, if the prompts are of an image
    job."""
    if is_of_images(Named.parse(args.prompts[0]).folder):
        images = load_images(args, args.batch_size)
        say(f"{len(images.names)} tasks, {images.nbytes / 2**20:.2f} MiB of prompts")
        return images
    server = Server.load(
        args.prompts,
        folded=args.folded,
        limits=Limits(args.input_length, args.target_length, args.batch_size),
        path=args.backbone,
        vocabulary=args.vocabulary,
        extra_ids=args.extra_ids,
        config=args.config,
        dtype=args.dtype,
        digest_backbone=args.backbone_digest,
        say=say,
        warn=say,
    )
    size = server.bank.nbytes / 2**20
    say(f"{len(server.bank.names)} tasks, {size:.2f} MiB of prompts")
    return server


def load_images(args: argparse.Namespace, batch_size: int = 1) -> ImageServer:
    """Loads the server of images that the arguments of `add_model_arguments` describe.

    Raises:
        ValueError: an argument would have no effect, or the server cannot be loaded.
    """
    if given := [name for name, unset in OF_TEXTS.items() if getattr(args, name, unset) != unset]:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(
            f"{flags} would have no effect, because the prompts {args.prompts[0]} are of an image "
            "job. Omit it."
        )
    return ImageServer.load(
        args.prompts,
        args.backbone,
        batch_size=batch_size,
        dtype=args.dtype,
        digest_backbone=args.backbone_digest,
        warn=say,
    )


def answer(server: Server | ImageServer, stream: BinaryIO, args: argparse.Namespace) -> Output:
    """Answers every line of a stream. Returns the output, with its counts of answers and errors."""
    reader: Any = server.reader(args.mode, args.truncate)
    lines: Iterator[bytes] = iter(stream)
    output = _output(server, args)
    done = output.begin(lines)
    size = os.path.getsize(args.input) if args.input != "-" else None
    progress = Progress(size, sys.stderr is not None and sys.stderr.isatty())
    if done is None:
        say(f"{args.output} is already complete")
        return output
    try:
        progress.skipped(done, stream.tell() if done and stream.seekable() else 0)
        # A line with an image may have 45 MB, and images are not sorted.
        batches = 1 if isinstance(server, ImageServer) else WINDOW
        for window in windows(lines, batches * args.batch_size):
            requests = [reader.read(line, done + i) for i, line in enumerate(window, start=1)]
            output.write(window, server.answer(requests))
            done += len(window)
            failed = sum(isinstance(request, Failure) for request in requests)
            progress.add(len(window), failed, sum(map(len, window)))
        output.finish()
    finally:
        output.close()
        progress.close()
    say(str(progress))
    return output


def _output(server: Server | ImageServer, args: argparse.Namespace) -> Output:
    if not args.output:
        return Stream(sys.stdout.buffer)
    if isinstance(server, ImageServer):
        made_from = {**server.digests, "mode": args.mode, "dtype": args.dtype}
        return File(Path(args.output), made_from, optional=[FIELD, CONFIG_FIELD])
    made_from = {
        "mode": args.mode,
        "bank_sha256": server.bank.digest(),
        "embedding_sha256": server.backbone.embedding_sha256,
        FIELD: server.backbone.backbone_sha256,
        CONFIG_FIELD: backbone_config(server.backbone.config),
        "vocabulary_sha256": server.backbone.vocabulary_sha256,
        "dtype": args.dtype,
        "input_length": args.input_length,
        "target_length": args.target_length,
        "truncate": args.truncate,
    }
    return File(Path(args.output), made_from, optional=[FIELD, CONFIG_FIELD])


def _opened(path: str) -> BinaryIO:
    # Not sys.stdin: the thread that reads ahead must not hold its lock at exit.
    return open(0 if path == "-" else path, "rb", closefd=path != "-")


def make_parser() -> argparse.ArgumentParser:
    """Returns the command's argument parser."""
    parser = argparse.ArgumentParser(
        prog="mpt-jax predict",
        description="Answers requests that each name a task, one line of JSON per request.",
        epilog="@FILE reads arguments from a file, one per line.",
        fromfile_prefix_chars="@",
    )
    add_model_arguments(parser)
    parser.add_argument("--input", default="-", help="JSON lines; default: standard input")
    parser.add_argument(
        "--output", help="a file, resumed if it is incomplete; default: standard output"
    )
    parser.add_argument("--mode", choices=MODES, default="predict", help="default: %(default)s")
    parser.add_argument(
        "--truncate", action="store_true", help="truncate longer texts; default: an error"
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 if any line failed")
    sizes = parser.add_argument_group("sizes")
    usual = Limits()
    for name, what in (
        ("input_length", "maximum number of tokens of an input"),
        ("target_length", "maximum number of tokens to decode or score"),
        ("batch_size", "maximum number of rows of a batch"),
    ):
        sizes.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(usual, name),
            help=f"{what}; default: %(default)s",
        )
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for prompts, backbone and vocabulary."""
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="DIR",
        help="prompt artifacts; NAME=DIR renames its row to NAME, or several rows to NAME/row",
    )
    parser.add_argument(
        "--folded",
        action="store_true",
        help="keep plain prompts, not factors; this allows artifacts of several methods",
    )
    parser.add_argument(
        "--backbone", help="a Hugging Face folder or T5X checkpoint; default: the shipped tiny T5"
    )
    parser.add_argument(
        "--vocabulary",
        help="a SentencePiece model, tokenizer.json, their folder, or byt5; default: beside the "
        "backbone",
    )
    parser.add_argument(
        "--extra-ids", type=int, help="number of sentinels of the vocabulary; default: T5's 100"
    )
    parser.add_argument(
        "--config", help="a name such as t5_1_1_base, or a config.json, if the backbone has none"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s"
    )
    parser.add_argument(
        "--no-backbone-digest",
        dest="backbone_digest",
        action="store_false",
        help="compare only the backbone's embedding with that of the prompts, not all its weights",
    )


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # Orbax reports every array
    main()
