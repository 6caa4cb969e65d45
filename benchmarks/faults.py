"""Kills, pairs of processes, full disks and bad input, tried on a tiny random model; docs/faults.md says what is tried.

``python -m benchmarks.faults [--kills N] [--dvc-kills N] [--pairs N] [--bad N] [--seed S] [--only SECTION]``
prints a table, then each failure with what repeats it; the exit code is 1 if there is one. It writes in a
temporary folder only. The full disk is a small tmpfs, which needs root or ``unshare -Urm python -m benchmarks.faults``;
without either, files are only limited in size.
"""

import argparse
import contextlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.sandbox import ENVIRONMENT, PipelineSandbox, Sandbox, import_copy, load_libraries, make_inputs, run_dvc_repro
from benchmarks.tries import NEVER, Moment, TryResult

SECTIONS = ("kills", "dvc", "pairs", "disk", "bad")
LEFT = re.compile(r"\.partial|scratch-|\.tmp$")
# Bytes: of the small disk, that are left free on it when it is filled, and of the largest file where files are limited.
DISK_BYTES, SPARE, SMALL_FILE = 64 << 20, (0, 16 << 10), 512
BALLAST = "ballast"
# DVC writes its lock file in place: a kill in these milliseconds leaves half of it, which DVC then refuses to read.
LOCK, HALF_A_LOCK = "dvc.lock", re.compile(r"dvc\.lock' (validation failed|is invalid)|unable to read: '.*dvc\.lock'")


@dataclass
class Row:
    """A row of the table, and the failures with what repeats them."""

    what: str
    tries: int = 0
    right: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    def judge(self, problem: str, how: str, refused: bool = False) -> None:
        """Count a try; ``problem`` is empty if it ended right, or in a refusal that is allowed."""
        self.tries += 1
        self.refused += refused and not problem
        self.right += not (refused or problem)
        if problem:
            self.failures.append(f"{self.what}: {how}: {problem}")
            print(f"  {self.failures[-1]}", file=sys.stderr, flush=True)
        elif not self.tries % 10:
            print(f"  {self.what}: {self.tries} tries", file=sys.stderr, flush=True)

    def cells(self) -> str:
        return f"| {self.what} | {self.tries} | {self.right} | {self.refused} | {len(self.failures)} |"


def describe_differences(right: dict[str, str], found: dict[str, str]) -> str:
    """Return what differs between two contents, in words; empty if nothing does."""
    left = sorted(found.keys() - right.keys())
    lost = sorted(right.keys() - found.keys())
    other = sorted(name for name in right.keys() & found.keys() if right[name] != found[name])
    parts = {"left behind": left, "missing": lost, "other bits": other}
    return "; ".join(f"{what}: {', '.join(names[:4])}{' …' * (len(names) > 4)}" for what, names in parts.items() if names)


def run_undisturbed(sandbox: Sandbox, action: Callable[[], Any]) -> tuple[TryResult, dict[str, str]]:
    """Run in an empty place; return how it ended and what it wrote. Stop the benchmark if that fails."""
    sandbox.clear()
    ended = sandbox.run(action)
    if ended.code:
        sys.exit(f"the undisturbed run fails: {ended}")
    content = sandbox.content()
    if left := [name for name, digest in content.items() if LEFT.search(name) or digest == "empty folder"]:
        print(f"  the undisturbed run leaves {', '.join(left)}", file=sys.stderr)
    return ended, content


def generate_moments(chance: random.Random, whole: TryResult) -> Iterator[Moment]:
    """Yield random moments of a run: three of four at a file operation, the others at a time."""
    while True:
        if chance.random() < 0.75:
            yield Moment(operation=chance.randint(1, whole.operations), alone=chance.random() < 0.3)
        else:
            yield Moment(seconds=chance.uniform(0, whole.seconds))


