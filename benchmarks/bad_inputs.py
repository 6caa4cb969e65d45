"""Bad input of every kind, made up by hypothesis: each case must be refused in one sentence, in seconds, or run.

Configs, options, text files, question files, model folders and paths for the result are given to a console script in a forked
process, with a tiny random model and no hub. A case passes if it ends with exit code 2 and one sentence a problem, of at most
300 characters, that names a key or the file; or if it runs, because the change did no harm. ``benchmarks.faults`` runs them.
"""

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from replaceme.base.errors import SENTENCE_CHARACTERS, excerpt
from replaceme.base.published import PUBLISHED_KEYS
from replaceme.cli import commands
from replaceme.cli.commands import ALIASES
from replaceme.evaluation import catalogue
from replaceme.methods.registry import FIELDS
from replaceme.models import embedded as embedded_models
from replaceme.models import hub
from tests.conftest import made_model, made_text, made_tokenizer

LIMIT_SECONDS, LIMIT_BYTES = 60.0, 12 << 30
NAMES = (*FIELDS, *ALIASES, *PUBLISHED_KEYS, "command line", "config")
SETTINGS = {
    "dtype": "float32", "eval_dtype": "float32", "threads": "1", "max_length": "48", "dataset_size": "20", "device": "cpu",
    "layers_to_skip": "1",
}  # fmt: skip
Row = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Case:
    """One input: a console script, its options, and the files that it finds (a name → its bytes, or what it is instead)."""

    command: Callable[[], Any]
    options: Mapping[str, str]
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    # Whether to stop when all input was checked: a valid setting can ask for hours of work.
    checks_only: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ``refused``, ``ran`` or ``failed``, the seconds that it took, and what was said."""

    kind: str
    number: int
    case: Case
    verdict: str
    seconds: float
    said: str


@dataclass(frozen=True)
class GoodInput:
    """A good input, of which each case changes something: options, and the bytes of files by name or suffix."""

    options: Mapping[str, str]
    model: Mapping[str, bytes]
    texts: Mapping[str, bytes]
    questions: bytes


# ---- What is generated ----------------------------------------------------------------------------------------------

NASTY = (
    "", " ", "~nobody/x", "../../etc/passwd", "/", "//", ".", "..", "x" * 300, "[1]*", "a::b.csv", "-1", "0", "1e999", ".nan",
    "-.inf", "null", "true", "{}", "[]", "[[", "[a, [b]]", "*a", "2024-99-99", "2024-01-05", "0x10", "1_000", "9" * 30, "файл",
    "💥", "a/b/c", "C:\\x", "%41", "$HOME", "-", "--x", "'", '"', "a: b", "# x", "\t", "1:30", "@x", "`x`", "|", ">",
)  # fmt: skip
# What a person can type or paste.
TYPED = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)
KEYS = st.sampled_from([*FIELDS, *PUBLISHED_KEYS])
VALUES = st.one_of(st.sampled_from(NASTY), TYPED, st.integers().map(str), st.floats().map(str))
RUN = st.sampled_from([commands.run_replaceme, commands.run_uidl, commands.evaluate_model, commands.get_distance_analysis])


def damage(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of a file, changed: a few other bytes, cut off, doubled, or none of them."""
    changes = st.lists(
        st.tuples(st.integers(0, max(len(content) - 1, 0)), st.integers(32, 126) | st.integers(0, 255)), min_size=1, max_size=3
    )

    def change(edits: list[tuple[int, int]]) -> bytes:
        made = bytearray(content)
        for at, byte in edits:
            made[at] = byte
        return bytes(made)

    cut = st.integers(0, len(content)).map(lambda end: content[:end])
    inside = st.tuples(st.integers(0, len(content)), st.binary(min_size=1, max_size=20)).map(
        lambda pair: content[: pair[0]] + pair[1] + content[pair[0] :]
    )
    return st.one_of(changes.map(change), cut, inside, st.binary(max_size=200), st.sampled_from(WRONG_FILES))


WRONG_FILES = (
    b"", b"\n", b"\xff\xfe\x00", b"PK\x03\x04" + bytes(200), b"x" * 3_000_000, b"\x00" * 100,
    b"a;b\n1;2\n", b"null", b"[]", b"{}", b"3", b'"x"', b"\xef\xbb\xbf{}", b'{"text": NaN}', b'{"text": 1e999}',
    b'{"text": ' + b"9" * 5000 + b"}", b"PAR1" + bytes(50) + b"PAR1",
)  # fmt: skip
INSTEAD = st.sampled_from(["folder", "loop"])


