"""Is what the pages say true of the code: flags, commands, examples, messages, exit codes, links?"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator import errors, invite, monitor, start
from coordinator.cli import default_run_name
from coordinator.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, SwarmError
from peer import doctor, join, ledger
from tests import private_runs
from tests.fakes import hash_of

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
TROUBLESHOOTING = DOCS / "troubleshooting.md"
PAGES = sorted([*DOCS.glob("*.md"), *REPOSITORY.glob("*.md")])
DIARY = DOCS / "experiments.md"  # names flags as they were
EXPIRES_AT = 4e9  # in 2096
PARSERS: dict[str, Callable[[Sequence[str]], object]] = {
    "peer.join": join._parse,
    "peer.doctor": doctor.parse,
    "peer.ledger": ledger._parse,
    "coordinator.start": start._parse,
    "coordinator.monitor": monitor._parse,
    "coordinator.invite": invite._parse,
}
OTHER_PROGRAMS = (
    "pip",
    "docker",
    "sudo",
    "hf",
    "make",
    "kill",
    "chmod",
    "python -m scripts.",
    "python -m venv",
)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
COMMAND = re.compile(r"python -m ([a-z_]+(?:\.[a-z_]+)*)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def names_of(path: object) -> str:
    return path.name if isinstance(path, Path) else str(path)


# ---- flags and commands ---------------------------------------------------------------------------


@functools.cache
def flags_of(module: str) -> frozenset[str]:
    """All flags of a command, read off the option lines of its `--help`."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        PARSERS[module](["--help"])
    lines = [line.strip() for line in said.getvalue().splitlines() if re.match(r"  -", line)]
    return frozenset(FLAG.findall(" ".join(re.split(r" {2,}", line)[0] for line in lines)))


def unknown_flags(text: str) -> Iterator[str]:
    """Of a command: flags that it does not take; elsewhere: flags that no command takes."""
    everywhere = frozenset().union(*map(flags_of, PARSERS))
    for piece in pieces(text):
        if piece.startswith(OTHER_PROGRAMS):
            continue
        command = COMMAND.search(piece)
        known = flags_of(command[1]) if command is not None and command[1] in PARSERS else everywhere
        yield from (f"{flag}: {piece[:80]}" for flag in FLAG.findall(piece) if flag not in known)


def pieces(text: str) -> Iterator[str]:
    """Commands of code blocks, code within lines, and what is between them; comments apart."""
    for line in joined_lines(text):
        if line.startswith("    ") or COMMAND.match(line):
            yield from (part.strip() for part in line.split("# "))
            continue
        for number, part in enumerate(line.split("`")):
            yield part.strip() if number % 2 else f"({part})"


def joined_lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def unknown_modules(text: str) -> Iterator[str]:
    for name in COMMAND.findall(text):
        package = name.partition(".")[0]
        found = importlib.util.find_spec(package) and importlib.util.find_spec(name)
        source = Path(found.origin).read_text(encoding="utf-8") if found and found.origin else ""
        is_ours = package in ("coordinator", "peer", "scripts")
        if not source or (is_ours and '__name__ == "__main__"' not in source):
            yield name