def try_kills(sandbox: Sandbox, row: Row, action: Callable[[], Any], count: int, chance: random.Random) -> Row:
    """Kill a run one to three times, start it again until it ends, and compare with an undisturbed one; ``count`` kills."""
    whole, right = run_undisturbed(sandbox, action)
    print(f"{row.what}: {whole.seconds:.1f} s, {whole.operations} file operations undisturbed", file=sys.stderr, flush=True)
    limit, killed, removed, at = 60 + 10 * whole.seconds, 0, 0, generate_moments(chance, whole)
    while killed < count:
        sandbox.clear()
        done: list[str] = []
        for _ in range(min(chance.choice((1, 1, 1, 2, 3)), count - killed)):
            ended = sandbox.run(action, moment := next(at), limit)
            done.append(str(moment))
            if not ended.killed:
                break
            killed += 1
        if ended.killed:
            ended = sandbox.run(action, limit=limit)
        if ended.code and HALF_A_LOCK.search(str(ended)):
            removed += 1
            (sandbox.results / LOCK).unlink()
            ended = sandbox.run(action, limit=limit)
        problem = str(ended) if ended.code else describe_differences(right, sandbox.content())
        row.judge(problem, f"killed {', then '.join(done)}")
    row.what += f" ({killed} kills{f'; {LOCK} removed by hand {removed} times' if removed else ''})"
    return row


def try_pairs(sandbox: Sandbox, count: int, chance: random.Random) -> list[Row]:
    """Start two processes at once, or one shortly after the other, and look at what both leave."""
    first, second = sandbox.prune(), sandbox.prune(layers_to_skip="1", seed="7")
    elsewhere = sandbox.prune(save_path="other")
    whole, right = run_undisturbed(sandbox, first)
    _, other = run_undisturbed(sandbox, second)
    sandbox.clear()
    for action in (first, elsewhere):
        sandbox.run(action)
    both = sandbox.content()
    kinds: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[dict[str, str]]]] = {
        "two processes, one save_path, equal settings": (first, first, [right]),
        "two processes, one save_path, other settings": (first, second, [right, other]),
        "two processes, one cache": (first, elsewhere, [both]),
    }
    rows = [Row(what) for what in kinds]
    for number in range(count):
        row, (one, two, allowed) = rows[number % 3], [*kinds.values()][number % 3]
        sandbox.clear()
        delay = chance.choice((0, chance.uniform(0, whole.seconds)))
        running = [sandbox.start(one, limit=300)]
        time.sleep(delay)
        running.append(sandbox.start(two, limit=300))
        ended = [each.wait() for each in running]
        how = f"pair {number + 1}, the second one started {delay:.3f} s after the first"
        refusals = [
            each.refused and any(words in each.sentences[0] for words in ("is in use by another process", "or --overwrite."))
            for each in ended
        ]
        wrong = [str(each) for each, refusal in zip(ended, refusals, strict=True) if each.code and not refusal]
        problem = " || ".join(wrong) or ("both were refused" if all(refusals) else "")
        if not problem:
            content = sandbox.content()
            problem = min((describe_differences(result, _without_cache(content, result)) for result in allowed), key=len)
        row.judge(problem, how, refused=any(refusals))
    return rows


def _without_cache(content: dict[str, str], result: dict[str, str]) -> dict[str, str]:
    """Return the content without what another process has in the cache: the cache holds the results of both."""
    return {name: digest for name, digest in content.items() if name in result or not name.startswith("cache/")}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small tmpfs at ``folder``; yield whether that was possible."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(folder: Path, spare: int) -> None:
    """Write a file that leaves ``spare`` bytes of the disk."""
    with (folder / BALLAST).open("wb") as stream, contextlib.suppress(OSError):
        os.posix_fallocate(stream.fileno(), 0, max(shutil.disk_usage(folder).free - spare, 1))


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def run_from_stage(name: str, happens: Callable[[], None], action: Callable[[], Any]) -> None:
    """Run ``action``; ``happens`` is called when the stage ``name`` starts."""
    from replaceme.pipeline import runner

    def after(run: Callable[..., None], *arguments: Any) -> None:
        happens()
        run(*arguments)

    stage = runner.STAGES[name]
    runner.STAGES = {**runner.STAGES, name: replace(stage, run=partial(after, stage.run))}
    action()