def configs(good: GoodInput) -> st.SearchStrategy[Case]:
    base = "".join(f"{key}: {value}\n" for key, value in good.options.items())
    wrong = st.lists(st.tuples(st.one_of(KEYS, st.sampled_from(NASTY), TYPED), VALUES), min_size=1, max_size=2)
    replaced = wrong.map(
        lambda pairs: "".join(f"{key}: {value}\n" for key, value in {**good.options, **dict(pairs)}.items()).encode(
            "utf-8", "replace"
        )
    )
    shapes = st.sampled_from(
        [
            base + base,
            base + "--- \n" + base,
            "%YAML 1.1\n---\n" + base,
            base.replace(": ", ":\t"),
            "- alpha",
            "alpha",
            "# none",
        ]
    ).map(str.encode)
    files = st.one_of(replaced, replaced, damage(base.encode()), shapes, st.just("folder"))
    return st.tuples(RUN, files).map(
        lambda pair: Case(pair[0], {"config": "config.yaml"}, {"config.yaml": pair[1]}, checks_only=True)
    )


def options(good: GoodInput) -> st.SearchStrategy[Case]:
    wrong = st.dictionaries(KEYS, VALUES, min_size=1, max_size=2)
    word = st.one_of(st.sampled_from(NASTY), VALUES.map(lambda value: f"--{value}"), KEYS.map(lambda key: f"--{key}"))
    words = st.sampled_from([(), (), ()]) | st.tuples(word) | st.tuples(word, word)
    return st.tuples(RUN, wrong, words).map(
        lambda made: Case(made[0], {**good.options, **made[1]}, words=made[2], checks_only=True)
    )


def texts(good: GoodInput) -> st.SearchStrategy[Case]:
    cells = st.one_of(
        st.none(), st.text(max_size=9), st.integers(), st.booleans(), st.floats(), st.lists(st.text(max_size=3), max_size=2)
    )
    rows = st.lists(st.dictionaries(st.sampled_from(["text", "body", "messages", ""]), cells, max_size=3), max_size=5)
    lines = rows.map(lambda made: "".join(json.dumps(row) + "\n" for row in made).encode())
    table = st.lists(st.lists(st.text(max_size=6), max_size=3), min_size=1, max_size=4)
    csv = st.tuples(table, st.sampled_from(",;\t|")).map(
        lambda made: "\n".join(made[1].join(row) for row in made[0]).encode("utf-8", "replace")
    )
    contents = {".jsonl": lines, ".json": lines, ".csv": csv}
    names = st.sampled_from(["rows", "[1]*", "a::b", "{x}", "?", "~x", "-", "x" * 200, "é", " "])
    columns = st.one_of(st.none(), st.none(), st.sampled_from(["text", "nothing", "x" * 500]))

    def case(suffix: str) -> st.SearchStrategy[Case]:
        content = st.one_of(damage(good.texts[suffix]), contents.get(suffix, st.binary(max_size=99)), INSTEAD)
        return st.tuples(names, content, columns).map(
            lambda made: Case(
                commands.get_lt_with_lstsq,
                {**good.options, "dataset": f"./{made[0]}{suffix}", **({"dataset_column": made[2]} if made[2] else {})},
                {f"{made[0]}{suffix}": made[1]},
            )
        )

    return st.one_of(*map(case, good.texts))


def questions(good: GoodInput) -> st.SearchStrategy[Case]:
    cells = st.one_of(
        st.none(), st.text(max_size=5), st.integers(-2, 3), st.lists(st.one_of(st.text(max_size=5), st.integers()), max_size=3)
    )
    names = st.sampled_from(["question", "choices", "answer", "text", "x" * 500])
    rows = st.lists(st.dictionaries(names, cells, max_size=4), max_size=4)
    lines = rows.map(lambda made: "".join(json.dumps(row) + "\n" for row in made).encode())
    entries = st.sampled_from(
        ["q.jsonl", "[q.jsonl, q.jsonl]", "{q.jsonl: {question: text}}", "{q.jsonl: {limit: 1}}", "[./q.jsonl]"]
    )
    return st.tuples(entries, st.one_of(damage(good.questions), lines, INSTEAD)).map(
        lambda made: Case(commands.evaluate_model, {**good.options, "tasks": made[0]}, {"q.jsonl": made[1]})
    )