def examples(text: str) -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of the commands in code blocks; a synopsis with [...] is none."""
    for line in joined_lines(text):
        command = COMMAND.match(line.strip())
        if command is None or not line.startswith("    ") or "[" in line.partition("#")[0]:
            continue
        yield command[1], shlex.split(line, comments=True)[3:]


def examples_that_fail(text: str) -> Iterator[str]:
    for module, arguments in examples(text):
        if module not in PARSERS:
            continue
        try:
            PARSERS[module]([filled(argument) for argument in arguments])
        except (SystemExit, SwarmError) as error:
            yield f"{module} {' '.join(arguments)}: {error}"


def filled(argument: str) -> str:
    """An invite where the page has a placeholder for one."""
    if argument != "STRING" and not argument.startswith("@"):
        return argument
    entry = ("/ip4/192.0.2.1/tcp/1/p2p/" + private_runs.ORGANIZER.peer_id,)
    return private_runs.invite(hash_of("run"), expires_at=EXPIRES_AT, entry=entry).to_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page != DIARY], ids=names_of)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    assert list(unknown_flags(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", PAGES, ids=names_of)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    assert list(unknown_modules(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", PAGES, ids=names_of)
def test_every_example_is_taken_by_its_parser(page: Path) -> None:
    assert list(examples_that_fail(page.read_text(encoding="utf-8"))) == []


def test_every_command_has_an_example() -> None:
    named = {module for page in PAGES for module, _ in examples(page.read_text(encoding="utf-8"))}
    assert set(PARSERS) <= named


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("give `--shcedule 22:00-07:00`", "--shcedule"),
        ("or --nicer, in plain text", "--nicer"),
        ("    python -m coordinator.start --data F    # --model M", "--data"),
        ("`python -m peer.ledger mine --days 3`", "--days"),
        ("`pip install --no-deps x` and `--use-gpu`", "--use-gpu"),
        ("    python -m peer.join \\\n  --datum F", "--datum"),
    ],
)
def test_a_flag_that_does_not_exist_is_seen(text: str, culprit: str) -> None:
    assert [found.partition(":")[0] for found in unknown_flags(text)] == [culprit]


def test_flags_that_exist_pass() -> None:
    text = "`pip install --no-deps x`, `--train-file F`, `python -m peer.join --no-bf16`, --initial-peers\n"
    assert list(unknown_flags(text + "    python -m coordinator.start --model M  # --data, a - b -- c")) == []


@pytest.mark.parametrize("name", ["peer.joins", "coordinator.spec", "nowhere.at.all"])
def test_a_command_that_does_not_exist_is_seen(name: str) -> None:
    assert len(list(unknown_modules(f"`python -m {name}`"))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "python -m peer.join --initial-peers ADDR",  # --data and --output-dir are required
        "python -m coordinator.start --rounds none",
        "python -m coordinator.invite out PEER_ID",
        "python -m peer.ledger",
        "python -m peer.join --invite cut-off --data F --output-dir D",
    ],
)
def test_an_example_that_does_not_parse_is_seen(line: str) -> None:
    assert len(list(examples_that_fail(f"    {line}\n"))) == 1


MADE = re.compile(
    r"(?:--output-dir|--log-file|--identity-path|--invite|peer\.ledger) @?([\w./-]*[a-z][\w./-]*)"
)


def made_by(text: str) -> Iterator[str]:
    """Files and folders that commands of a page make or keep where they are given; DIR stands for any."""
    for piece in pieces(text):
        yield from (f"{path}/x" if "." not in path else path for path in MADE.findall(piece))


def test_what_pages_tell_people_to_make_in_the_clone_is_ignored_by_git() -> None:
    """A task_model/ holds label names, an invite lets in: `git add .` must not take them."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a clone")
    made = {path for page in PAGES if page != DIARY for path in made_by(page.read_text(encoding="utf-8"))}
    made.add(f"{default_run_name('org/all-MiniLM-L6-v2')}/run.toml")
    assert {"mine/x", "my-run/x", "invite.txt"} <= made
    assert [path for path in sorted(made) if not is_ignored(path)] == []
    assert not any(is_ignored(path) for path in ("docs/mine/x", "peer/join.py", "results/invite.txt"))


def is_ignored(path: str) -> bool:
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=REPOSITORY, check=False).returncode == 0


# ---- links ----------------------------------------------------------------------------------------


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Relative links to files, or to headings in them, that are not there."""
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if target != page and not target.exists():
            yield link
            continue
        headings = text if target == page else target.read_text(encoding="utf-8") if anchor else ""
        if anchor and anchor not in anchors(headings):
            yield link


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=names_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text(encoding="utf-8"))) == []


def test_a_broken_link_is_seen() -> None:
    text = "# One, two: three\n[a](#one-two-three) [b](README.md) [c](https://x.org/y#z) [d](#one) [e](no.md)"
    assert list(broken_links(DOCS / "page.md", text)) == ["#one", "no.md"]


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    others = [page.name for page in DOCS.glob("*.md") if page.name != "README.md"]
    assert len(others) >= 8
    assert [name for name in others if f"({name})" not in index] == []


@pytest.mark.parametrize("picture", sorted((DOCS / "images").glob("*.svg")), ids=names_of)
def test_a_picture_of_a_terminal_is_small_and_asks_nobody(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert re.findall(r"(?:url\(|href=|src=)[\"']?https?:", text) == []


# ---- messages and exit codes ----------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """A failure or warning in the source."""

    check: str | None  # its name; None: any check
    pattern: str  # a regular expression: the fixed pieces of the message, in their order


def said_by(source: str) -> Iterator[Said]:
    """What calls of `Check(name, status, message, ...)`, unless ok, and `failed(name, message)` say."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            names = [text_of(arg) for arg in call.args[:2]]
            if call.func.id == "failed":
                for message in messages(call.args[1], function, call.lineno):
                    yield Said(names[0], message.partition("; ")[0])
            elif call.func.id == "Check" and names[0] is not None and names[1] != "ok":
                for message in messages(call.args[2], function, call.lineno):
                    yield Said(names[0], message)