def try_full_disk(sandbox: Sandbox, mounted: bool, chance: random.Random) -> list[Row]:
    """Fill the disk, or limit the size of files, when a stage starts or at a file operation; free it, run again and compare."""
    from replaceme.running.stage import ORDER

    action, names = sandbox.prune(), ("inputs", *ORDER)
    whole, right = run_undisturbed(sandbox, action)

    def ends_well(row: Row, how: str, disturbed: Callable[[], Any], moment: Moment = NEVER, finished: int = 0) -> None:
        sandbox.clear()
        ended = sandbox.run(disturbed, moment, limit=300)
        (sandbox.folder / BALLAST).unlink(missing_ok=True)
        again = sandbox.run(action, limit=300)
        kept = again.said.count("unchanged since an earlier run")
        problem = str(ended) if ended.code and not ended.refused else ""
        problem = problem or (str(again) if again.code else describe_differences(right, sandbox.content()))
        if not problem and kept < finished:
            problem = f"{finished} stages had been finished, and {kept} were kept"
        row.judge(problem, how, ended.refused)

    def at_stages(row: Row, happens: partial[None]) -> None:
        for number, name in enumerate(names):
            # The inputs are always inspected anew.
            ends_well(
                row, f"{name}, {happens.args[-1]} bytes", partial(run_from_stage, name, happens, action), finished=number - 1
            )  # fmt: skip

    rows = [Row(f"no file over {SMALL_FILE} bytes from a stage on")]
    at_stages(rows[0], partial(limit_files, SMALL_FILE))
    if mounted:
        rows += [Row("a disk that is full from a stage on"), Row("a disk that is full from a file operation on")]
        for spare in SPARE:
            at_stages(rows[1], partial(fill_disk, sandbox.folder, spare))
        for _ in names:
            moment = Moment(operation=chance.randint(1, whole.operations), happens=partial(fill_disk, sandbox.folder, 0))
            ends_well(rows[2], f"operation {moment.operation}", action, moment)
    return rows


def try_bad_inputs(cases: int, seed: int) -> list[Row]:
    """Return the rows of ``benchmarks.bad_inputs``, which makes the cases and runs them."""
    module = importlib.import_module("benchmarks.bad_inputs")
    found = module.count_outcomes(module.run_cases(cases, seed))
    repeat = f"python -m benchmarks.faults --only bad --bad {cases} --seed {seed}"
    return [
        Row(f"bad input: {kind}", tried, ran, refused, [f"bad input: {kind}: {repeat}"] * failed)
        for kind, tried, refused, ran, failed in found
    ]


def format_table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = "| what | tries | ended right | refused in one sentence | wrong |\n| --- | ---: | ---: | ---: | ---: |"
    return "\n".join([head, *(row.cells() for row in rows)])


def main(words: argparse.Namespace) -> int:
    """Try everything that is asked for, print the table and the failures, and return the exit code."""
    os.environ.update(ENVIRONMENT)
    # So that what is mounted is unmounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows: list[Row] = []
    chosen = words.only or SECTIONS
    # No TemporaryDirectory: a forked child would delete it when it ends.
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        os.environ["HF_HOME"] = str(folder / "hub")
        for part in ("inputs", "sandbox", "project"):
            (folder / part).mkdir()
        import_copy(folder / "code")
        sandbox = Sandbox(folder / "sandbox", folder / "inputs")
        project = PipelineSandbox(folder / "project", folder / "inputs", folder / "code")
        sandbox.clear()
        made = sandbox.run(partial(make_inputs, sandbox.inputs, 0))
        if made.code:
            sys.exit(str(made))
        load_libraries(sandbox, sandbox.prune())
        if "kills" in chosen:
            row = Row("run_replaceme, killed and started again")
            rows.append(try_kills(sandbox, row, sandbox.prune(), words.kills, random.Random(f"{words.seed} kills")))
        if "dvc" in chosen:
            load_libraries(project, run_dvc_repro)
            row = Row("dvc repro, killed and started again")
            rows.append(try_kills(project, row, run_dvc_repro, words.dvc_kills, random.Random(f"{words.seed} dvc")))
        if "pairs" in chosen:
            rows += try_pairs(sandbox, words.pairs, random.Random(f"{words.seed} pairs"))
        if "disk" in chosen:
            with small_disk(folder / "disk") as mounted:
                rows += try_full_disk(Sandbox(folder / "disk", sandbox.inputs), mounted, random.Random(f"{words.seed} disk"))
        if "bad" in chosen:
            rows += try_bad_inputs(words.bad, words.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(format_table(rows))
    failures = [failure for row in rows for failure in row.failures]
    print("".join(f"\nseed {words.seed}; {failure}" for failure in dict.fromkeys(failures)))
    return int(bool(failures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for option, default in {"kills": 100, "dvc-kills": 30, "pairs": 20, "bad": 300, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section, may be given several times")
    sys.exit(main(parser.parse_args()))