def models(good: GoodInput) -> st.SearchStrategy[Case]:
    values: st.SearchStrategy[Any] = st.sampled_from(
        [0, -1, 1, 7, 10**9, 10**30, -(10**9), 0.5, float("nan"), float("inf"), "", "x", "x" * 5000, "float32", "a/b", [],
         [1], {}, {"a": 1}, None, True, False, [[]] * 3]
    )  # fmt: skip

    def mutate(name: str) -> st.SearchStrategy[dict[str, bytes | str]]:
        content = good.model[name]
        changes = [damage(content), INSTEAD]
        if name.endswith(".json"):
            whole = json.loads(content)
            keys = st.one_of(
                st.sampled_from(sorted(whole)), st.sampled_from(["auto_map", "quantization_config", "architectures", "dtype"])
            )
            changes += [st.tuples(keys, values).map(lambda pair: json.dumps({**whole, pair[0]: pair[1]}).encode())] * 3
            changes.append(keys.map(lambda key: json.dumps({k: v for k, v in whole.items() if k != key}).encode()))
        return st.one_of(*changes).map(lambda made: {name: made})

    index = damage(b'{"weight_map": {"a": "b.safetensors"}}').map(lambda made: {"model.safetensors.index.json": made})
    names = ["config.json", "config.json", *good.model]
    scripts = st.sampled_from([commands.run_replaceme, commands.evaluate_model])
    return st.tuples(scripts, st.one_of(*map(mutate, names), index)).map(
        lambda made: Case(
            made[0],
            {**good.options, "model_path": "model"},
            {f"model/{name}": content for name, content in {**good.model, **made[1]}.items()},
        )
    )


def result_paths(good: GoodInput) -> st.SearchStrategy[Case]:
    contents = st.one_of(st.binary(max_size=50), st.sampled_from(WRONG_FILES), st.just(b'{"name": "x"}'), INSTEAD)
    names = st.sampled_from(["package.json", "there/file", "there"]) | st.sampled_from(NASTY)
    return st.tuples(RUN, names, contents).map(
        lambda made: Case(
            made[0],
            {**good.options, "save_path": made[1]},
            {name: made[2] for name in [made[1]] if name in ("package.json", "there/file")} | {"there/other": b"x"},
            checks_only=made[0] is not commands.evaluate_model,
        )
    )


KINDS = {
    "configs": configs, "options": options, "text files": texts, "question files": questions, "model folders": models,
    "paths for the result": result_paths,
}  # fmt: skip


def make_good_input(folder: Path) -> GoodInput:
    """Make a tiny model and texts in ``folder``."""
    import pandas as pd

    torch.set_num_threads(1)
    made_model(layers=3).save_pretrained(folder / "tiny")
    made_tokenizer().save_pretrained(folder / "tiny")
    rows = [made_text(4, number) for number in range(30)]
    (folder / "text.txt").write_text("\n\n".join(rows), encoding="utf-8")
    pd.DataFrame({"text": rows}).to_parquet(folder / "rows.parquet")
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    asked = [{"question": row[:40], "choices": [row[40:50], row[50:60]], "answer": 0} for row in rows[:6]]
    held_out = folder / "held-out.txt"
    held_out.write_text(made_text(20, 99), encoding="utf-8")
    return GoodInput(
        {**SETTINGS, "model_path": str(folder / "tiny"), "dataset": str(folder / "text.txt"), "tasks": str(held_out)},
        {path.name: path.read_bytes() for path in sorted((folder / "tiny").iterdir())},
        {
            ".jsonl": lines,
            ".json": json.dumps([{"text": row} for row in rows]).encode(),
            ".csv": pd.DataFrame({"text": rows}).to_csv(index=False).encode(),
            ".parquet": (folder / "rows.parquet").read_bytes(),
            ".txt": (folder / "text.txt").read_bytes(),
        },
        "".join(json.dumps(row) + "\n" for row in asked).encode(),
    )


# ---- How a case is run ----------------------------------------------------------------------------------------------


def count_outcomes(outcomes: list[Outcome]) -> list[Row]:
    """Return a row a kind: kind, cases, refused in one sentence, ran, failed."""
    counts = [[outcome.verdict for outcome in outcomes if outcome.kind == kind] for kind in KINDS]
    return [
        (kind, len(verdicts), *(verdicts.count(verdict) for verdict in ("refused", "ran", "failed")))  # type: ignore[misc]
        for kind, verdicts in zip(KINDS, counts, strict=True)
    ]