def messages(argument: ast.expr, function: ast.FunctionDef, line: int) -> Iterator[str]:
    """The pattern of a message, or of what was last assigned to its variable."""
    if isinstance(argument, ast.Name):
        before = [
            node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign | ast.AugAssign)
            and node.lineno < line
            and argument.id in {name.id for name in targets(node)}
        ]
        if before:
            yield pattern_of(max(before, key=lambda value: value.lineno))
        return
    yield pattern_of(argument)


def text_of(value: ast.expr) -> str | None:
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def targets(node: ast.Assign | ast.AugAssign) -> list[ast.Name]:
    found = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target for target in found if isinstance(target, ast.Name)]


def pattern_of(value: ast.expr) -> str:
    found = value.values if isinstance(value, ast.JoinedStr) else [value]
    texts = [text_of(piece) for piece in found]
    return "".join(".*?" if text is None else re.escape(text).replace(r"\ ", " ") for text in texts)


def undocumented(said: Said, page: str) -> bool:
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    if said.check is not None:
        rows = [row for row in rows if row.startswith(f"| `{said.check}` |")]
    return not any(re.search(said.pattern, row) for row in rows)


def all_said() -> list[Said]:
    sources = [REPOSITORY / "peer" / f"{name}.py" for name in ("checkup", "doctor", "probes", "swarm_probes")]
    return [said for source in sources for said in said_by(source.read_text(encoding="utf-8"))]


def test_every_failure_and_warning_of_doctor_has_its_entry() -> None:
    page = TROUBLESHOOTING.read_text(encoding="utf-8")
    assert [said for said in all_said() if undocumented(said, page)] == []


def test_the_messages_are_read_from_the_source() -> None:
    found = all_said()
    assert Said("python", "Python .*?, but .*? is needed") in found
    assert Said("disk", ".*?: little room is left") in found
    assert Said("reachable", r"client mode \(\-\-no\-listen\): you dial others, nobody dials you") in found
    assert Said(None, "cannot import .*?") in found
    assert len(found) > 30


def test_every_check_that_doctor_makes_has_its_entry() -> None:
    calls = ast.walk(ast.parse((REPOSITORY / "peer" / "doctor.py").read_text(encoding="utf-8")))
    made = [call.args[0] for call in calls if isinstance(call, ast.Call) and called(call) == "_do"]
    names = {text_of(name) for name in made} | {said.check for said in all_said()}
    assert {"p2p", "clock", "machine", "rows", "entry point"} <= names
    page = TROUBLESHOOTING.read_text(encoding="utf-8")
    assert [name for name in names if name is not None and f"\n| `{name}` |" not in page] == []


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def test_a_message_without_an_entry_is_seen() -> None:
    source = """
def judge(n):
    said = f"{n} moons"
    if n > 2:
        what = f"{said}, too many"
        return Check("sky", "failure", what, "wait")
    said += " and no sun"
    if n:
        return Check("sky", "warning", said)
    return Check("sky", "ok", "dark")
"""
    found = list(said_by(source))
    assert found == [Said("sky", ".*?, too many"), Said("sky", " and no sun")]
    page = "| `sky` | N moons, too many | wait |\n| `sea` | X and no sun | wait |\n"
    assert [undocumented(said, page) for said in found] == [False, True]


# ---- what join says


ERRORS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SwarmError)
} | {"ArgumentTypeError", "GroupFailed", "PeerUnreachable", "StreamError"}
CLAUSE_END = re.compile(r"…|%[-.\d]*[sdfg]|[:;,.()\n'\"]+(?:\s|$)|\s[('\"]")


def modules_of(module: str, found: set[str] | None = None) -> set[str]:
    """What a command imports of this project, at the head of files or later, directly or not."""
    found = set() if found is None else found
    path = REPOSITORY.joinpath(*module.split(".")).with_suffix(".py")
    if module in found or not path.exists():
        return found
    found.add(module)
    for name in imported_by(ast.parse(path.read_text(encoding="utf-8"))):
        modules_of(name, found)
    return found


