"""Kills, pairs of processes, full disks and bad input, tried on a tiny random model; docs/faults.md says what is tried.

``python -m benchmarks.faults [--kills N] [--dvc-kills N] [--pairs N] [--bad N] [--seed S] [--only SECTION] [--table FILE]``
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

from benchmarks.stand import ENVIRONMENT, Project, Stand, import_copy, load_libraries, make_inputs, repro
from benchmarks.tries import NEVER, Ended, Moment

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


def different(right: dict[str, str], found: dict[str, str]) -> str:
    """Return what differs between two contents, in words; empty if nothing does."""
    left = sorted(found.keys() - right.keys())
    lost = sorted(right.keys() - found.keys())
    other = sorted(name for name in right.keys() & found.keys() if right[name] != found[name])
    parts = {"left behind": left, "missing": lost, "other bits": other}
    return "; ".join(f"{what}: {', '.join(names[:4])}{' …' * (len(names) > 4)}" for what, names in parts.items() if names)


def undisturbed(stand: Stand, action: Callable[[], Any]) -> tuple[Ended, dict[str, str]]:
    """Run in an empty place; return how it ended and what it wrote. Stop the benchmark if that fails."""
    stand.clear()
    ended = stand.run(action)
    if ended.code:
        sys.exit(f"the undisturbed run fails: {ended}")
    content = stand.content()
    if left := [name for name, digest in content.items() if LEFT.search(name) or digest == "empty folder"]:
        print(f"  the undisturbed run leaves {', '.join(left)}", file=sys.stderr)
    return ended, content


def moments(chance: random.Random, whole: Ended) -> Iterator[Moment]:
    """Yield random moments of a run: three of four at a file operation, the others at a time."""
    while True:
        if chance.random() < 0.75:
            yield Moment(operation=chance.randint(1, whole.operations), alone=chance.random() < 0.3)
        else:
            yield Moment(seconds=chance.uniform(0, whole.seconds))


def kills(stand: Stand, row: Row, action: Callable[[], Any], count: int, chance: random.Random) -> Row:
    """Kill a run one to three times, start it again until it ends, and compare with an undisturbed one; ``count`` kills."""
    whole, right = undisturbed(stand, action)
    print(f"{row.what}: {whole.seconds:.1f} s, {whole.operations} file operations undisturbed", file=sys.stderr, flush=True)
    limit, killed, removed, at = 60 + 10 * whole.seconds, 0, 0, moments(chance, whole)
    while killed < count:
        stand.clear()
        done: list[str] = []
        for _ in range(min(chance.choice((1, 1, 1, 2, 3)), count - killed)):
            ended = stand.run(action, moment := next(at), limit)
            done.append(str(moment))
            if not ended.killed:
                break
            killed += 1
        if ended.killed:
            ended = stand.run(action, limit=limit)
        if ended.code and HALF_A_LOCK.search(str(ended)):
            removed += 1
            (stand.place / LOCK).unlink()
            ended = stand.run(action, limit=limit)
        problem = str(ended) if ended.code else different(right, stand.content())
        row.judge(problem, f"killed {', then '.join(done)}")
    row.what += f" ({killed} kills{f'; {LOCK} removed by hand {removed} times' if removed else ''})"
    return row


def pairs(stand: Stand, count: int, chance: random.Random) -> list[Row]:
    """Start two processes at once, or one shortly after the other, and look at what both leave."""
    first, second = stand.prune(), stand.prune(layers_to_skip="1", seed="7")
    elsewhere = stand.prune(save_path="other")
    whole, right = undisturbed(stand, first)
    _, other = undisturbed(stand, second)
    stand.clear()
    for action in (first, elsewhere):
        stand.run(action)
    both = stand.content()
    kinds: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[dict[str, str]]]] = {
        "two processes, one save_path, equal settings": (first, first, [right]),
        "two processes, one save_path, other settings": (first, second, [right, other]),
        "two processes, one cache": (first, elsewhere, [both]),
    }
    rows = [Row(what) for what in kinds]
    for number in range(count):
        row, (one, two, allowed) = rows[number % 3], [*kinds.values()][number % 3]
        stand.clear()
        delay = chance.choice((0, chance.uniform(0, whole.seconds)))
        running = [stand.start(one, limit=300)]
        time.sleep(delay)
        running.append(stand.start(two, limit=300))
        ended = [each.wait() for each in running]
        how = f"pair {number + 1}, the second one started {delay:.3f} s after the first"
        refusals = [
            each.refused and "is in use by another process" in each.sentences[0] for each in ended
        ]  # fmt: skip
        wrong = [str(each) for each, refusal in zip(ended, refusals, strict=True) if each.code and not refusal]
        problem = " || ".join(wrong) or ("both were refused" if all(refusals) else "")
        if not problem:
            content = stand.content()
            problem = min((different(result, _without_cache(content, result)) for result in allowed), key=len)
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


def fill(folder: Path, spare: int) -> None:
    """Write a file that leaves ``spare`` bytes of the disk."""
    with (folder / BALLAST).open("wb") as stream, contextlib.suppress(OSError):
        os.posix_fallocate(stream.fileno(), 0, max(shutil.disk_usage(folder).free - spare, 1))


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def from_stage(name: str, happens: Callable[[], None], action: Callable[[], Any]) -> None:
    """Run ``action``; ``happens`` is called when the stage ``name`` starts."""
    from replaceme.pipeline import runner

    def after(run: Callable[..., None], *arguments: Any) -> None:
        happens()
        run(*arguments)

    stage = runner.STAGES[name]
    runner.STAGES = {**runner.STAGES, name: replace(stage, run=partial(after, stage.run))}
    action()


def full_disk(stand: Stand, mounted: bool, chance: random.Random) -> list[Row]:
    """Fill the disk, or limit the size of files, when a stage starts or at a file operation; free it, run again and compare."""
    from replaceme.running.stage import ORDER

    action, names = stand.prune(), ("inputs", *ORDER)
    whole, right = undisturbed(stand, action)

    def ends_well(row: Row, how: str, disturbed: Callable[[], Any], moment: Moment = NEVER, finished: int = 0) -> None:
        stand.clear()
        ended = stand.run(disturbed, moment, limit=300)
        (stand.folder / BALLAST).unlink(missing_ok=True)
        again = stand.run(action, limit=300)
        kept = again.said.count("unchanged since an earlier run")
        problem = str(ended) if ended.code and not ended.refused else ""
        problem = problem or (str(again) if again.code else different(right, stand.content()))
        if not problem and kept < finished:
            problem = f"{finished} stages had been finished, and {kept} were kept"
        row.judge(problem, how, ended.refused)

    def at_stages(row: Row, happens: partial[None]) -> None:
        for place, name in enumerate(names):
            # The inputs are always inspected anew.
            ends_well(
                row, f"{name}, {happens.args[-1]} bytes", partial(from_stage, name, happens, action), finished=place - 1
            )  # fmt: skip

    rows = [Row(f"no file over {SMALL_FILE} bytes from a stage on")]
    at_stages(rows[0], partial(limit_files, SMALL_FILE))
    if mounted:
        rows += [Row("a disk that is full from a stage on"), Row("a disk that is full from a file operation on")]
        for spare in SPARE:
            at_stages(rows[1], partial(fill, stand.folder, spare))
        for _ in names:
            moment = Moment(operation=chance.randint(1, whole.operations), happens=partial(fill, stand.folder, 0))
            ends_well(rows[2], f"operation {moment.operation}", action, moment)
    return rows


def bad_inputs(cases: int, seed: int) -> list[Row]:
    """Return the rows of ``benchmarks.bad_inputs``, which makes the cases and runs them."""
    found = importlib.import_module("benchmarks.bad_inputs").table(cases, seed)
    repeat = f"python -m benchmarks.bad_inputs --cases {cases} --seed {seed}"
    return [
        Row(f"bad input: {kind}", tried, ran, refused, [f"bad input: {kind}: {repeat}"] * failed)
        for kind, tried, refused, ran, failed in found
    ]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = "| what | tries | ended right | refused in one sentence | wrong |\n| --- | ---: | ---: | ---: | ---: |"
    return "\n".join([head, *(row.cells() for row in rows)])


def put_table(file: Path, made: str) -> None:
    """Write a table at the end of a Markdown file, in place of the table that is there."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    text = "\n".join(line for line in lines if not line.startswith("|")).strip()
    file.write_text(f"{text}\n\n{made}\n".lstrip(), encoding="utf-8")


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
        for part in ("inputs", "stand", "project"):
            (folder / part).mkdir()
        import_copy(folder / "code")
        stand = Stand(folder / "stand", folder / "inputs")
        project = Project(folder / "project", folder / "inputs", folder / "code")
        stand.clear()
        made = stand.run(partial(make_inputs, stand.inputs, 0))
        if made.code:
            sys.exit(str(made))
        load_libraries(stand, stand.prune())
        if "kills" in chosen:
            row = Row("run_replaceme, killed and started again")
            rows.append(kills(stand, row, stand.prune(), words.kills, random.Random(f"{words.seed} kills")))
        if "dvc" in chosen:
            load_libraries(project, repro)
            row = Row("dvc repro, killed and started again")
            rows.append(kills(project, row, repro, words.dvc_kills, random.Random(f"{words.seed} dvc")))
        if "pairs" in chosen:
            rows += pairs(stand, words.pairs, random.Random(f"{words.seed} pairs"))
        if "disk" in chosen:
            with small_disk(folder / "disk") as mounted:
                rows += full_disk(Stand(folder / "disk", stand.inputs), mounted, random.Random(f"{words.seed} disk"))
        if "bad" in chosen:
            rows += bad_inputs(words.bad, words.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    failures = [failure for row in rows for failure in row.failures]
    print("".join(f"\nseed {words.seed}; {failure}" for failure in dict.fromkeys(failures)))
    if words.table:
        put_table(words.table, table(rows))
    return int(bool(failures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for option, default in {"kills": 100, "dvc-kills": 30, "pairs": 20, "bad": 300, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section, may be given several times")
    parser.add_argument("--table", type=Path, help="a Markdown file; its table is replaced")
    sys.exit(main(parser.parse_args()))
