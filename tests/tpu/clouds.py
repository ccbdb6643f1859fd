"""Stand-ins for gcloud, kubectl, xpk and python on a PATH that has nothing else but plain tools.

Every call is written down as JSON. `gcloud` keeps one queued resource: `create` makes it, `delete`
removes it, and each `ssh` plays the next of `plan`: how the workers ended, and what the resource is
then.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOOLS = """base64 bash cat dirname env grep hostname kill mkdir mktemp rm sed sleep sort stat tail
tee touch tr""".split()

FAKE = """#!{python} -S
import json, os, pathlib, sys
here = pathlib.Path(os.environ["FAKES"])
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
stdin = sys.stdin.read() if arguments[-1:] == ["-"] else ""
with open(here / "calls", "a") as log:
    log.write(json.dumps([[name, *arguments], stdin]) + "\\n")
plan, resource = json.loads((here / "plan").read_text()), here / "resource"
verb = arguments[3] if arguments[:3] == ["compute", "tpus", "queued-resources"] else ""
if " ".join(arguments[:3]) in plan["failing"]:
    sys.exit("ERROR: " + plan["failing"][" ".join(arguments[:3])])
if verb == "create":
    resource.write_text(plan["created"].pop(0) if plan["created"] else "ACTIVE")
elif verb == "delete":
    resource.unlink()
elif verb == "describe":
    if not resource.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    print(resource.read_text())
    if resource.read_text() not in ("FAILED", "SUSPENDED"):
        resource.write_text("ACTIVE")
elif verb == "ssh":
    codes, left = plan["runs"].pop(0)
    for host, code in enumerate(codes):
        how = "could not be prepared:" if code < 0 else "ends with"
        print(f"worker host-{{host}} {{how}} {{abs(code)}}")
    resource.write_text(left)
(here / "plan").write_text(json.dumps(plan))
sys.exit(next((code for code in codes if code), 0) if verb == "ssh" else 0)
"""


class Clouds:
    """A folder of stand-ins, and what was asked of them."""

    def __init__(self, folder: Path, present: tuple[str, ...] = ("gcloud", "kubectl", "xpk")):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        for name in present:
            (self.bin / name).write_text(FAKE.format(python=sys.executable))
            (self.bin / name).chmod(0o755)
        self.plan()

    def plan(
        self,
        runs: list[tuple[list[int], str]] = [],  # noqa: B006 - only read
        created: list[str] = [],  # noqa: B006
        failing: dict[str, str] = {},  # noqa: B006
    ) -> None:
        """What each ssh finds (exit codes of the hosts; negative: of what should have prepared
        one), in what state each `create` leaves the resource, what fails."""
        plan = {"runs": runs, "created": created, "failing": failing}
        (self.folder / "plan").write_text(json.dumps(plan))

    def launch(self, script: str, *arguments: str, **environment: str) -> Any:
        """Runs a script of tpu/ with nothing but the stand-ins."""
        return subprocess.run(
            [str(ROOT / "tpu" / script), *arguments],
            env={"PATH": str(self.bin), "FAKES": str(self.folder), "PAUSE": "0", **environment},
            cwd=self.folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def calls(self) -> list[list[str]]:
        """Every call, its name first."""
        return [call for call, _ in self._read()]

    def stdin(self) -> str:
        """What the last call that reads its input was given."""
        return next(stdin for _, stdin in reversed(self._read()) if stdin)

    def verbs(self) -> list[str]:
        """What was done to the queued resource, in order, without looking at it."""
        done = [c[4] for c in self.calls() if c[1:4] == ["compute", "tpus", "queued-resources"]]
        return [verb for verb in done if verb != "describe"]

    def _read(self) -> list[tuple[list[str], str]]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(json.loads(line)) for line in lines]


def common(*without: str, **others: str) -> list[str]:
    """The options every script takes; of others, and without some."""
    options = {
        "name": "mpt-1", "project": "p", "zone": "us-west4-a", "type": "v5litepod-16",
        "root": "gs://bucket/mpt", "package": "git+https://host/o/mpt-jax@abc",
    } | {name.replace("_", "-"): value for name, value in others.items()}  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items() if name not in without]


COMMAND = ("--", "mpt_jax.train", "--gin_file=gin/mpt_source.gin", """--gin.TASKS=["a b", 'c']""")