def imported_by(node: ast.AST) -> Iterator[str]:
    """Not what only the type checker reads."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("coordinator", "peer")):
        yield node.module
    for child in ast.iter_child_nodes(node):
        yield from imported_by(child)


def clauses_told(source: str) -> Iterator[tuple[str, ...]]:
    """Of each error that is made, and of each warning and error that is logged: its fixed clauses."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for call in ast.walk(function):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = call.func.id if isinstance(call.func, ast.Name) else called(call)
            is_log = isinstance(call.func, ast.Attribute) and name in ("warning", "error")
            if is_log or name in ERRORS:
                yield from filter(None, (telling(text) for text in said_in(call.args[0], function)))


def said_in(argument: ast.expr, function: ast.AST) -> Iterator[str]:
    """The fixed pieces of a message, or of all that its variable is ever given, a line each."""
    if isinstance(argument, ast.Name):
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign | ast.AugAssign) or isinstance(node.value, ast.Name):
                continue
            if argument.id in {target.id for target in targets(node)}:
                yield from said_in(node.value, function)
        return
    pieces_ = (
        node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
        for node in (argument.values if isinstance(argument, ast.JoinedStr) else [argument])
    )
    yield " … ".join(piece for piece in pieces_ if piece is not None)


def telling(text: str) -> tuple[str, ...]:
    """Clauses of three words or more; where there is none, whatever has a word."""
    clauses = [clause.strip(" .,:;()'\"-") for clause in CLAUSE_END.split(text)]
    return tuple(c for c in clauses if len(c.split()) >= 3) or tuple(c for c in clauses if len(c) > 3)


def unexplained(told: Sequence[tuple[str, ...]], page: str) -> list[tuple[str, ...]]:
    """Messages of which no clause stands in any row of the page."""
    rows = "\n".join(line for line in page.replace("`", "").splitlines() if line.startswith("| "))
    return [clauses for clauses in told if not any(clause in rows for clause in clauses)]


def test_every_error_and_warning_of_join_has_its_entry() -> None:
    modules = modules_of("peer.join")
    assert {"peer.session", "peer.tables", "coordinator.ballot"} <= modules
    assert not {"coordinator.web", "peer.benchmark"} & modules
    sources = [REPOSITORY.joinpath(*name.split(".")).with_suffix(".py") for name in sorted(modules)]
    told = [t for source in sources for t in clauses_told(source.read_text(encoding="utf-8"))]
    assert len(told) > 200
    assert unexplained(told, TROUBLESHOOTING.read_text(encoding="utf-8")) == []


def test_a_message_of_join_without_an_entry_is_seen() -> None:
    source = """
def look(n, error):
    why = f"the moon {n} is full"
    if n > 2:
        raise DataError(f"{n} moons, too many of them; take some away")
    if n > 1:
        raise DataError(why)
    logger.warning("no sun above %s: %s", n, error)
    raise ValueError("which nobody sees")
"""
    told = sorted(clauses_told(source))
    assert told == [("no sun above",), ("the moon", "is full"), ("too many of them", "take some away")]
    page = "no sun above\n| the moon X is full | wait |\n| N moons, too many of them | wait |\n"
    assert unexplained(told, page) == [("no sun above",)]


def missing_codes(page: str, kinds: Sequence[type[SwarmError]]) -> list[str]:
    """Errors that are not named in the section of their exit code."""
    sections = re.split(r"^###? ", page, flags=re.MULTILINE)
    return [
        kind.__name__
        for kind in kinds
        if not any(
            s.startswith(f"Exit code {kind.exit_code}:") and f"`{kind.__name__}`" in s for s in sections
        )
    ]


def test_every_error_and_exit_code_has_its_entry() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SwarmError)
    ]
    assert len(kinds) >= 9
    page = TROUBLESHOOTING.read_text(encoding="utf-8")
    assert missing_codes(page, kinds) == []
    assert f"Exit codes {EXIT_INTERRUPTED} and {EXIT_TERMINATED}" in page


def test_an_error_without_an_entry_is_seen() -> None:
    page = "### Exit code 3: data\n`DataError`\n### Exit code 4: model\n`StateError`\n"
    assert missing_codes(page, [errors.DataError, errors.StateError]) == ["StateError"]