def run_cases(cases: int, seed: int) -> list[Outcome]:
    """Generate and run the cases, each kind in turn; failures are written to stderr as they come."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as root, _isolated_environment(Path(root)):
        good = make_good_input(Path(root))
        catalogue.task_index()  # read once here, not by each process
        strategies = {kind: make_strategy(good) for kind, make_strategy in KINDS.items()}
        for number, (kind, strategy) in zip(range(cases), cycle(strategies.items()), strict=False):
            case = generate_case(strategy, f"{seed} {number}")
            outcomes.append(outcome := Outcome(kind, number, case, *run_case(case)))
            if outcome.verdict == "failed":
                print(f"failed: {describe_outcome(outcome)} (seed {seed})", file=sys.stderr, flush=True)
    return outcomes


def generate_case(strategy: st.SearchStrategy[Case], seed: str) -> Case:
    """Return the case that hypothesis makes from a seed.

    It is the second example: the first is always the simplest, and the second differs from it in its first part, the number.
    """
    made: list[Case] = []
    every = list(HealthCheck)
    limits = settings(max_examples=2, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=every)

    def keep(_: int, case: Case) -> None:
        made.append(case)

    seeded(int.from_bytes(seed.encode()))(limits(given(st.integers(0, 2**63), strategy)(keep)))()
    return made[-1]


@contextmanager
def _isolated_environment(root: Path) -> Iterator[None]:
    """No hub, a cache of its own, and the tiny model in place of the embedded one."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"REPLACEME_CACHE": str(root / "cache")}))
        stack.enter_context(mock.patch.object(hub, "reachable", return_value=False))
        stack.enter_context(mock.patch.object(embedded_models, "model_folder", return_value=root / "tiny"))
        articles = [made_text(4, number) for number in range(40)]
        stack.enter_context(mock.patch("replaceme.calibration.embedded.load_articles", return_value=articles))
        yield


def run_case(case: Case) -> tuple[str, float, str]:
    """Run a case in a forked process; return its verdict, its seconds, and what it wrote to stderr."""
    with tempfile.TemporaryDirectory(prefix="bad-input-") as folder, tempfile.TemporaryFile() as said:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _run_in_child(case, Path(folder), said.fileno())
        code = _wait_for_exit(child)
        seconds = time.monotonic() - began
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    errors = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
    known = (*NAMES, *(Path(name).name[:20] for name in case.files))
    told = bool(errors) and all(len(line) <= SENTENCE_CHARACTERS and any(name in line for name in known) for line in errors)
    if code == 0 and not errors:
        return "ran", seconds, text
    refused = code == 2 and told and "Traceback" not in text
    return "refused" if refused else "failed", seconds, f"exit code {code}: {text}"


def _wait_for_exit(child: int) -> int | None:
    """Return a child's exit code; None after the limit, when it is killed."""
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], LIMIT_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
    finally:
        os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_in_child(case: Case, folder: Path, said: int) -> None:
    """Run a case in this process, which ends with it."""
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        for name, content in case.files.items():
            _write_file(Path(name), content)
        if case.checks_only:
            mock.patch("replaceme.pipeline.runner.stage_key", side_effect=SystemExit(0)).start()
            mock.patch("replaceme.evaluation.scores.score_model", side_effect=SystemExit(0)).start()
        words = [word for key, value in case.options.items() for word in (f"--{key}", value)]
        sys.argv = [case.command.__name__, *words, *case.words]
        case.command()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _write_file(path: Path, content: bytes | str) -> None:
    """Write a file, or put something else in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)


def describe_outcome(outcome: Outcome) -> str:
    """Return a failure in a few lines: what repeats it, and what it said."""
    changed = {
        name: excerpt(repr(content), 200) for name, content in outcome.case.files.items() if not name.startswith("model/")
    }
    options = " ".join(f"--{key} {excerpt(repr(value))}" for key, value in outcome.case.options.items() if key not in SETTINGS)
    end = "\n    ".join(outcome.said.strip().splitlines()[-3:])
    name = f"{outcome.kind} {outcome.number}: {outcome.case.command.__name__}"
    return f"{name} {options} {excerpt(outcome.case.words)} {changed}, {outcome.seconds:.1f} s\n    {end}"
